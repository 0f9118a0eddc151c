"""Buffers in the host's own memory, for the backends that run on the CPU."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundles.bundle import Bundle
from ...errors import BackendError
from ..settings.options import CudaGraphs
from .interface import ALIGNMENT, Allocate, Buffer, Launch, LoadedGraph, WallClock

# What a step launches. The others run once for each prompt, control image or picture.
OF_A_STEP = ("unet", "update", "controlnet_", "add_residuals")
# Above this, memory is saved at the price of time: SD 1.5's text encoder has 470 MiB, which is worth loading again.
LARGE = 64 << 20


def large_weights(bundle: Bundle, graph: str) -> bool:
    """Whether a graph's weights are worth the time that saving their memory takes."""
    return sum(file["size"] for file in bundle.graph_files(graph).values()) > LARGE


def unloaded_in_the_loop(bundle: Bundle, graph: str) -> bool:
    """Text encoder, image encoder and extractors of a large model."""
    return large_weights(bundle, graph) and not graph.startswith((*OF_A_STEP, "vae_decoder"))


class HostMemory:
    """The part of a backend that every CPU backend shares: buffers, copies, and a clock for launches that block."""

    load: Callable[[str], LoadedGraph]

    cuda_graphs: CudaGraphs = "off"
    ahead = 0

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Launch:
        return self.load(graph).bind(buffers)

    def join(self) -> None: ...

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        return {}

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None: ...

    def release(self, graph: str | None = None) -> None: ...

    def arena(self, nbytes: int) -> Allocate:
        return _allocate  # the host's own allocator serves as well as any arena

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        view(buffer)[...] = array

    def download(self, buffer: Buffer) -> NDArray[Any]:
        return view(buffer).copy()

    def copy(self, source: Buffer, target: Buffer) -> None:
        view(target)[...] = view(source)

    def snapshot(self, buffer: Buffer) -> Callable[[], NDArray[Any]]:
        copied = self.download(buffer)
        return lambda: copied

    def record(self, launches: Sequence[Launch]) -> Launch:
        raise BackendError("CUDA graphs are for a GPU: nothing is recorded on a CPU")

    def stopwatch(self) -> WallClock:
        return WallClock()

    def memory(self) -> dict[str, int]:
        return {}


def view(buffer: Buffer) -> NDArray[Any]:
    """The buffer's memory as an array. It must be in the host's memory, and be held while the array is used."""
    raw = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address)
    return np.ndarray(buffer.shape, buffer.dtype, memoryview(raw))


def _allocate(shape: Sequence[int], dtype: str) -> Buffer:
    kind = np.dtype(dtype)
    buffer = Buffer(0, tuple(shape), kind, None)
    memory = np.zeros(buffer.nbytes + ALIGNMENT, np.uint8)
    return Buffer(-(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT, buffer.shape, kind, memory)
