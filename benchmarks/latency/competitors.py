"""What competes in `cnpp-trt bench`: each runs the same requests with the same weights, in a process of its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError
from ...gpu import find_gpu
from ...install import EXPORT_MODULES, cannot_import, found
from ...runtime.settings.request import ResolvedRequest
from .torch_settings import SETTINGS, Adapter

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class CompetitorSpec:
    """A competitor before it is started.

    Attributes:
        device: where it computes.
        precision: of its large networks; `bundle_precision` of the bundle that it needs, None for PyTorch.
        everywhere: whether it takes part in every case, and not in the base case alone: what compiles anew for each
            size would spend the benchmark on compiling, and a quantized bundle is of one size.
        only_named: whether it takes part only where it is asked for by its name.
    """

    name: str
    title: str
    device: Device
    precision: str
    bundle_precision: str | None = None
    everywhere: bool = True
    only_named: bool = False


COMPETITORS = (
    CompetitorSpec("pytorch", "PyTorch eager (diffusers)", "cpu", "fp32"),
    CompetitorSpec("pytorch-hint", "PyTorch eager, condition encoded once", "cpu", "fp32"),
    CompetitorSpec("pytorch-compile", "PyTorch, torch.compile (freezing)", "cpu", "fp32", everywhere=False),
    CompetitorSpec("onnxruntime-cpu", "cnpp-trt, onnxruntime-cpu", "cpu", "fp32", "fp32"),
    CompetitorSpec("openvino", "cnpp-trt, openvino", "cpu", "fp32", "fp32"),
    CompetitorSpec("openvino-bf16", "cnpp-trt, openvino bf16", "cpu", "bf16", "fp32"),
    CompetitorSpec("openvino-int8", "cnpp-trt, openvino int8", "cpu", "int8", "int8", False, True),
    CompetitorSpec("openvino-int8-bf16", "cnpp-trt, openvino int8-bf16", "cpu", "int8-bf16", "int8", False, True),
    CompetitorSpec("stable-diffusion-cpp", "stable-diffusion.cpp", "cpu", "fp16", None, False, True),
    CompetitorSpec("pytorch-cuda", "PyTorch eager (diffusers)", "gpu", "fp16"),
    CompetitorSpec("pytorch-cuda-channels-last", "PyTorch eager, channels-last", "gpu", "fp16"),
    CompetitorSpec("pytorch-cuda-hint", "PyTorch eager, channels-last, condition encoded once", "gpu", "fp16"),
    CompetitorSpec(
        "pytorch-cuda-reduce-overhead",
        "PyTorch, torch.compile (reduce-overhead, fullgraph)",
        "gpu",
        "fp16",
        None,
        False,
    ),
    CompetitorSpec(
        "pytorch-cuda-max-autotune", "PyTorch, torch.compile (max-autotune, fused QKV)", "gpu", "fp16", None, False
    ),
    CompetitorSpec("onnxruntime-cuda", "cnpp-trt, onnxruntime-cuda", "gpu", "fp16", "fp16"),
    CompetitorSpec("tensorrt", "cnpp-trt, TensorRT plans", "gpu", "fp16", "fp16"),
)
BY_NAME = {spec.name: spec for spec in COMPETITORS}

_NEEDS = {
    "pytorch": ("torch", "diffusers", "transformers"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "stable-diffusion-cpp": ("stable_diffusion_cpp", "torch", "diffusers", "transformers"),
}


def unavailable_reason(spec: CompetitorSpec) -> str:
    """Why this one cannot compete here, as far as is known before it is started; empty where nothing is."""
    search = find_gpu()
    if spec.device == "gpu" and search.gpu is None:
        return search.reason
    missing = [m for prefix, modules in _NEEDS.items() if spec.name.startswith(prefix) for m in modules]
    if absent := [m for m in missing if not found(m)]:
        return f"{', '.join(absent)} not installed"
    return ""


class Competitor(Protocol):
    """An opened contender."""

    def generate(self, request: ResolvedRequest) -> NDArray[np.uint8]:
        """The whole request: images uint8 [B,H,W,3] on the host."""
        ...

    def stages(self, request: ResolvedRequest) -> dict[str, float]:
        """Seconds by stage of the same request, launched one by one; `host` is the rest of its `whole`."""
        ...

    def extract(self, condition: str, image: NDArray[np.uint8]) -> float | None:
        """Seconds to extract the condition from a photo of the model's size; None where it has no extractor."""
        ...


@dataclass(frozen=True)
class WorkerConfig:
    """What a contender is opened with.

    bundles: folders by image size `WxH`; all of one model.
    recipe: the arguments of the `Checkpoint` that they were exported from; empty where PyTorch takes no part.
    """

    name: str
    bundles: dict[str, Path]
    recipe: dict[str, Any]
    threads: int | None

    def open(self) -> Competitor:
        """Starts the competitor.

        Raises:
            CnppError: it does not work here.
        """
        if self.name.startswith("pytorch"):
            return _PyTorch(self)
        if self.name == "stable-diffusion-cpp":
            return _stable_diffusion_cpp(self)
        return _Runtime(self)


