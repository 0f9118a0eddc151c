"""What a request gives where its images stay in the GPU's memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.cuda import Cuda
from .backends.interface import Buffer, aligned
from .settings.request import ResolvedRequest


class DeviceArray:
    """A tensor in a GPU's memory, for libraries that read the CUDA array interface: PyTorch, CuPy, Numba, JAX.

    `torch.as_tensor(array, device="cuda")` shares its memory, which is freed with the last object that refers to it.

    Attributes:
        shape: its dimensions.
        dtype: of its values.
        device: the index of the GPU.
    """

    def __init__(self, backend: Cuda, buffer: Buffer) -> None:
        self._backend = backend
        self._buffer = buffer
        self.shape = buffer.shape
        self.dtype: np.dtype[Any] = buffer.dtype
        self.device = backend.index

    @classmethod
    def copy_of(cls, backend: Cuda, buffer: Buffer) -> "DeviceArray":
        """A copy of a buffer in memory of its own, made in the order of the launches."""
        own = backend.arena(aligned(buffer.nbytes))(buffer.shape, buffer.dtype.name)
        backend.copy(buffer, own)
        return cls(backend, own)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 (Numba, "CUDA Array Interface"): whoever reads it lets its own stream wait for `stream`."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._buffer.address, False),
            "strides": None,
            "stream": self._backend.stream,
            "version": 3,
        }

    def numpy(self) -> NDArray[Any]:
        """A copy on the host."""
        return self._backend.download(self._buffer)

    def __repr__(self) -> str:
        return f"<DeviceArray: {self.dtype} {list(self.shape)} on GPU {self.device}>"


@dataclass(frozen=True, eq=False)
class DeviceResult:
    """The images of a request, in the GPU's memory.

    Attributes:
        images: uint8 [B,H,W,3].
        latents: float32 [B,4,h,w], what the decoder was given (not divided by the scaling factor).
        request: as it was run: with every setting and seed.
        timings: seconds by stage, `total` included.
        notes: what was changed or dropped, one line each.
    """

    images: DeviceArray
    latents: DeviceArray
    request: ResolvedRequest
    timings: dict[str, float]
    notes: tuple[str, ...]
