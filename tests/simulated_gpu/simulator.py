"""A simulated GPU for tests: `driver.c` stands for NVIDIA's driver, so that cuda-python runs on a machine without one.

libcuda is loaded once per process and for good, so code that is to see this one runs in a child process:
`build` compiles the library, `environment` makes the variables to start the child with, and inside the child
(`from simulator import Simulator`, the path is set) `Simulator` reads the trace and launches "kernels".

The simulation is strict where a GPU is lenient or late. Work on a stream is executed at once, or, lazily, only when
something waits for it, so that a forgotten wait shows as stale data. Addresses and handles are never given out twice,
so that whatever outlived its memory or object is found. Fresh memory is 0xA5, freed memory 0xDD.

There are no kernels, modules, memory nodes, conditional nodes, textures, peers or IPC: asking for one raises
cuda-python's FunctionNotFoundError (SIMULATED_GPU_LOG=1 prints each name that is not there).
"""

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARY = "libcuda.so.1"
KINDS = ("device", "pinned", "stream", "event", "graph", "exec")
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def build(folder: Path) -> Path:
    """Compiles the library into a folder and returns its path.

    Raises: FileNotFoundError (no gcc), RuntimeError (with what gcc said)
    """
    library = folder / LIBRARY
    line = ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    line += [f"-Wl,-soname,{LIBRARY}", "-o", str(library), str(HERE / "driver.c"), "-ldl"]
    ended = subprocess.run(line, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"gcc cannot compile the simulated driver:\n{ended.stderr}")
    return library


def environment(
    folder: Path,
    *,
    lazy: bool = False,
    memory: int | None = None,
    capability: str | None = None,
    cuda: int | None = None,
    log: bool = False,
) -> dict[str, str]:
    """The variables of a process that is to see the simulated GPU.

    Args:
        folder: where `build` put the library.
        lazy: nothing runs before something waits for it.
        memory: of the device, in bytes; 8 GiB where None.
        capability: the compute capability, as "8.6"; 12.0 where None.
        cuda: the driver's version as cuDriverGetVersion gives it; 13000 where None.
        log: print the driver functions that are asked for and not simulated.
    """
    made = {name: value for name, value in os.environ.items() if not name.startswith("SIMULATED_GPU_")}
    for name, first in (("LD_LIBRARY_PATH", folder), ("PYTHONPATH", HERE)):
        made[name] = os.pathsep.join([str(first), *filter(None, [made.get(name)])])
    made.pop("CUDA_VISIBLE_DEVICES", None)
    chosen = {
        "LAZY": "1" if lazy else None,
        "MEMORY": memory,
        "CC": capability,
        "CUDA": cuda,
        "LOG": "1" if log else None,
    }
    made.update({f"SIMULATED_GPU_{name}": str(value) for name, value in chosen.items() if value is not None})
    return made


class Simulator:
    """The simulated driver as a test in the child process sees it."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL(LIBRARY)
        if not hasattr(self._driver, "sim_launch"):
            raise RuntimeError(f"{LIBRARY} is not the simulated one: start this process with environment(...)")
        self._driver.sim_live_bytes.restype = self._driver.sim_peak_bytes.restype = ctypes.c_size_t
        self._kernels: list[Any] = []  # as long as the process: a graph may call them at any time
        _replace_runtime_calls()

    def trace(self) -> list[str]:
        """The driver calls so far, in their order, as `cuMemcpyHtoDAsync_v2 1024` or `cuGraphLaunch`.

        Calls that only ask (attributes, current context, capture status) are left out; refused calls are in it.
        """
        line = ctypes.create_string_buffer(200)
        lines = []
        for i in range(self._driver.sim_trace_count()):
            self._driver.sim_trace_get(i, line, len(line))
            lines.append(line.value.decode())
        return lines

    def clear(self) -> None:
        """Empties the trace."""
        self._driver.sim_trace_clear()

    def live_bytes(self) -> int:
        """Device memory that is allocated now."""
        return int(self._driver.sim_live_bytes())

    def peak_bytes(self) -> int:
        return int(self._driver.sim_peak_bytes())

    def live_objects(self) -> dict[str, int]:
        """What was made and not yet freed, by kind: device and pinned allocations, streams, events, graphs."""
        return {kind: self._driver.sim_live(kind.encode()) for kind in KINDS}

    def clear_error(self) -> None:
        """Forgets an illegal access, after which (as on a GPU) every call fails."""
        self._driver.sim_clear_error()

    def launch(self, stream: Any, kernel: Callable[[], object], ranges: Iterable[tuple[int, int]] = ()) -> int:
        """Launches a "kernel" on a stream: executed, queued or captured like one.

        Args:
            stream: anything that int() or __cuda_stream__ makes a CUstream of.
            kernel: its body. It may not call CUDA. If it raises, the process ends: nothing else would notice.
            ranges: (address, bytes) of the device memory that it touches, judged whenever it runs.

        Returns: the CUresult, 0 for success.
        """

        def body(_: Any) -> None:
            try:
                kernel()
            except BaseException:
                traceback.print_exc()
                os._exit(70)

        touched = list(ranges)
        numbers = ctypes.c_uint64 * len(touched)
        starts = numbers(*(int(start) for start, _ in touched))
        sizes = numbers(*(size for _, size in touched))
        kept = CALLBACK(body)
        self._kernels.append(kept)
        handle = stream.__cuda_stream__()[1] if hasattr(stream, "__cuda_stream__") else int(stream)
        return int(self._driver.sim_launch(ctypes.c_void_p(handle), kept, None, len(touched), starts, sizes))


def memory(address: int, size: int) -> memoryview:
    """Device memory as a kernel's body sees it: writable bytes, e.g. for np.frombuffer."""
    return memoryview((ctypes.c_uint8 * size).from_address(int(address))).cast("B")


def _replace_runtime_calls() -> None:
    """cuda.core makes two calls through CUDA's runtime library, which wants undocumented parts of the driver."""
    try:
        import cuda.bindings.driver as driver
        import cuda.bindings.runtime as runtime
    except ImportError:
        return

    def synchronize() -> tuple[Any]:
        (error,) = driver.cuCtxSynchronize()
        return (runtime.cudaError_t(int(error)),)

    def bus(size: int, device: int) -> tuple[Any, bytes]:
        return runtime.cudaError_t.cudaSuccess, b"0000:01:00.0\0"

    runtime.cudaDeviceSynchronize = synchronize
    runtime.cudaDeviceGetPCIBusId = bus