class _Runtime:
    """This project's runtime: a pipeline for each size, one at a time."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._size = ""
        self._pipeline: Any = None
        self._open(next(iter(config.bundles)))

    def generate(self, request: ResolvedRequest) -> NDArray[np.uint8]:
        images: NDArray[np.uint8] = self._of(request)(request).images
        return images

    def stages(self, request: ResolvedRequest) -> dict[str, float]:
        from ...runtime.loop import run

        pipeline = self._of(request)
        start = time.perf_counter()
        ready = pipeline.prepare(request)
        program = ready.program
        run(program.launches(), ready.clock)
        pipeline.backend.download(program.workspace.image)
        found = ready.clock.seconds()
        whole = time.perf_counter() - start
        stages = {stage: s for stage, s in found.items() if stage not in ("load", "fill")}
        return {**stages, "host": whole - sum(stages.values())}

    def extract(self, condition: str, image: NDArray[np.uint8]) -> float | None:
        from ...runtime.control.extraction import can_extract

        if not can_extract(self._pipeline.bundle, condition):
            return None
        start = time.perf_counter()
        self._pipeline.extract(condition, image)
        return time.perf_counter() - start

    def _of(self, request: ResolvedRequest) -> Any:
        height, width = request.controls[0].pixels.shape[:2]
        if self._size != f"{width}x{height}":
            self._pipeline = None  # the weights of one size at a time
            self._open(f"{width}x{height}")
        return self._pipeline

    def _open(self, size: str) -> None:
        from ...runtime.pipeline import Pipeline

        name = self._config.name
        self._pipeline = Pipeline.open(
            self._config.bundles[size],
            "openvino" if name.startswith("openvino") else name,
            threads=self._config.threads if BY_NAME[name].device == "cpu" else None,
            precision="bf16" if name.endswith("-bf16") else None,
        )
        self._size = size


class _PyTorch:
    """diffusers, run as `torch_settings.SETTINGS` says."""

    def __init__(self, config: WorkerConfig) -> None:
        try:
            import torch

            from ...export.checkpoint import Checkpoint
            from ..pytorch import PyTorch
        except ImportError as e:
            raise BackendError(cannot_import("PyTorch", e, *EXPORT_MODULES)) from None
        self._torch = torch
        self._cuda = BY_NAME[config.name].device == "gpu"
        if self._cuda and not torch.cuda.is_available():
            raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device")
        if config.threads is not None and not self._cuda:
            torch.set_num_threads(config.threads)
        settings = SETTINGS[config.name]
        self._compiled = settings.compile is not None
        self._reference = PyTorch(
            Checkpoint(**config.recipe),
            torch.float16 if self._cuda else torch.float32,
            "cuda" if self._cuda else "cpu",
            Adapter(torch, settings),
        )
        self._extractors: dict[str, Any] = {}

    def generate(self, request: ResolvedRequest) -> NDArray[np.uint8]:
        with self._torch.no_grad():
            return self._reference.images(request)

    def stages(self, request: ResolvedRequest) -> dict[str, float]:
        pipeline = self._reference.pipeline(request)
        parts = {
            "text_encoder": pipeline.text_encoder,
            "controlnet": pipeline.controlnet,
            "unet": pipeline.unet,
            "vae_decoder": pipeline.vae.decoder,
        }
        if not self._compiled:  # inside a compiled ControlNet there is no embedding to be seen
            parts["hint"] = pipeline.controlnet.controlnet_cond_embedding
        timers = {stage: _ModuleTimer(self._torch, module, self._cuda) for stage, module in parts.items()}
        step = pipeline.scheduler.step
        update = _CallTimer(self._torch, step, self._cuda)
        pipeline.scheduler.step = update
        start = time.perf_counter()
        try:
            self.generate(request)
        finally:
            pipeline.scheduler.step = step
            found = {stage: timer.close() for stage, timer in timers.items()}
        whole = time.perf_counter() - start
        found["update"] = update.seconds()
        if "hint" in found:
            found["controlnet"] -= found["hint"]
        return {**found, "host": whole - sum(found.values())}

    def extract(self, condition: str, image: NDArray[np.uint8]) -> float | None:
        from ...export.extractors import open_extractor

        source = self._reference.checkpoint.resolved.extractor(condition)
        if source is None:
            return None
        if condition not in self._extractors:
            height, width = image.shape[:2]
            loaded = open_extractor(condition, source, width, height)
            self._extractors[condition] = loaded.to(self._reference.device)
        start = time.perf_counter()
        with self._torch.no_grad():
            pixels = self._torch.from_numpy(image[None]).to(self._reference.device)
            self._extractors[condition](pixels).cpu().numpy()
        return time.perf_counter() - start


def _stable_diffusion_cpp(config: WorkerConfig) -> Competitor:
    try:
        from ...export.checkpoint import Checkpoint
        from .sdcpp import StableDiffusionCpp
    except ImportError as e:
        raise BackendError(cannot_import("stable-diffusion.cpp", e, *EXPORT_MODULES)) from None
    return StableDiffusionCpp(Checkpoint(**config.recipe), config.threads)


class _CallTimer:
    """Times calls where the work is done: CUDA events on a GPU, else the wall clock."""

    def __init__(self, torch: Any, call: Callable[..., Any] | None, cuda: bool) -> None:
        self._torch, self._call, self._cuda = torch, call, cuda
        self._spans: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self._call is not None
        self.begin()
        result = self._call(*args, **kwargs)
        self.end()
        return result

    def begin(self, *_: Any) -> None:
        self._begin = self._now()

    def end(self, *_: Any) -> None:
        self._spans.append((self._begin, self._now()))

    def seconds(self) -> float:
        if not self._cuda:
            return float(sum(end - begin for begin, end in self._spans))
        self._torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _ModuleTimer(_CallTimer):
    """Times a module's forward calls until it is closed."""

    def __init__(self, torch: Any, module: Any, cuda: bool) -> None:
        super().__init__(torch, None, cuda)
        self._hooks = [
            module.register_forward_pre_hook(lambda *_: self.begin()),
            module.register_forward_hook(lambda *_: self.end()),
        ]

    def close(self) -> float:
        for hook in self._hooks:
            hook.remove()
        return self.seconds()
