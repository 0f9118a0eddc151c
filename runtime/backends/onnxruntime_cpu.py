"""The backend `onnxruntime-cpu`: graphs in ONNX Runtime, buffers in NumPy arrays, bound by address."""

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from ...bundles.bundle import Bundle
from ...errors import BackendError
from ...install import cannot_import
from .host_memory import OF_A_STEP, HostMemory, unloaded_in_the_loop
from .interface import Buffer, Launch, LoadedGraph
from .onnxruntime_attention import fuse_attention
from .onnxruntime_session import Session


class OnnxRuntimeCpu(HostMemory):
    """A bundle's graphs in ONNX Runtime's CPU provider.

    Memory: the sessions share one arena for what they compute with, which shrinks after the decoder and after whatever
    else is no part of the loop. Text encoder, image encoder and extractors of a large model are unloaded as soon as the
    loop begins, and loaded again when they are next needed.

    Args:
        threads: of ONNX Runtime; None uses every physical core.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise BackendError(cannot_import(f"the backend {self.name}", e)) from None
        self._ort = onnxruntime
        self._bundle = bundle
        self._threads = threads or 0
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._graphs: dict[str, Session | _Occasional] = {}
        _share_arena()

    def load(self, graph: str) -> LoadedGraph:
        if graph not in self._graphs:
            # Sessions refer to this object weakly: in a cycle, a dropped pipeline's would stay until collected.
            occasional = unloaded_in_the_loop(self._bundle, graph)
            self._graphs[graph] = _Occasional(weakref.proxy(self), graph) if occasional else self.open(graph)
        return self._graphs[graph]

    def release(self, graph: str | None = None) -> None:
        if graph is not None:
            self._graphs.pop(graph, None)

    def open(self, graph: str) -> Session:
        """A new session of a graph."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.intra_op_num_threads = self._threads
        # Each graph has its own threads, which after a run would spin on the cores that the next graph needs: letting
        # them stop halves the miniature's time, to the same bytes.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        # After its first run a session would allocate all that it needs as one block beside the parts that the arena
        # has from that run: 1 GiB of SD 1.5's UNet at 512x512.
        options.enable_mem_pattern = False
        # Weights that are brought into another layout live as long as the session: in the arena they would keep it
        # from shrinking.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        stays = graph.startswith(OF_A_STEP)
        unload_idle = weakref.WeakMethod(self._unload_idle)
        return Session(
            self._ort,
            self._bundle,
            graph,
            "cpu",
            ["CPUExecutionProvider"],
            options,
            None if stays else self._shrinking,
            active=(lambda: (unload_idle() or nullcontext)()) if stays else nullcontext,
            rewrite=fuse_attention,
        )

    def _unload_idle(self) -> AbstractContextManager[None]:
        for graph in self._graphs.values():
            if isinstance(graph, _Occasional):
                graph.unload()
        return nullcontext()


class _Occasional:
    """A graph that is loaded while it is used."""

    def __init__(self, backend: OnnxRuntimeCpu, name: str) -> None:
        self._backend = backend
        self._name = name
        # At once: what is wrong with it is known before anything runs.
        self._session: Session | None = backend.open(name)

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        bound = dict(buffers)

        def launch() -> None:
            self._loaded().bind(bound)()

        return launch

    def unload(self) -> None:
        self._session = None

    def _loaded(self) -> Session:
        if self._session is None:
            self._session = self._backend.open(self._name)
        return self._session


@cache
def _share_arena() -> None:
    """Gives this process one arena that every session may use, instead of one for each that keeps its largest size."""
    import onnxruntime as ort

    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # By powers of two: pieces of the sizes that are asked for fit nothing else later. SD 1.5's decoder at 512x512 takes
    # 1.3 GiB so, and 1.8 the other way.
    growing: Any = {"arena_extend_strategy": 0, "max_mem": 0}
    ort.create_and_register_allocator(where, ort.OrtArenaCfg(growing))
