"""NVTX ranges, as a tool sees them that NVTX itself loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent.parent / "programs" / "nvtx_ranges.c"
PROGRAM = """
import sys
from cnpp_trt import Pipeline, Request

pipeline = Pipeline.open(sys.argv[1], "onnxruntime-cpu", threads=1)
pipeline(Request("a house", num_inference_steps=2, seed=1))
"""


def ran(bundle: Path, **variables: str) -> list[str]:
    """What a process prints on stderr that generates an image."""
    line = [sys.executable, "-c", PROGRAM, str(bundle)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, **variables})
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.splitlines()


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("nvtx", reason="nvtx is not installed")
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("the NVTX tool is compiled with gcc on Linux")
    library = tmp_path_factory.mktemp("nvtx") / "ranges.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, SOURCE], check=True)
    return library


def test_stages_are_ranges(tool: Path, tiny: Any) -> None:
    open_, found = [], []
    for line in ran(tiny.bundle, NVTX_INJECTION64_PATH=str(tool), CNPP_TRT_NVTX="1"):
        _, domain, what, *name = line.split(maxsplit=3)
        assert domain == "cnpp-trt"
        if what == "begin":
            open_ += name
            found.append("/".join(open_))
        else:
            open_.pop()
    assert open_ == []
    steps = [f"step {k}{part}" for k in (1, 2) for part in ("", "/update", "/unet", "/update")]
    before = [f"prepare/{graph}" for graph in ("text_encoder", "text_kv", "time_embeds")]
    assert found == ["prepare", *before, *steps, "vae_decoder"]


def test_nothing_is_told_unless_asked_for(tool: Path, tiny: Any) -> None:
    assert ran(tiny.bundle, NVTX_INJECTION64_PATH=str(tool), CNPP_TRT_NVTX="") == []


def test_without_the_package_a_line_says_so(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "nvtx.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    [line] = ran(tiny.bundle, CNPP_TRT_NVTX="1", PYTHONPATH=path)
    assert line.startswith("CNPP_TRT_NVTX=1 needs the package nvtx, which is not installed: ") and "[profile]" in line
