"""Where graphs run: the small interface that every backend has, and the buffers that launches read and write."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Buffer:
    """A contiguous tensor at a fixed address.

    Attributes:
        address: of its first byte, in host or device memory.
        owner: what keeps the memory alive: as long as a launch holds the buffer, the memory cannot go or move.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> "Buffer":
        """The same memory seen in another shape."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot see {self.shape} as {shape}")
        return Buffer(self.address, shape, self.dtype, self.owner)


class Launch(Protocol):
    """A graph with every input and output bound to a buffer."""

    def __call__(self) -> None: ...


class LoadedGraph(Protocol):
    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        """A launch that reads and writes these buffers, by the graph's own tensor names."""
        ...


class Backend(Protocol):
    """Loads graphs and holds buffers. One thread at a time."""

    name: str

    def load(self, graph: str) -> LoadedGraph:
        """Loads a graph of the bundle; a second call returns the same one.

        Raises: BundleError, BackendError
        """
        ...

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """A new buffer, filled with zeros, aligned to 256 bytes as TensorRT wants it."""
        ...

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None: ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of the buffer's content."""
        ...
