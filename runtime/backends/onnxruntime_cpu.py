"""The backend `onnxruntime-cpu`: graphs in ONNX Runtime, buffers in NumPy arrays, bound by address."""

from ...bundles.bundle import Bundle
from ...errors import BackendError
from ...install import cannot_import
from .host_memory import HostMemory
from .onnxruntime_session import Session


class OnnxRuntimeCpu(HostMemory):
    """A bundle's graphs in ONNX Runtime's CPU provider.

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
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._options.intra_op_num_threads = threads or 0
        # Each graph has its own threads, which after a run would spin on the cores that the next graph needs: letting
        # them stop halves the miniature's time, to the same bytes.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        self._graphs: dict[str, Session] = {}

    def load(self, graph: str) -> Session:
        if graph not in self._graphs:
            providers = ["CPUExecutionProvider"]
            self._graphs[graph] = Session(self._ort, self._bundle, graph, "cpu", providers, self._options)
        return self._graphs[graph]
