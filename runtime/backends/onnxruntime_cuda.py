"""The backend `onnxruntime-cuda`: graphs in ONNX Runtime's CUDA provider, on our stream, bound by device address."""

from collections.abc import Sequence

from ...bundles.bundle import Bundle
from ...errors import BackendError, BundleError
from ...install import install_command
from .cuda import Cuda
from .interface import Launch
from .onnxruntime_session import Session


class OnnxRuntimeCuda(Cuda):
    """A bundle's graphs in ONNX Runtime's CUDA provider.

    Raises:
        BackendError: there is no GPU, or ONNX Runtime has no CUDA provider that works.
    """

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle, device: int = 0) -> None:
        super().__init__(device=device)
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                f"the backend {self.name} needs onnxruntime-gpu, which is not installed: {install_command('gpu')}"
            ) from None
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendError(f"this onnxruntime has no CUDA provider, onnxruntime-gpu has: {install_command('gpu')}")
        self._ort = onnxruntime
        self._bundle = bundle
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._run_options = onnxruntime.RunOptions()
        # Else every run ends with a wait for the GPU.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._graphs: dict[str, Session] = {}
        self.load("update")  # the smallest: a CUDA library that is missing shows now

    def load(self, graph: str) -> Session:
        if graph not in self._graphs:
            cuda = {
                "device_id": str(self._index),
                "user_compute_stream": str(self.stream),
                "use_tf32": "0",  # fp32 graphs are there because they must be exact
                "cudnn_conv_use_max_workspace": "1",
            }
            providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
            try:
                loaded = Session(
                    self._ort, self._bundle, graph, "cuda", providers, self._options, self._run_options, self._index
                )
            except BundleError as e:
                if self._graphs:
                    raise
                raise BackendError(f"ONNX Runtime's CUDA provider does not work here: {e}") from e
            if loaded.session.get_providers()[0] != "CUDAExecutionProvider":
                # It only logs that, and runs on the CPU.
                raise BackendError(
                    "ONNX Runtime fell back to the CPU: a CUDA or cuDNN library that onnxruntime-gpu needs is missing"
                )
            self._graphs[graph] = loaded
        return self._graphs[graph]

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        missing = [graph for graph in dict.fromkeys(graphs) if graph not in self._graphs]
        weights = sum(entry["size"] for graph in missing for entry in self._bundle.graph_files(graph).values())
        return {"weights": weights, **super().needed(graphs, nbytes)}  # its activations it allocates as it runs

    def release(self, graph: str | None = None) -> None:
        if graph in self._graphs:
            self.synchronize()
            del self._graphs[graph]

    def record(self, launches: Sequence[Launch]) -> Launch | None:
        return None  # its sessions allocate while they run, which a capture does not allow
