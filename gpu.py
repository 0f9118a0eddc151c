"""The NVIDIA GPU of this machine, asked of the driver itself: no package is needed and none is imported."""

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache

# CUdevice_attribute, cuda.h
_MULTIPROCESSORS, _COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 16, 75, 76
# The oldest NVIDIA driver of each CUDA major version ("CUDA Compatibility", minor version compatibility).
_DRIVERS = {12: "525", 13: "580"}


@dataclass(frozen=True)
class Gpu:
    """One of the devices that CUDA_VISIBLE_DEVICES leaves.

    Attributes:
        compute_capability: (major, minor), (9, 0) on H100 and H200.
        memory: bytes.
        cuda: the newest CUDA version that the driver runs, as in `13.0`.
        multiprocessors: streaming multiprocessors, fewer on a MIG slice than on the whole GPU.
        uuid: as nvidia-smi prints it, `GPU-…`; empty where the driver does not say.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    cuda: str
    multiprocessors: int = 0
    uuid: str = ""

    @property
    def sm(self) -> str:
        """The compute capability as in `sm90`."""
        return "sm{}{}".format(*self.compute_capability)

    @property
    def kind(self) -> str:
        """What distinguishes GPUs whose plans differ, as in `sm90-132-nvidia-h100-80gb-hbm3`.

        The kernels that TensorRT chooses depend on the number of multiprocessors, on clocks and memory too: an L4 and
        an RTX 4090 are both sm89.
        """
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{self.sm}-{self.multiprocessors}-{name}"

    def too_old_for(self, cuda: int | None) -> str | None:
        """What to do where the driver is older than a package's CUDA.

        Args:
            cuda: the major version that the package was built for; None where it is not known.

        Returns:
            None where the driver is new enough.
        """
        if cuda is None or int(self.cuda.partition(".")[0]) >= cuda:
            return None
        newer = f" to {_DRIVERS[cuda]} or newer" if cuda in _DRIVERS else ""
        return f"it is built for CUDA {cuda} and this machine's driver runs CUDA {self.cuda}: update the driver{newer}"


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
    attributes = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR, _MULTIPROCESSORS):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        attributes.append(value.value)
    major, minor, multiprocessors = attributes
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    found = Gpu(name.value.decode(), (major, minor), memory.value, cuda, multiprocessors, _uuid(driver, device))
    return GpuSearch(found)


def _uuid(driver: ctypes.CDLL, device: int) -> str:
    """Of a MIG slice it is the slice's own, which nvidia-smi calls `MIG-…`."""
    content = ctypes.create_string_buffer(16)
    try:
        if driver.cuDeviceGetUuid_v2(content, device):
            return ""
    except AttributeError:  # a driver from before CUDA 11.4
        return ""
    digits = content.raw.hex()
    return "GPU-" + "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


if __name__ == "__main__":  # for the Makefile, before anything is installed
    print("gpu" if find_gpu().gpu else "cpu")
