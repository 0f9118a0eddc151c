"""The backend `onnxruntime-cuda` with the real onnxruntime-gpu, where CUDA is not installed.

The wheel is too large to download unasked; without it these tests skip, and say how to get it.
"""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cnpp_trt
import pytest
import wheels
from cnpp_trt.runtime.backends.elf import linked_libraries

ROOT = Path(cnpp_trt.__path__[0])
PROGRAM = Path(__file__).resolve().parents[2] / "programs" / "real_onnxruntime.py"
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site() -> Path:
    """The folder of the unpacked wheel of the pinned version."""
    [pinned] = re.findall(r"^onnxruntime-gpu==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    try:
        return wheels.fetch(pinned, download=False)
    except wheels.Unavailable as e:
        pytest.skip(str(e))


def run(environment: dict[str, str], site: Path, *arguments: str) -> str:
    made = {**environment, "PYTHONPATH": f"{site}:{environment.get('PYTHONPATH', '')}"}
    line = [sys.executable, str(PROGRAM), *arguments]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=300, env=made)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def compile_empty(folder: Path, names: Sequence[str]) -> None:
    """Libraries of these names without anything in them."""
    folder.mkdir(parents=True)
    for name in names:
        line = ["gcc", "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(line, check=True)


def loads(name: str) -> bool:
    """Whether this machine has a library where the linker looks."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def test_every_library_that_is_missing_is_named_and_found_where_pip_puts_it(
    site: Path, simulated_gpu: Any, tmp_path: Path
) -> None:
    needed = [name for name in linked_libraries(site / PROVIDER) if re.match("libcu(?!da.so)", name)]
    assert {"libcublas", "libcublasLt", "libcudart", "libcurand"} <= {name.partition(".")[0] for name in needed}
    absent = [name for name in [*needed, "libcudnn.so.9"] if not loads(name)]
    if not {"libcudnn.so.9", "libcurand.so.10"} <= set(absent):
        pytest.skip("this machine has CUDA's libraries")
    environment = simulated_gpu.environment()
    cuda, providers, before, after = json.loads(run(environment, site, "libraries"))
    assert (cuda, providers[-2:]) == (13, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert before == after == absent
    # As pip installs them beside it.
    (tmp_path / "onnxruntime").symlink_to(site / "onnxruntime")
    compile_empty(tmp_path / "nvidia" / "cu13" / "lib", needed)
    compile_empty(tmp_path / "nvidia" / "cudnn" / "lib", ["libcudnn.so.9"])
    cuda, providers, before, after = json.loads(run(environment, tmp_path, "libraries"))
    assert (before, after) == (absent, [])
    # One alone that is missing, cuDNN's or curand's, is the one that is named.
    for folder, name in (("cudnn", "libcudnn.so.9"), ("cu13", "libcurand.so.10")):
        shutil.move(tmp_path / "nvidia" / folder / "lib" / name, tmp_path / name)
        assert json.loads(run(environment, tmp_path, "libraries"))[3] == [name]
        shutil.move(tmp_path / name, tmp_path / "nvidia" / folder / "lib" / name)


def test_without_cudas_libraries_the_backend_says_which(site: Path, simulated_gpu: Any, tiny: Any) -> None:
    said = run(simulated_gpu.environment(), site, "refused", str(tiny.bundle))
    if loads("libcudnn.so.9"):
        pytest.skip("this machine has cuDNN")
    assert said.startswith("ONNX Runtime fell back to the CPU: lib") and said.count("\n") == 1
    assert "libcudnn.so.9 cannot be loaded; " in said
