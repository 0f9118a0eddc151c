"""The GPU through cuda-python: one device, one stream, arenas, pinned memory, recordings. No PyTorch.

Nothing else in the package calls CUDA, and every call goes through `Cuda.call`.
"""

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, DeviceMemoryError
from ...gpu import Gpu, find_gpu
from ...install import cannot_import
from ...messages import one_line
from ..images.device_image import DeviceImage
from ..settings.options import CudaGraphs
from .cuda_memory import DeviceMemory, PinnedMemory, forget_recording, primary_context
from .host_memory import view
from .interface import Allocate, Buffer, Launch, LoadedGraph, aligned
from .side_stream import SideStream

# Pinned host memory that uploads and downloads go through. What a request uploads fits, so that nothing waits.
_STAGING = 16 << 20
# Device bytes that a node of a CUDA graph is expected to take; what it did take is counted afterwards.
_BYTES_PER_NODE = 10_000
# After these, every call of the process fails ("CUDA Driver API", CUresult: "the process must be terminated").
_STICKY = (
    "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_LAUNCH_TIMEOUT", "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_MISALIGNED_ADDRESS", "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC", "CUDA_ERROR_HARDWARE_STACK_ERROR", "CUDA_ERROR_ECC_UNCORRECTABLE",
)  # fmt: skip


