"""The backend `onnxruntime-cuda`: graphs in ONNX Runtime's CUDA provider, on our stream, bound by device address."""

import ctypes
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...bundles.bundle import Bundle
from ...errors import BackendError, BundleError
from ...install import install_command
from .cuda import Cuda
from .elf import linked_libraries
from .interface import Launch
from .onnxruntime_attention import fuse_attention
from .onnxruntime_session import Session

logger = logging.getLogger(__name__)

# The provider, in the package's folder.
_PROVIDER = "capi/libonnxruntime_providers_cuda.so"
# It is not linked against cuDNN, and looks for it with the first convolution.
_CUDNN = "libcudnn.so.9"


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
        preload(onnxruntime)
        self._ort = onnxruntime
        self._bundle = bundle
        self._run_options = onnxruntime.RunOptions()
        # Else every run ends with a wait for the GPU.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._graphs: dict[str, Session] = {}
        # The smallest, and the smallest with a convolution: cuDNN is looked for when one is first needed.
        convolving = next((f"hint_{condition}" for condition in bundle.manifest.conditions), "vae_decoder")
        for graph in ("update", convolving):
            self._open(graph)

    def load(self, graph: str) -> Session:
        if graph not in self._graphs:
            self._graphs[graph] = self._session(graph)
        return self._graphs[graph]

    def _open(self, graph: str) -> None:
        """Loads a graph that shows whether this provider works.

        Raises:
            BackendError: it does not.
        """
        try:
            session = self.load(graph)
        except BundleError as e:
            raise BackendError(f"ONNX Runtime's CUDA provider does not work here: {e}") from e
        if session.session.get_providers()[0] != "CUDAExecutionProvider":
            # It only logs that, and runs on the CPU.
            missing = ", ".join(missing_libraries(self._ort)) or "a CUDA or cuDNN library"
            old = self.gpu.too_old_for(cuda_version(self._ort))
            helps = old or f"install what onnxruntime-gpu needs: {install_command('gpu')}"
            raise BackendError(f"ONNX Runtime fell back to the CPU: {missing} cannot be loaded; {helps}")

    def _session(self, graph: str) -> Session:
        cuda = {
            "device_id": str(self.index),
            "user_compute_stream": str(self.stream),
            "use_tf32": "0",  # fp32 graphs are there because they must be exact
            "cudnn_conv_use_max_workspace": "1",
            "prefer_nhwc": "1",  # the layout of tensor cores
            "arena_extend_strategy": "kSameAsRequested",  # not the next power of two
        }

        def opened(strict: bool) -> Session:
            options = self._ort.SessionOptions()
            options.log_severity_level = 3
            providers: list[Any] = [("CUDAExecutionProvider", cuda)]
            if strict:
                # Nodes without a kernel there would run on the CPU, with a copy there and back at each step.
                options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            else:
                providers.append("CPUExecutionProvider")
            return Session(
                self._ort,
                self._bundle,
                graph,
                "cuda",
                providers,
                options,
                self._run_options,
                self.index,
                self.active,
                rewrite=fuse_attention,
            )

        with self.active():
            try:
                return opened(strict=True)
            except BundleError as e:
                if not re.search("fallback to (the )?CPU EP", str(e)):
                    raise
            session = opened(strict=False)
            if session.session.get_providers()[0] == "CUDAExecutionProvider":
                logger.warning(f"{graph}: ONNX Runtime runs some of its nodes on the CPU, which is slow")
            return session

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        missing = [graph for graph in dict.fromkeys(graphs) if graph not in self._graphs]
        weights = sum(entry["size"] for graph in missing for entry in self._bundle.graph_files(graph).values())
        return {"weights": weights, **super().needed(graphs, nbytes)}  # its activations it allocates as it runs

    def release(self, graph: str | None = None) -> None:
        if graph in self._graphs:
            self.synchronize()
            del self._graphs[graph]

    def record(self, launches: Sequence[Launch]) -> Launch:
        raise BackendError("onnxruntime-cuda records nothing: its sessions allocate while they run")


def preload(onnxruntime: Any) -> None:
    """Loads CUDA's and cuDNN's libraries from the packages that `onnxruntime-gpu[cuda,cudnn]` installs.

    They are in no folder that the linker looks at. What is missing is printed, in color: `missing_libraries` says it.
    """
    if hasattr(onnxruntime, "preload_dlls"):
        # In its module alone: to redirect stdout would take the output of other threads along.
        onnxruntime.print = lambda *words, **options: None
        try:
            onnxruntime.preload_dlls(directory="")
        finally:
            del onnxruntime.print


def cuda_version(onnxruntime: Any) -> int | None:
    """The major CUDA version that the package was built for."""
    version = str(getattr(onnxruntime, "cuda_version", None) or "")
    major = version.partition(".")[0]
    return int(major) if major.isdigit() else None


def missing_libraries(onnxruntime: Any) -> list[str]:
    """The libraries of CUDA and cuDNN that the provider needs and that cannot be loaded.

    Which they are differs by version, so the provider's own file is asked.
    """
    linked = linked_libraries(Path(getattr(onnxruntime, "__file__", None) or "").parent / _PROVIDER)
    missing = []
    for name in [*linked, _CUDNN] if linked else []:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing
