"""Where graphs run: the small interface that every backend has, and the buffers that launches read and write."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..settings.options import CudaGraphs

# TensorRT wants its tensors at multiples of this; what every backend allocates is.
ALIGNMENT = 256


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
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> "Buffer":
        """The same memory seen in another shape."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"cannot see {self.shape} as {shape}")
        return Buffer(self.address, shape, self.dtype, self.owner)

    def view(self, offset: int, shape: tuple[int, ...], dtype: str) -> "Buffer":
        """A tensor that begins `offset` bytes after this one's start, inside it."""
        found = Buffer(self.address + offset, shape, np.dtype(dtype), self.owner)
        if offset + found.nbytes > self.nbytes:
            raise ValueError(f"{dtype} {shape} at {offset} is outside {self.shape}")
        return found

    def part(self, *index: int, shape: tuple[int, ...] | None = None) -> "Buffer":
        """The sub-tensor at `index` of the leading dimensions, or the first values of it in another shape."""
        own = self.shape[len(index) :]
        offset = 0
        for i, size in zip(index, self.shape, strict=False):
            if not 0 <= i < size:
                raise IndexError(f"{index} is outside {self.shape}")
            offset = offset * size + i
        shape = own if shape is None else shape
        if math.prod(shape) > math.prod(own):
            raise ValueError(f"cannot see {own} as {shape}")
        return Buffer(self.address + offset * math.prod(own) * self.dtype.itemsize, shape, self.dtype, self.owner)


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment: what a buffer takes of an arena."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# (shape, dtype) → a new buffer of zeros.
Allocate = Callable[[Sequence[int], str], Buffer]


class Launch(Protocol):
    """A graph with every input and output bound to a buffer, or several that were recorded as one."""

    def __call__(self) -> None:
        """Runs it, in the order of the calls."""
        ...


@dataclass(frozen=True)
class Step:
    """A launch with the stage it counts for.

    Attributes:
        graph: empty where it is none: copies, or a recording of several.
        inputs, outputs: what it reads and writes, by the graph's tensor names.
    """

    stage: str
    graph: str
    launch: Launch
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]


class LoadedGraph(Protocol):
    """A graph that a backend has loaded."""

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        """A launch that reads and writes these buffers, by the graph's own tensor names.

        Raises:
            BackendError: the graph was not built for these sizes.
        """
        ...


class Stopwatch(Protocol):
    """Times stages one after the other, where the work is done: on the GPU's own clock if it is done there."""

    def mark(self, stage: str) -> None:
        """The work since the last mark (or since the stopwatch was made) belongs to `stage`."""
        ...

    def seconds(self) -> dict[str, float]:
        """By stage, in the order of their first marks. Waits until the marked work is done."""
        ...


class Backend(Protocol):
    """Loads graphs and holds buffers. One thread at a time; launches run in the order in which they are called.

    Attributes:
        cuda_graphs: what is worth recording; `off` where the backend records nothing.
        ahead: how many steps may be launched before the first of them has ended: 0 where a launch returns when its
            work is done.
    """

    name: str
    cuda_graphs: CudaGraphs
    ahead: int

    def load(self, graph: str) -> LoadedGraph:
        """Loads a graph of the bundle; a second call returns the same one.

        Raises:
            BundleError, BackendError: the message says what is wrong and what to do.
        """
        ...

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Launch:
        """A launch of a graph that may run while those after it do, until `join`; as `bind` where that cannot be.

        It begins when what was launched before it has ended. What it writes must not be touched before `join`.

        Raises:
            BundleError, BackendError: as `load` and `bind`.
        """
        ...

    def join(self) -> None:
        """What is launched from now on begins when every launch `beside` has ended. Does not wait itself."""
        ...

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        """Bytes of device memory that these graphs and so many bytes of buffers would take, by part.

        On top of what is held already, and before anything is loaded. Empty where the device is the host.
        """
        ...

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None:
        """Asks, before anything of them is loaded, whether these graphs and so many bytes of buffers fit.

        Raises:
            DeviceMemoryError: with what is needed and what there is.
        """
        ...

    def release(self, graph: str | None = None) -> None:
        """Gives back the device memory of a graph, which is loaded again on demand, and of what no launch needs.

        Launches that were bound keep what they need until they go.
        """
        ...

    def arena(self, nbytes: int) -> Allocate:
        """One piece of memory to allocate buffers from, each aligned to `ALIGNMENT`.

        It lives as long as any of its buffers.

        Args:
            nbytes: what all its buffers take, rounded up to the alignment each.

        Raises:
            BackendError: there is not so much memory.
        """
        ...

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copies an array into a buffer, in the order of the launches."""
        ...

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A copy of the buffer's content, after everything that was launched before."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copies between buffers of one size, in the order of the launches."""
        ...

    def snapshot(self, buffer: Buffer) -> Callable[[], NDArray[Any]]:
        """Copies the buffer's content in the order of the launches, and does not wait for it.

        At most `ahead` + 1 snapshots may be under way.

        Returns:
            What waits for the copy, and for nothing that was launched after it, and gives it.
        """
        ...

    def record(self, launches: Sequence[Launch]) -> Launch:
        """One launch that does what these do, in their order. They must have run before.

        It holds the launches, and they their buffers: what it replays cannot be freed or moved while it lives.

        Raises:
            BackendError: these launches cannot be recorded; a backend whose `cuda_graphs` is `off` records none.
            DeviceMemoryError: there is no memory for the recording.
        """
        ...

    def stopwatch(self) -> Stopwatch:
        """A new stopwatch, which begins now."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of device memory by part when it was most; empty where the device is the host."""
        ...


class WallClock:
    """The stopwatch of backends whose launches return when their work is done."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """Adds the time since the last mark to `stage`."""
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """By stage."""
        return dict(self._seconds)
