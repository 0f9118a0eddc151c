"""A real Triton server without a container: the one that the wheel of nvidia-pytriton carries.

The wheel has `tritonserver` 24.10, the backend for Python models and its stub for each version of Python. That finds
the packages of a virtual environment through the first `python3` on PATH. Before 24.11 its pybind11 cannot read arrays
of NumPy 2: a virtual environment of its own puts NumPy 1 before the packages of this process.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import CnppError

REQUIREMENT = "nvidia-pytriton==0.7.0"
"""The wheel; it needs glibc 2.35."""
NUMPY = "numpy==1.26.4"
"""Another wheel, which the Python models of that server need."""


@dataclass(frozen=True)
class TritonServer:
    """Where a server listens, as HOST:PORT, and the file of what it prints."""

    http: str
    grpc: str
    metrics: str
    log: Path


@contextmanager
def triton_server(
    wheel: Path, numpy: Path, repository: Path, models: Sequence[str], folder: Path, patience: float = 120.0
) -> Iterator[TritonServer]:
    """Starts a server and ends it afterwards.

    Args:
        wheel, numpy: the folders of the unpacked wheels.
        repository: of models.
        models: of these, those that are loaded.
        folder: for a copy of the backend, the virtual environment and the log; an empty one.
        patience: seconds until the models must be loaded.

    Raises:
        CnppError: there is no libpython, or the server ends before it is ready.
    """
    libraries = Path(sysconfig.get_config_var("LIBDIR") or "")
    name = sysconfig.get_config_var("INSTSONAME") or ""
    if ".so" not in name or not (libraries / name).exists():
        raise CnppError(f"the stub of Triton's Python models needs libpython, which {sys.base_prefix} does not have")
    home = wheel / "pytriton" / "tritonserver"
    backends = folder / "backends"
    shutil.copytree(home / "backends", backends)
    stub = "triton_python_backend_stub"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / stub, backends / "python" / stub)
    for program in (backends / "python" / stub, home / "bin" / "tritonserver"):
        program.chmod(0o755)  # a wheel that is unpacked as a ZIP archive forgets it
    ports = _free_ports(3)
    line = [home / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory", backends]
    line += ["--model-control-mode", "explicit", *(f"--load-model={model}" for model in models)]
    line += ["--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]
    line += ["--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1", "--metrics-address", "127.0.0.1"]
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(_environment(folder / "python", numpy)), env.get("PATH", "")])
    env["LD_LIBRARY_PATH"] = os.pathsep.join([str(wheel / "nvidia_pytriton.libs"), str(libraries)])
    log = folder / "log"
    with log.open("wb") as output, ExitStack() as stack:
        process = subprocess.Popen([*map(str, line)], stdout=output, stderr=subprocess.STDOUT, env=env)
        stack.callback(_end, process)
        http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
        server = TritonServer(http, grpc, metrics, log)
        until = time.monotonic() + patience
        while not _ready(http):
            if process.poll() is not None or time.monotonic() > until:
                last = log.read_text("utf-8", "replace")[-2000:]
                raise CnppError(f"tritonserver was not ready after {patience:g} s: {last}")
            time.sleep(0.2)
        yield server


def _environment(folder: Path, first: Path) -> Path:
    """A virtual environment with what is in `first`, and after that what this process imports. Returns its `bin`."""
    venv.create(folder, symlinks=True, with_pip=False)
    paths = [str(first), *(path for path in sys.path if Path(path).is_dir())]
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "first.pth").write_text("".join(f"{path}\n" for path in paths), "utf-8")
    return folder / "bin"


def _ready(address: str) -> bool:
    """Whether every model is loaded and warmed up: Triton listens before that."""
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
