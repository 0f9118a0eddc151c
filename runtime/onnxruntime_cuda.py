"""The backend `onnxruntime-cuda`: graphs in ONNX Runtime's CUDA provider, on our stream, bound by device address."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError, BundleError
from .backend import Buffer, Launch
from .cuda import Cuda


class OnnxRuntimeCuda(Cuda):
    """Raises: BackendError where there is no GPU, or ONNX Runtime has no CUDA provider that works."""

    name = "onnxruntime-cuda"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise BackendError("onnxruntime-gpu is not installed: pip install 'cnpp-trt[gpu]'") from None
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise BackendError(
                "this onnxruntime has no CUDA provider: pip uninstall onnxruntime, then pip install 'cnpp-trt[gpu]'"
            )
        self._ort = onnxruntime
        self._bundle = bundle
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        self._run_options = onnxruntime.RunOptions()
        # Else every run ends with a wait for the GPU.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._graphs: dict[str, _Session] = {}
        self.load("update")  # the smallest: a CUDA library that is missing shows now

    def load(self, graph: str) -> "_Session":
        if graph not in self._graphs:
            path = self._bundle.folder / self._bundle.graph(graph).file
            provider = {
                "device_id": "0",
                "user_compute_stream": str(self.stream),
                "use_tf32": "0",  # fp32 graphs are there because they must be exact
                "cudnn_conv_use_max_workspace": "1",
            }
            try:
                session = self._ort.InferenceSession(
                    str(path), self._options, providers=[("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
                )
            except Exception as e:  # ONNX Runtime's exceptions share no base class
                raise BundleError(
                    f"ONNX Runtime cannot load {path} ({' '.join(str(e).split())[:200]}): "
                    f"check the bundle with `cnpp-trt verify {self._bundle.folder}`"
                ) from e
            if session.get_providers()[0] != "CUDAExecutionProvider":
                # It only logs that, and runs on the CPU.
                raise BackendError(
                    "ONNX Runtime fell back to the CPU: a CUDA or cuDNN library that onnxruntime-gpu needs is missing"
                )
            self._graphs[graph] = _Session(self, graph, session)
        return self._graphs[graph]

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None:
        files = self._bundle.manifest.files
        weights = sum(
            files.get(f"{self._bundle.graph(graph).file}.data", {}).get("size", 0)
            for graph in dict.fromkeys(graphs)
            if graph not in self._graphs
        )
        self.require(weights + nbytes, f"{self._bundle.folder.name}: weights and buffers")

    def record(self, launches: Sequence[Launch]) -> Launch | None:
        return None  # its sessions allocate while they run, which a capture does not allow


class _Session:
    def __init__(self, backend: OnnxRuntimeCuda, name: str, session: Any) -> None:
        self._backend = backend
        self._name = name
        self._session = session
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]

    def bind(self, buffers: Mapping[str, Buffer]) -> "_Launch":
        binding = self._session.io_binding()
        for name in self._inputs:
            b = buffers[name]
            binding.bind_input(name, "cuda", 0, b.dtype.type, list(b.shape), b.address)
        for name in self._outputs:
            b = buffers[name]
            binding.bind_output(name, "cuda", 0, b.dtype.type, list(b.shape), b.address)
        return _Launch(self._backend, self._name, self._session, binding, tuple(buffers.values()))


class _Launch:
    def __init__(
        self, backend: OnnxRuntimeCuda, name: str, session: Any, binding: Any, buffers: tuple[Buffer, ...]
    ) -> None:
        self._backend = backend
        self._name = name
        self._session = session
        self._binding = binding
        self._buffers = buffers  # held so that no address dies before the launch

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._backend._run_options)
        except Exception as e:
            raise BackendError(f"ONNX Runtime failed in {self._name}: {' '.join(str(e).split())[:300]}") from e
