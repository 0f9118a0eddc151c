"""Which backend a bundle runs on, and why."""

from collections.abc import Callable
from pathlib import Path

from ...bundles.bundle import Bundle
from ...errors import BackendError, UserError
from ...gpu import find_gpu
from ...install import found
from ...messages import printable, unknown_choice
from .interface import Backend
from .openvino import PRECISIONS as OPENVINO_PRECISIONS

MAX_THREADS = 1024
BACKENDS = ("auto", "tensorrt", "onnxruntime-cuda", "onnxruntime-cpu", "openvino")


def open_backend(
    bundle: Bundle,
    name: str = "auto",
    *,
    threads: int | None = None,
    openvino_precision: str | None = None,
    plans: Path | None = None,
    vram_budget: int | None = None,
) -> tuple[Backend, str]:
    """A backend by name, and in a few words why it was chosen.

    `auto` takes `tensorrt` where there is an NVIDIA GPU and a plan for every graph of the bundle, else
    `onnxruntime-cuda` where that works, else `onnxruntime-cpu`, else `openvino`. With a `vram_budget` it takes
    `tensorrt` or none: no other backend can keep one.

    Raises: UserError for an argument that cannot be used, BackendError where the backend does not work here.
    """
    if name not in BACKENDS:
        raise unknown_choice("backend", name, BACKENDS)
    if threads is not None and (
        not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
    ):
        raise UserError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {printable(repr(threads), 40)}")
    if name == "openvino" and openvino_precision == "fp32":  # as everything but OpenVINO calls it
        openvino_precision = "f32"
    if openvino_precision is not None and (name != "openvino" or openvino_precision not in OPENVINO_PRECISIONS):
        raise UserError(
            f"the backend {name} has no precision {openvino_precision!r}: openvino has fp32 and bf16, "
            "every other runs its bundle's, fp32 or fp16"
        )

    if vram_budget is not None:
        if not isinstance(vram_budget, int) or isinstance(vram_budget, bool) or vram_budget < 1:
            raise UserError(f"a vram budget must be a whole number of bytes above 0, not {vram_budget!r}")
        if name not in ("auto", "tensorrt"):
            why = "allocates while it runs" if name == "onnxruntime-cuda" else "runs on the CPU"
            raise UserError(f"{name} {why} and cannot keep a vram budget: leave it out, or take the backend tensorrt")

    def tensorrt() -> Backend:
        from .tensorrt import TensorRt

        return TensorRt(bundle, plans, vram_budget)

    def onnxruntime_cuda() -> Backend:
        from .onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda(bundle)

    def onnxruntime_cpu() -> Backend:
        from .onnxruntime_cpu import OnnxRuntimeCpu

        return OnnxRuntimeCpu(bundle, threads)

    def openvino() -> Backend:
        from .openvino import OpenVino

        return OpenVino(bundle, threads, openvino_precision or "f32")

    makers: dict[str, Callable[[], Backend]] = {
        "tensorrt": tensorrt,
        "onnxruntime-cuda": onnxruntime_cuda,
        "onnxruntime-cpu": onnxruntime_cpu,
        "openvino": openvino,
    }
    if name != "auto":
        return makers[name](), "asked for"
    search = find_gpu()
    gpu = search.gpu
    if vram_budget is not None:
        if gpu is None:
            raise UserError(f"a vram budget is for a GPU: {search.reason}: leave it out to draw on the CPU")
        return tensorrt(), f"on {gpu.name}"
    reasons: list[str] = []
    if gpu is not None:
        for candidate in ("tensorrt", "onnxruntime-cuda"):
            try:
                return makers[candidate](), "; ".join([f"on {gpu.name}", *reasons])
            except BackendError as e:
                reasons.append(f"not {candidate}: {e}")
    else:
        reasons.append(search.reason)
    try:
        return onnxruntime_cpu(), "; ".join(reasons)
    except BackendError as e:
        # Whoever has no ONNX Runtime is told how to get it, unless the other backend for CPUs is there.
        if not found("openvino"):
            raise
        return openvino(), "; ".join([*reasons, f"not onnxruntime-cpu: {e}"])


def preferred_precisions(backend: str) -> tuple[str, ...]:
    """Which of a model's bundles a backend would rather have: fp16 where a GPU runs it."""
    on_gpu = backend in ("tensorrt", "onnxruntime-cuda") or (backend == "auto" and find_gpu().gpu is not None)
    return ("fp16", "fp32") if on_gpu else ("fp32", "fp16")
