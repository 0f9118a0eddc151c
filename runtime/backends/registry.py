"""Which backend a bundle runs on, and why."""

from collections.abc import Callable

from ...bundles.bundle import Bundle
from ...errors import BackendError, UserError
from ...gpu import find_gpu
from ...install import found
from ...messages import one_line
from ..settings.options import RuntimeOptions
from .interface import Backend


def open_backend(bundle: Bundle, options: RuntimeOptions) -> tuple[Backend, str]:
    """The backend that `options` ask for, and in a few words why it was chosen.

    `auto` takes `tensorrt` where there is an NVIDIA GPU and a plan for every graph of the bundle, else
    `onnxruntime-cuda` where that works, else `onnxruntime-cpu`, else `openvino`. With a `vram_budget` it takes
    `tensorrt` or none: no other backend can keep one.

    Raises:
        UserError: the options do not fit the bundle or this machine.
        BackendError: the backend does not work here.
    """
    name, precision, own = options.backend, options.precision, bundle.manifest.precision
    if precision not in (None, own) and name != "openvino":
        raise UserError(f"{bundle.folder} is {own} and is computed in that, not in {precision}: give another bundle")
    if bundle.manifest.number_format == "fp8" and name == "openvino" and precision == "bf16":
        raise UserError("openvino computes an fp8 bundle in fp32 alone: leave the precision out")
    if precision == "fp16" and name == "openvino":
        raise UserError("openvino computes in fp32 or bf16, not in fp16")

    def tensorrt() -> Backend:
        from .tensorrt import TensorRt

        return TensorRt(bundle, options.plans, options.vram_budget, options.device, options.cuda_graphs)

    def onnxruntime_cuda() -> Backend:
        from .onnxruntime_cuda import OnnxRuntimeCuda

        return OnnxRuntimeCuda(bundle, options.device)

    def onnxruntime_cpu() -> Backend:
        from .onnxruntime_cpu import OnnxRuntimeCpu

        return OnnxRuntimeCpu(bundle, options.threads)

    def openvino() -> Backend:
        from .openvino import OpenVino

        return OpenVino(bundle, options.threads, "bf16" if precision == "bf16" else "f32")

    factories: dict[str, Callable[[], Backend]] = {
        "tensorrt": tensorrt,
        "onnxruntime-cuda": onnxruntime_cuda,
        "onnxruntime-cpu": onnxruntime_cpu,
        "openvino": openvino,
    }
    if name != "auto":
        return factories[name](), "asked for"
    search = find_gpu(options.device)
    gpu = search.gpu
    if options.vram_budget is not None:
        if gpu is None:
            raise UserError(f"a vram budget is for a GPU: {search.reason}: leave it out to draw on the CPU")
        return tensorrt(), f"on {gpu.name}"
    reasons: list[str] = []
    if gpu is not None:
        for candidate in ("tensorrt", "onnxruntime-cuda"):
            try:
                return factories[candidate](), "; ".join([f"on {gpu.name}", *reasons])
            except UserError:
                raise  # a damaged bundle, say, runs nowhere
            except Exception as e:  # whatever vendors' libraries raise: the next candidate may work
                reasons.append(f"not {candidate}: {e if isinstance(e, BackendError) else one_line(e)}")
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
