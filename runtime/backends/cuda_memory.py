"""Device memory and pinned memory, each freed in its own CUDA context when the last object that uses it goes."""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import BackendError

if TYPE_CHECKING:
    from .cuda import Cuda


class DeviceMemory:
    """Device memory. It is freed when the last buffer of it is gone, and thereby after every launch that holds one."""

    def __init__(self, cuda: "Cuda", nbytes: int) -> None:
        driver = cuda.driver
        self.nbytes = nbytes
        self.address = int(cuda.call(driver.cuMemAlloc, nbytes))
        weakref.finalize(self, _free_device, weakref.ref(cuda), cuda.context, self.address, nbytes).atexit = False
        cuda.allocated += nbytes
        cuda.took()
        cuda.call(driver.cuMemsetD8Async, self.address, 0, nbytes, cuda.stream)


class PinnedMemory:
    """Host memory that copies to and from the device may use while other work runs. Freed with its last user."""

    def __init__(self, cuda: "Cuda", nbytes: int) -> None:
        driver = cuda.driver
        self.nbytes = nbytes
        self.address = int(cuda.call(driver.cuMemHostAlloc, nbytes, 0))
        weakref.finalize(self, free_in, cuda.context, driver.cuMemFreeHost, self.address).atexit = False


def primary_context(driver: Any, device: int) -> Any:
    """The device's own context, which cuda.core, TensorRT and ONNX Runtime share; whatever is current stays so.

    Raises:
        BackendError: the device cannot be used.
    """
    driver.cuInit(0)
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA cannot use GPU {device}: {status.name}")
    return context


def free_in(context: Any, free: Callable[..., object], *arguments: Any) -> None:
    """Frees something in its context, whatever is current in this thread: the garbage collector may run in any."""
    import cuda.bindings.driver as driver

    if driver.cuCtxPushCurrent(context)[0] == driver.CUresult.CUDA_SUCCESS:
        free(*arguments)
        driver.cuCtxPopCurrent()


def free_with(owner: object, cuda: "Cuda", objects: list[Any]) -> None:
    """Has the objects of a library dropped in their CUDA context when `owner` goes.

    Args:
        objects: held by nobody else.
    """
    weakref.finalize(owner, free_in, cuda.context, objects.clear).atexit = False


def _free_device(cuda: "weakref.ref[Cuda]", context: Any, address: int, nbytes: int) -> None:
    import cuda.bindings.driver as driver

    free_in(context, driver.cuMemFree, address)  # waits for work that is under way
    owner = cuda()
    if owner is not None:
        owner.allocated -= nbytes


def forget_recording(cuda: "weakref.ref[Cuda]", nbytes: int) -> None:
    """What a recording took was given back."""
    owner = cuda()
    if owner is not None:
        owner.recorded -= nbytes