class Cuda:
    """The part of a backend that both GPU backends share: memory, copies, recordings, and the GPU's own clock.

    Everything runs on one stream, in the order of the calls.

    Args:
        budget: device bytes that weights, activations, buffers and recordings may take together; None is all there
            are. What CUDA takes for itself (its context, kernels) is not in it.
        device: the index of the GPU.

    Attributes:
        stream: its handle.
        index: of the GPU.
        trace: names of the calls made, while it is a list (for tests and for looking).

    Raises:
        BackendError: there is no GPU or cuda-python is not installed.
    """

    cuda_graphs: CudaGraphs = "off"
    load: Callable[[str], LoadedGraph]
    # One step runs while the next is queued: the GPU never waits for the host.
    ahead = 1

    def __init__(self, budget: int | None = None, device: int = 0) -> None:
        search = find_gpu(device)
        if search.gpu is None:
            raise BackendError(f"no GPU to run on: {search.reason}")
        try:
            import cuda.bindings.driver as driver
            from cuda.core import Device  # pyright: ignore[reportAttributeAccessIssue]  # an extension without stubs
        except ImportError as e:
            raise BackendError(cannot_import("running on a GPU", e)) from None
        self.gpu: Gpu = search.gpu
        self.trace: list[str] | None = None
        self.driver = driver
        self.index = device
        self._thread = threading.local()
        self._broken: str | None = None
        self._process = os.getpid()
        self._device = Device(device)
        self.context = primary_context(driver, device)
        self._budget = budget
        self.allocated = 0
        self.recorded = 0  # device bytes that recordings take
        self.call(self._device.set_current)  # cuda.core asks for it once; the context is current here already
        self._stream = self.call(self._device.create_stream)
        self.stream = int(self._stream.handle)
        self._most: dict[str, int] = {}
        self._side: SideStream | None = None  # made when something first runs beside the stream
        self._staging = self._pinned(_STAGING)
        self._staged = 0
        self._snapshots: list[PinnedMemory] = []  # the next to be written to comes first

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the device's context current in this thread, and the caller's own again when the block ends.

        Raises:
            BackendError: CUDA cannot be used any more in this process.
        """
        if getattr(self._thread, "active", False):
            yield
            return
        if os.getpid() != self._process:
            raise BackendError(
                "this process was forked after CUDA was initialized, which CUDA does not support: open the pipeline in "
                "the new process, or start it with multiprocessing's method `spawn`"
            )
        if self._broken is not None:
            raise BackendError(f"{self._broken}; nothing runs on the GPU in this process any more: start it again")
        self._check(self.driver.cuCtxPushCurrent, self.context)
        self._thread.active = True
        try:
            yield
        finally:
            self._thread.active = False
            self.driver.cuCtxPopCurrent()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls cuda.core (which raises) or cuda.bindings (which returns a status first).

        Raises:
            BackendError: with CUDA's own words.
        """
        with self.active():
            return self._check(function, *arguments)

    def _check(self, function: Callable[..., Any], *arguments: Any) -> Any:
        name = getattr(function, "__name__", str(function))
        if self.trace is not None:
            self.trace.append(name)
        try:
            result = function(*arguments)
        except Exception as e:  # cuda.core's errors share no base class that it documents
            raise self._failure(name, one_line(e)) from e
        if not (isinstance(result, tuple) and result and isinstance(result[0], self.driver.CUresult)):
            return result
        status, *values = result
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise self._failure(name, status.name)
        return values[0] if len(values) == 1 else tuple(values)

    def _failure(self, name: str, reason: str) -> BackendError:
        if "CUDA_ERROR" not in reason:  # cuda.core does not always tell; after a sticky error any call does
            status = self.driver.cuMemGetInfo()[0]
            if status != self.driver.CUresult.CUDA_SUCCESS:
                reason = f"{reason} ({status.name})"
        if any(sticky in reason for sticky in _STICKY):
            self._broken = self._broken or f"CUDA failed in {name}: {reason}"
            return BackendError(f"{self._broken}: start the process again")
        full = "CUDA_ERROR_OUT_OF_MEMORY" in reason
        return (DeviceMemoryError if full else BackendError)(f"CUDA failed in {name}: {reason}")

    def free_memory(self) -> int:
        """Bytes of device memory that nobody uses now."""
        free: int = self.call(self.driver.cuMemGetInfo)[0]
        return free

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        return {"buffers": nbytes}

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None:
        parts = self.needed(graphs, nbytes)
        self.require(
            sum(parts.values()), " + ".join(f"{part} {_gib(size)}" for part, size in parts.items()) + " together"
        )

    def held(self) -> dict[str, int]:
        """Bytes of device memory that this backend holds now, by part."""
        return {"buffers": self.allocated} | ({"recordings": self.recorded} if self.recorded else {})

    def require(self, nbytes: int, what: str) -> None:
        """Checks that so much more device memory is free and left of the budget.

        Raises:
            DeviceMemoryError: it is not.
        """
        held = sum(self.held().values())
        if self._budget is not None and held + nbytes > self._budget:
            raise DeviceMemoryError(
                f"{what}: {_gib(nbytes)} of device memory is needed beside {_gib(held)} that is held, and the budget "
                f"is {_gib(self._budget)}: raise it to {_gib(held + nbytes)}, draw fewer images at once, or use a "
                "smaller size"
            )
        free = self.free_memory()
        if nbytes > free:
            raise DeviceMemoryError(
                f"{what}: {_gib(nbytes)} of device memory is needed, {_gib(free)} of {_gib(self.gpu.memory)} "
                f"is free on {self.gpu.name}: close other programs, draw fewer images at once, or use a smaller size"
            )

    def arena(self, nbytes: int) -> Allocate:
        if nbytes:
            self.require(nbytes, "the loop's buffers")
        memory = DeviceMemory(self, max(nbytes, 1))
        used = 0

        def allocate(shape: Sequence[int], dtype: str) -> Buffer:
            nonlocal used
            buffer = Buffer(memory.address + used, tuple(shape), np.dtype(dtype), memory)
            used += aligned(buffer.nbytes)
            if used > nbytes:
                raise ValueError(f"the arena has {nbytes} bytes, asked for {used}")
            return buffer

        return allocate

    @property
    def side(self) -> "SideStream":
        """The stream of launches that run beside the others."""
        if self._side is None:
            self._side = SideStream(self, self._device, self._stream)
        return self._side

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Launch:
        return self.load(graph).bind(buffers)

    def join(self) -> None:
        if self._side is not None:
            self._side.join()

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        if not buffer.nbytes:
            return
        self.join()  # a request that was cancelled may have left a launch that reads the buffer
        staged = self._stage(buffer)
        view(staged)[...] = array
        self.call(self.driver.cuMemcpyHtoDAsync, buffer.address, staged.address, buffer.nbytes, self.stream)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        if not buffer.nbytes:
            return np.zeros(buffer.shape, buffer.dtype)
        self.join()
        staged = self._stage(buffer)
        self.call(self.driver.cuMemcpyDtoHAsync, staged.address, buffer.address, buffer.nbytes, self.stream)
        self.synchronize()
        return view(staged).copy()

    def snapshot(self, buffer: Buffer) -> Callable[[], NDArray[Any]]:
        memory = self._snapshots.pop(0) if len(self._snapshots) > self.ahead else None
        if memory is None or memory.nbytes < buffer.nbytes:
            memory = self._pinned(max(buffer.nbytes, 1))
        self._snapshots.append(memory)
        self.join()
        copied = Buffer(memory.address, buffer.shape, buffer.dtype, memory)
        self.call(self.driver.cuMemcpyDtoHAsync, copied.address, buffer.address, buffer.nbytes, self.stream)
        event = self.call(self._stream.record)

        def read() -> NDArray[Any]:
            self.call(event.sync)
            return view(copied).copy()

        return read

    def copy(self, source: Buffer, target: Buffer) -> None:
        self.join()
        self.call(self.driver.cuMemcpyDtoDAsync, target.address, source.address, source.nbytes, self.stream)

    def read_image(self, image: DeviceImage, target: Buffer) -> None:
        """Copies an image of another library's, in the order of the launches, after what its stream was given."""
        if image.stream is not None:
            self.wait_for(image.stream)
        self.copy(Buffer(image.address, target.shape, target.dtype, image.owner), target)

    def wait_for(self, stream: int) -> None:
        """What is launched from now on waits for what another stream has been given so far; the host does not."""
        self._order(stream, self.stream)

    def let_wait(self, stream: int) -> None:
        """What another stream is given from now on waits for what was launched so far; the host does not."""
        self._order(self.stream, stream)

    def _order(self, first: int, then: int) -> None:
        event = self.call(self.driver.cuEventCreate, self.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            self.call(self.driver.cuEventRecord, event, first)
            self.call(self.driver.cuStreamWaitEvent, then, event, 0)
        finally:
            self.call(self.driver.cuEventDestroy, event)  # its resources go when it is no longer waited for

    def synchronize(self) -> None:
        self.join()
        self.call(self._stream.sync)
        self._staged = 0  # nothing reads from the pinned memory any more

    def record(self, launches: Sequence[Launch]) -> Launch:
        """Captures the launches into one CUDA graph; the capture executes nothing.

        Raises:
            BackendError: a launch cannot be captured.
            DeviceMemoryError: there is no memory for the graph, as far as can be told from its nodes.
        """
        self.synchronize()
        builder = self.call(self._stream.create_graph_builder)
        # What may not be captured must fail here, not in a replay: only other threads are left in peace.
        self.call(builder.begin_building, "thread_local")
        collecting = gc.isenabled()
        gc.disable()  # garbage may hold device memory, and to free some invalidates a capture
        try:
            for launch in launches:
                launch()
            self.join()  # a capture ends where everything has come together
            self.call(builder.end_building)
            nodes = self._nodes(builder)
            self.require(nodes * _BYTES_PER_NODE, f"a recording of {nodes} launches")
        except BaseException:
            self._abandon(builder)
            raise
        finally:
            if collecting:
                gc.enable()
        free = self.free_memory()
        graph = self.call(builder.complete)
        self.call(graph.upload, self._stream)
        self.synchronize()
        taken = max(free - self.free_memory(), 0)
        recording = _Recording(self, graph, self._stream, tuple(launches))
        weakref.finalize(recording, forget_recording, weakref.ref(self), taken).atexit = False
        self.recorded += taken
        self.took()
        return recording

    def stopwatch(self) -> "CudaStopwatch":
        return CudaStopwatch(self, self._device, self._stream)

    def memory(self) -> dict[str, int]:
        return dict(self._most)

    def took(self) -> None:
        """To be called when more device memory is held than before: remembers when it was most."""
        held = self.held()
        if sum(held.values()) >= sum(self._most.values()):
            self._most = held

    def _abandon(self, builder: Any) -> None:
        if self._side is not None:
            self._side.forget()
        with suppress(Exception):  # an invalidated capture says so when it ends; ending it is what frees the stream
            builder.end_building()
        with suppress(Exception):
            builder.close()

    def _nodes(self, builder: Any) -> int:
        graph = self.call(lambda: builder.graph_definition).handle
        return int(self.call(self.driver.cuGraphGetNodes, graph, 0)[1])

    def _stage(self, buffer: Buffer) -> Buffer:
        """Pinned memory of the buffer's size and shape, that no copy in flight uses."""
        nbytes = aligned(buffer.nbytes)
        if self._staged + nbytes > self._staging.nbytes:
            self.synchronize()
            if nbytes > self._staging.nbytes:
                self._staging = self._pinned(nbytes)
        staged = Buffer(self._staging.address + self._staged, buffer.shape, buffer.dtype, self._staging)
        self._staged += nbytes
        return staged

    def _pinned(self, nbytes: int) -> PinnedMemory:
        return PinnedMemory(self, nbytes)


@dataclass(frozen=True, eq=False)
class _Recording:
    """A CUDA graph. It holds the launches, and they their buffers and contexts, for as long as it can be replayed."""

    cuda: Cuda
    graph: Any
    stream: Any
    launches: tuple[Launch, ...]

    def __call__(self) -> None:
        self.cuda.call(self.graph.launch, self.stream)


class CudaStopwatch:
    """Marks are events on the stream: nothing waits for them until `seconds`."""

    def __init__(self, cuda: Cuda, device: Any, stream: Any) -> None:
        self._cuda = cuda
        self._device = device
        self._stream = stream
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, stage: str) -> None:
        event = self._cuda.call(self._device.create_event, {"timing_enabled": True})
        self._cuda.call(self._stream.record, event)
        self._marks.append((stage, event))

    def seconds(self) -> dict[str, float]:
        self._cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (stage, event) in zip(self._marks, self._marks[1:], strict=False):
            found[stage] = found.get(stage, 0.0) + (event - before) / 1e3
        return found


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
