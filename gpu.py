"""The NVIDIA GPU of this machine, asked of the driver itself: no package is needed and none is imported."""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

# CUdevice_attribute, cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One of the devices that CUDA_VISIBLE_DEVICES leaves.

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
        """The compute capability as in `sm90`."""
        return "sm{}{}".format(*self.compute_capability)


@dataclass(frozen=True)
class GpuSearch:
    """What the driver answered.

    Attributes:
        gpu: None where there is none.
        reason: why there is none, in a few words.
    """

    gpu: Gpu | None = None
    reason: str = ""


@cache
def find_gpu(device: int = 0) -> GpuSearch:
    """Asks the driver for the GPU of this index, once in a process."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return GpuSearch(reason=f"no NVIDIA driver ({library})")
    status = driver.cuInit(0)
    number = ctypes.c_int()
    if status or driver.cuDeviceGetCount(ctypes.byref(number)) or not number.value:
        return GpuSearch(reason=f"the NVIDIA driver finds no GPU (cuInit: {status})")
    if device >= number.value:
        return GpuSearch(reason=f"the NVIDIA driver finds no GPU {device}, only {number.value}, counted from 0")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return GpuSearch(Gpu(name.value.decode(), (capability[0], capability[1]), memory.value, cuda))
