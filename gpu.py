"""The NVIDIA GPU of this machine, asked of the driver itself: no package is needed and none is imported."""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

# CUdevice_attribute, cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """Device 0, as CUDA_VISIBLE_DEVICES leaves it.

    Attributes:
        compute_capability: (major, minor), (9, 0) on H100 and H200.
        memory: bytes.
        cuda: the newest CUDA version that the driver runs, as in `13.0`.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    cuda: str

    @property
    def sm(self) -> str:
        return "sm{}{}".format(*self.compute_capability)


@dataclass(frozen=True)
class GpuSearch:
    """What the driver answered.

    Attributes:
        gpu: device 0; None where there is none.
        reason: why there is none, in a few words.
    """

    gpu: Gpu | None = None
    reason: str = ""


@cache
def find_gpu() -> GpuSearch:
    """Asks the driver for its first GPU, once in a process."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return GpuSearch(reason=f"no NVIDIA driver ({library})")
    status = driver.cuInit(0)
    number = ctypes.c_int()
    if status or driver.cuDeviceGetCount(ctypes.byref(number)) or not number.value:
        return GpuSearch(reason=f"the NVIDIA driver finds no GPU (cuInit: {status})")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGetName(name, len(name), 0)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), 0)
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        capability.append(value.value)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return GpuSearch(Gpu(name.value.decode(), (capability[0], capability[1]), memory.value, cuda))
