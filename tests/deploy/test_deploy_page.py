"""The commands of docs/deploy.md that need no cluster, as they stand, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cnpp_trt
import pytest

PAGE = Path(cnpp_trt.__file__).parent / "docs" / "deploy.md"


@pytest.mark.slow
def test_commands_run_as_they_stand(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 5
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path / "home")}
    env["PATH"] = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), env["PATH"]])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cnpp-trt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cnpp_trt "$@"\n')
    (tmp_path / "bin" / "cnpp-trt").chmod(0o755)
    (tmp_path / "here").mkdir()
    for line in lines:
        ended = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path / "here", env=env, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
    assert len(list((tmp_path / "here" / "fetched" / "images").rglob("*.png"))) == 1
    assert (tmp_path / "here" / "models" / "mini" / "config.pbtxt").is_file()
