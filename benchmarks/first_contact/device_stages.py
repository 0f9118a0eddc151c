"""The GPU, CUDA through cuda-python, and the libraries that graphs run on."""

import time
from functools import partial

import numpy as np

from ...engines.flavor import installed_flavors, load_flavor
from ...errors import BackendError
from ...gpu import find_gpu
from ...install import install_command
from ...runtime.backends.cuda import Cuda
from ...versions import PACKAGES, installed
from ..environment import gpu_state
from .stage import Finding, Setup, WrongResult

# The oldest compute capability of each flavor, and the newest that TensorRT-RTX 1.7 names.
_RULES = {"tensorrt": ((7, 5), (99, 0)), "tensorrt-rtx": ((7, 5), (12, 1))}
_RTX_TARGETS = (75, 80, 86, 89, 120, 121)
_NODES = 1000


def machine(setup: Setup) -> Finding:
    """What this machine is, and which flavor of TensorRT names its GPU."""
    search = find_gpu(setup.device)
    gpu = search.gpu
    if gpu is None:
        raise BackendError(search.reason)
    found = Finding(
        numbers={
            "gpu": gpu.name,
            "compute capability": gpu.sm,
            "multiprocessors": gpu.multiprocessors,
            "memory GiB": round(gpu.memory / 2**30, 1),
            "driver's CUDA": gpu.cuda,
            **{name: version for name, version in installed(PACKAGES).items() if version},
        }
    )
    if state := gpu_state():
        found.numbers["driver"] = state.get("driver_version", "")
    if gpu.compute_capability < _RULES["tensorrt"][0]:
        found.degrade(f"TensorRT supports no GPU of {gpu.sm}: ONNX Runtime's CUDA provider remains")
    major, minor = gpu.compute_capability
    if 10 * major + minor not in _RTX_TARGETS:
        found.words = f"TensorRT-RTX 1.7 does not name {gpu.sm} as a target; TensorRT does"
    return found


def cuda(setup: Setup) -> Finding:
    """Memory, copies and a captured graph of copies: bytes and microseconds for each node."""
    backend, found = Cuda(device=setup.device), Finding()
    nbytes = 16 << 20
    allocate = backend.arena(2 * nbytes)
    first, second = (allocate((nbytes // 256, 256), "uint8") for _ in range(2))
    content = np.random.default_rng(0).integers(0, 256, first.shape, np.uint8)
    backend.upload(first, content)
    backend.copy(first, second)
    if not np.array_equal(backend.download(second), content):
        raise WrongResult("what was copied to the device and back is not what it was")
    start = time.perf_counter()
    backend.upload(first, content)
    backend.synchronize()
    found.numbers["upload GB/s"] = round(nbytes / (time.perf_counter() - start) / 1e9, 1)
    source, target = first.part(0), second.part(0)
    launches = [partial(backend.copy, source, target)] * _NODES
    try:
        recording = backend.record(launches)
    except BackendError as e:
        found.degrade(f"nothing can be captured: {e}")
        return found
    changed = ~content[0]
    backend.upload(source, changed)
    start = time.perf_counter()
    recording()
    backend.synchronize()
    seconds = time.perf_counter() - start
    if not np.array_equal(backend.download(target), changed):
        raise WrongResult("a replayed graph did not do what was captured")
    found.numbers["graph bytes per node"] = round(backend.held().get("recordings", 0) / _NODES)
    found.numbers["graph microseconds per node"] = round(1e6 * seconds / _NODES, 2)
    return found


def libraries(setup: Setup) -> Finding:
    """Each flavor of TensorRT: whether it can be imported, and whether its runtime and its builder start."""
    found, works = Finding(), 0
    if not installed_flavors():
        raise BackendError(f"TensorRT is not installed: {install_command('gpu')} or {install_command('rtx')}")
    for name in installed_flavors():
        try:
            flavor = load_flavor(name)
            log = flavor.logger()
            flavor.start_runtime(log)
            flavor.create("start its builder", flavor.trt.Builder, log, log=log)
        except BackendError as e:
            found.degrade(str(e))
            continue
        works += 1
        found.numbers[name] = flavor.version
    if not works:
        raise BackendError(found.words)
    return found
