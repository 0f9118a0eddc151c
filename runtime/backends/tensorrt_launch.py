"""TensorRT's execution contexts, and launches that bind them to buffers."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .cuda_memory import free_with
from .interface import Buffer

if TYPE_CHECKING:
    from .tensorrt import TensorRt, _Engine


class Context:
    """An execution context, the scratch that was large enough for it when it was made, and which stream it is for."""

    def __init__(self, context: Any, scratch: Buffer, engine: "_Engine", beside: bool) -> None:
        self._held = [context]
        free_with(self, engine._backend, self._held)
        self.scratch = scratch
        self.beside = beside
        self.engine = engine  # the engine must outlive its contexts
        self.launches: weakref.WeakSet[TensorRtLaunch] = weakref.WeakSet()
        # Weakly: a context lives on, and must not keep a launch's buffers with it.
        self.bound: weakref.ref[TensorRtLaunch] | None = None
        context.set_device_memory(scratch.address, scratch.nbytes)

    @property
    def context(self) -> Any:
        return self._held[0]


class TensorRtLaunch:
    """A context that is given the addresses of its buffers where another launch had it since."""

    def __init__(self, backend: "TensorRt", name: str, context: Context, buffers: Mapping[str, Buffer]) -> None:
        self._backend = backend
        self._name = name
        self._context = context
        self._buffers = dict(buffers)  # held so that no address dies before the launch
        context.launches.add(self)

    def require_capturable(self) -> None:
        if not self._context.context.is_stream_capturable(self._backend.stream):
            raise self._backend.refuse(f"cannot capture {self._name} on {self._backend.gpu.name}")

    def __call__(self) -> None:
        with self._backend.active():
            self._enqueue()

    def _enqueue(self) -> None:
        context = self._context
        if context.bound is None or context.bound() is not self:
            for name, buffer in self._buffers.items():
                if not context.context.set_tensor_address(name, buffer.address):
                    raise self._backend.refuse(f"refuses the buffer of {name} in {self._name}")
            context.bound = weakref.ref(self)
        backend = self._backend
        if context.beside:
            backend.side.fork()
        if not context.context.execute_async_v3(backend.side.handle if context.beside else backend.stream):
            context.bound = None
            raise self._backend.refuse(f"failed in {self._name}")
