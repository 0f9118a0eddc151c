"""docs/service.md: its commands and programs run one after the other, against the server that its first line starts."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(miniature: Any, tmp_path: Path) -> None:
    for module in ("fastapi", "openai", "webuiapi"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'cnpp-trt[service,test]'")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    m = miniature.pipeline.bundle.manifest
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(miniature.bundle, home / "bundles" / f"miniature-{m.precision}-{m.width}x{m.height}")
    here.mkdir()
    shutil.copy(miniature.bundle / m.conditions["seg"]["image"], here / "map.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ["set -e", "trap 'kill %1 2>/dev/null || true' EXIT"]
    for i, (kind, code) in enumerate(BLOCK.findall((ROOT / "docs/service.md").read_text("utf-8"))):
        if kind == "python":
            (here / f"block-{i}.py").write_text(code.replace("8000", str(port)))
            code = f"python block-{i}.py\n"
        script.append(code.replace("8000", str(port)))
    script.append("wait %1 && echo ended in order")
    (tmp_path / "bin").mkdir()
    for name, line in (("python", sys.executable), ("cnpp-trt", f"{sys.executable} -m cnpp_trt")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {line} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    env = {**os.environ, "CNPP_TRT_HOME": str(home), "PATH": path, "no_proxy": "*"}
    ended = subprocess.run(
        ["bash", "-m", "-c", "\n".join(script)], cwd=here, env=env, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("ended in order\n")
    assert (here / "house.png").is_file()
