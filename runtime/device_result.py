"""What a request gives where its images stay in the GPU's memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.cuda import Cuda
from .backends.interface import Buffer, aligned
from .dlpack import CUDA, capsule
from .preparing import Ran
from .settings.request import ResolvedRequest


class DeviceArray:
    """A tensor in a GPU's memory, for libraries that read DLPack or the CUDA array interface.

    `torch.from_dlpack(array)`, `cupy.from_dlpack(array)` and `jax.dlpack.from_dlpack(array)` share its memory, which is
    freed with the last object that refers to it. Their streams wait for the images, the host does not.

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

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """The memory as a DLPack capsule (Python array API standard, `array.__dlpack__`).

        Args:
            stream: the consumer's, which will wait: 1 or None for the legacy default stream, 2 for the one of the
                thread, -1 where nothing is to wait.
            max_version: of DLPack; the capsule is one that every version reads.
            dl_device: where the consumer wants it.
            copy: whether the consumer wants a copy.

        Raises:
            BufferError: a copy or another device is asked for.
        """
        if copy:
            raise BufferError("DeviceArray shares its memory: make the copy of what was made of it")
        if dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(f"DeviceArray is on GPU {self.device}: take DeviceArray.numpy() for one on the host")
        if stream != -1:
            self._backend.let_wait(1 if stream is None else stream)
        return capsule(self._buffer.address, self.shape, self.dtype, self.__dlpack_device__(), self._buffer)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The type of the device (2 is CUDA) and its index."""
        return CUDA, self.device

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

    @classmethod
    def of(cls, backend: Cuda, ran: Ran) -> "DeviceResult":
        """Copies what a program has made for one request."""
        w, ready = ran.ready.program.workspace, ran.ready
        images, latents = DeviceArray.copy_of(backend, w.image), DeviceArray.copy_of(backend, w.latents)
        notes = (*ready.notes[0], *ran.remarks)
        return cls(images, latents, ready.plans[0].request, ran.timings(), notes)
