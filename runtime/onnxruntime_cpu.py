"""The backend `onnxruntime-cpu`: graphs in ONNX Runtime, buffers in NumPy arrays, bound by address."""

from collections.abc import Mapping
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError, BundleError
from .backend import Buffer
from .host_memory import HostMemory


class OnnxRuntimeCpu(HostMemory):
    """Args: threads: of ONNX Runtime; None leaves it to use every physical core."""

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendError("onnxruntime is not installed: pip install 'cnpp-trt[cpu]'") from None
        self._ort = onnxruntime
        self._bundle = bundle
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._options.intra_op_num_threads = threads or 0
        # Each graph has its own threads, which after a run would spin on the cores that the next graph needs: letting
        # them stop halves the miniature's time, to the same bytes.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        self._graphs: dict[str, _Session] = {}

    def load(self, graph: str) -> "_Session":
        if graph not in self._graphs:
            path = self._bundle.folder / self._bundle.graph(graph).file
            try:
                session = self._ort.InferenceSession(str(path), self._options, providers=["CPUExecutionProvider"])
            except Exception as e:  # ONNX Runtime's exceptions share no base class
                raise BundleError(
                    f"ONNX Runtime cannot load {path} ({' '.join(str(e).split())[:200]}): "
                    f"check the bundle with `cnpp-trt verify {self._bundle.folder}`"
                ) from e
            self._graphs[graph] = _Session(graph, session)
        return self._graphs[graph]


class _Session:
    def __init__(self, name: str, session: Any) -> None:
        self._name = name
        self._session = session
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def bind(self, buffers: Mapping[str, Buffer]) -> "_Launch":
        binding = self._session.io_binding()
        for name in self._inputs:
            b = buffers[name]
            binding.bind_input(name, "cpu", 0, b.dtype.type, list(b.shape), b.address)
        for name in self._outputs:
            b = buffers[name]
            binding.bind_output(name, "cpu", 0, b.dtype.type, list(b.shape), b.address)
        return _Launch(self._name, self._session, binding, tuple(buffers.values()))


class _Launch:
    def __init__(self, name: str, session: Any, binding: Any, buffers: tuple[Buffer, ...]) -> None:
        self._name = name
        self._session = session
        self._binding = binding
        self._buffers = buffers  # held so that no address dies before the launch

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {' '.join(str(e).split())[:300]}") from e
