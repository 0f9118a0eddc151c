"""Control images that are in a GPU's memory already, as other libraries have them there."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import UserError
from ...messages import printable


class CudaArray(Protocol):
    """What has the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Address, shape, type and stream (Numba, "CUDA Array Interface", version 3)."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class DeviceImage:
    """An image in a GPU's memory. It is read there when a request runs, and must not change until that has ended.

    Attributes:
        address: of its first byte.
        width, height: in pixels.
        stream: the CUDA stream that writes it, which is waited for; None where it is written already.
        owner: keeps the memory alive.
    """

    address: int
    width: int
    height: int
    stream: int | None
    owner: object

    @property
    def shape(self) -> tuple[int, int, int]:
        """As an array of pixels has it: height, width, 3."""
        return self.height, self.width, 3

    def __repr__(self) -> str:
        return f"<{self.width}x{self.height} image on a GPU>"


def device_image(array: object, what: str) -> DeviceImage | None:
    """An array with the CUDA array interface (PyTorch, CuPy, Numba, JAX) as an image; None where it has none.

    Args:
        array: uint8 [H,W,3] or [1,H,W,3] in RGB, C-contiguous.
        what: what messages call it, as in `the seg image`.

    Raises:
        UserError: it is an array on a GPU, but no such image.
    """
    interface: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return None
    shape, kind = tuple(interface["shape"]), interface["typestr"]
    if kind != "|u1" or shape[-1:] != (3,) or len(shape) not in (3, 4) or shape[:-3] not in ((), (1,)):
        found = printable(f"{kind} {list(shape)}", 60)
        raise UserError(f"{what} on a GPU must be uint8 [height, width, 3], not {found}")
    if 0 in shape:
        raise UserError(f"{what} is empty: {shape[-2]}x{shape[-3]} pixels")
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))):
        raise UserError(f"{what} on a GPU must be contiguous, with the color as the last dimension: make a copy of it")
    return DeviceImage(int(interface["data"][0]), shape[-2], shape[-3], interface.get("stream"), array)
