"""What each optimization of the runtime is worth: one switched on after the other, from the loop that people write.

A measurement goes from the encoded prompt, the control image and the noise on the host to the image on the host: encode
the condition, denoise, decode. The text encoder is left out: it is the same for all.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundles.bundle import Bundle
from ...errors import BackendError, CnppError, UserError
from ...gpu import find_gpu
from ...runtime.pipeline import Pipeline
from ...runtime.recordings import Recordings
from ...runtime.settings.options import CudaGraphs, Precision
from ...runtime.settings.request import ResolvedRequest
from ..records import Case, OptimizationResult, Waterfall
from ..requests import make_requests
from ..statistics import paired_ratio, summarize
from .competitors import Device
from .host_loop import HostLoop, HostLoopOutput, Sessions

logger = logging.getLogger(__name__)

Generate = Callable[[], HostLoopOutput]

# Seconds before each run: ONNX Runtime's threads that spin after a run have gone to sleep by then. So the miniature's
# runs take on two cores what they take alone; without a pause the first one after `update_graph` took 1.4 times that.
_PAUSE = 0.05

# Largest relative L2 difference of the final latents to the first optimization's. Rounding leaves some 1e-6 in fp32 and
# 1e-2 in half precision.
_TOLERANCE = {"fp32": 1e-3, "half": 1e-1}


@dataclass(frozen=True)
class Optimization:
    """One technique of the runtime, measured with and without it.

    Attributes:
        open: makes what runs, given the bench that it is measured on; a BackendError where it cannot work here.
        device: the only one that it works on.
        half: whether it computes in half precision whatever the bundle's.
    """

    name: str
    title: str
    open: Callable[["_Bench"], Generate]
    device: Device | None = None
    half: bool = False


# Techniques of the loop on the host, each with those before it.
_ON_HOST = ("hint", "prompt", "time", "prefix", "update")

OPTIMIZATIONS = (
    Optimization("naive", "Loop on the host, ONNX Runtime as it comes", lambda b: b.host_loop(b.plain, "")),
    Optimization("hint_hoisted", "Condition encoded once", lambda b: b.host_loop(b.plain, "hint")),
    Optimization(
        "prompt_hoisted", "Keys and values of the prompt computed once", lambda b: b.host_loop(b.plain, "prompt")
    ),
    Optimization("time_hoisted", "Time embeddings of all steps at once", lambda b: b.host_loop(b.plain, "time")),
    Optimization("shared_prefix", "What both prompts share computed once", lambda b: b.host_loop(b.plain, "prefix")),
    Optimization("update_graph", "Guidance and sampler in one graph", lambda b: b.host_loop(b.plain, "update")),
    Optimization("session_options", "The runtime's session options", lambda b: b.host_loop(b.tuned, "update")),
    Optimization("io_binding", "Inputs and outputs bound to buffers", lambda b: b.program(b.onnxruntime)),
    Optimization("plan", "TensorRT plans", lambda b: b.program("tensorrt"), "gpu"),
    Optimization(
        "graph_per_engine", "A CUDA graph for each launch", lambda b: b.program("tensorrt", cuda_graphs="launch"), "gpu"
    ),
    Optimization(
        "graph_per_step",
        "A CUDA graph for each kind of step",
        lambda b: b.program("tensorrt", cuda_graphs="step"),
        "gpu",
    ),
    Optimization(
        "whole_loop", "One CUDA graph for the loop", lambda b: b.program("tensorrt", cuda_graphs="loop"), "gpu"
    ),
    Optimization("openvino", "OpenVINO", lambda b: b.program("openvino"), "cpu"),
    Optimization("openvino_bf16", "OpenVINO in bfloat16", lambda b: b.program("openvino", "bf16"), "cpu", half=True),
)


def waterfall(
    bundle: Bundle,
    condition: str,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    plans: Path | None = None,
    optimizations: Sequence[str] = (),
    rounds: int = 10,
    **fields: Any,
) -> Waterfall:
    """Measures the optimizations in turn, round by round, in this process; the first round warms up. Wall clock.

    Ratios are to the first optimization that could be measured. On a CPU two copies of the weights are held in ONNX
    Runtime, and one for each optimization of OpenVINO's.

    Args:
        bundle: whose graphs run.
        condition: of the control image.
        device: whose optimizations are measured.
        threads: of the CPU; None is every physical core.
        plans: the plan store; None is the default one.
        optimizations: names of `OPTIMIZATIONS` to measure; none are all.
        rounds: that count.
        fields: of `ResolvedRequest`, over the model's defaults.

    Raises:
        UserError: for an argument that cannot be used.
        CnppError: no optimization works.
    """
    names = [optimization.name for optimization in OPTIMIZATIONS]
    if unknown := set(optimizations) - set(names):
        raise UserError(f"unknown optimization {min(unknown)!r}: choose from {', '.join(names)}")
    if rounds < 1:
        raise UserError(f"rounds must be above 0, not {rounds}")
    bench = _Bench(bundle, condition, device, threads, plans, fields)
    reasons = {optimization.name: _why_not(optimization, device, optimizations) for optimization in OPTIMIZATIONS}
    differences: dict[str, float] = {}
    runs = dict(_opened(bench, reasons, differences))
    if not runs:
        raise CnppError("no optimization works here: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    seconds = _rounds(runs, rounds)
    first = next(iter(seconds))

    def result(optimization: Optimization) -> OptimizationResult:
        found = OptimizationResult(name=optimization.name, title=optimization.title, reason=reasons[optimization.name])
        if optimization.name in differences:
            found["difference"] = differences[optimization.name]
        if optimization.name in seconds:
            found["seconds"] = summarize(seconds[optimization.name])
            found["ratio"] = paired_ratio(seconds[first], seconds[optimization.name])
        return found

    shown = [result(optimization) for optimization in OPTIMIZATIONS if device == "cpu" or optimization.device != "cpu"]
    return Waterfall(model=bundle.manifest.model, condition=condition, case=_case(bench), optimizations=shown)


class _Bench:
    """What the optimizations share: the request, and pipelines and sessions, opened when first needed."""

    def __init__(
        self,
        bundle: Bundle,
        condition: str,
        device: Device,
        threads: int | None,
        plans: Path | None,
        fields: dict[str, Any],
    ) -> None:
        self.bundle = bundle
        self.onnxruntime: str = "onnxruntime-cuda" if device == "gpu" else "onnxruntime-cpu"
        self._condition = condition
        self._device = device
        self._threads = threads
        self._plans = plans
        self._fields = fields
        self._pipelines: dict[tuple[str, str | None], Pipeline] = {}

    @cached_property
    def request(self) -> ResolvedRequest:
        return next(make_requests(self.pipeline("onnxruntime-cpu"), self._condition, [0], **self._fields))

    @cached_property
    def plain(self) -> Sessions:
        """With the options that a session has when nobody sets any, but for the number of threads and TF32."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        cuda = [("CUDAExecutionProvider", {"use_tf32": "0"})] if self._device == "gpu" else []

        def make(graph: str) -> Any:
            file = self.bundle.folder / self.bundle.graph(graph).file
            return onnxruntime.InferenceSession(str(file), options, providers=[*cuda, "CPUExecutionProvider"])

        return Sessions(self.bundle, make)

    @cached_property
    def tuned(self) -> Sessions:
        """The runtime's own: on a CPU their threads stop spinning, on a GPU runs share a stream."""
        backend: Any = self.pipeline(self.onnxruntime).backend
        return Sessions(self.bundle, lambda graph: backend.load(graph).session)

    def pipeline(self, backend: str, precision: Precision | None = None) -> Pipeline:
        key = (backend, precision)
        if key not in self._pipelines:
            self._pipelines[key] = Pipeline.open(
                self.bundle, backend, threads=self._threads, precision=precision, plans=self._plans
            )
        return self._pipelines[key]

    def host_loop(self, sessions: Sessions, last: str) -> Generate:
        """The loop on the host with the techniques of `_ON_HOST` up to the one that is called `last`.

        Raises:
            BackendError: the bundle's graphs are divided in another way.
        """
        graphs = self.bundle.manifest.graphs
        if "unet" not in graphs:
            raise BackendError("the bundle has its UNet in two graphs, which the loop on the host does not run")
        needed = {"prompt": "text_kv", "time": "time_embeds"}.get(last)
        if needed is not None and needed not in graphs:
            raise BackendError(f"the bundle was exported without --hoist-{last}")
        values = self.pipeline(self.onnxruntime).prepare(self.request).tensors
        techniques = _ON_HOST[: _ON_HOST.index(last) + 1] if last else ()
        return HostLoop(
            sessions,
            self._condition,
            values,
            hoist_hint="hint" in techniques,
            hoist_prompt="prompt" in techniques,
            hoist_time="time" in techniques,
            share_prefix="prefix" in techniques,
            update_graph="update" in techniques,
        )

    def program(self, name: str, precision: Precision | None = None, cuda_graphs: CudaGraphs = "off") -> Generate:
        """The runtime's program, launched one by one or recorded.

        Conditions are encoded outside of every recording, as the runtime does.
        """
        pipeline = self.pipeline(name, precision)
        ready = pipeline.prepare(self.request)
        backend, program, values, w = pipeline.backend, ready.program, ready.tensors, ready.program.workspace
        [hint], [hint_rows] = program.hints, w.hints
        assert w.control_image is not None and w.hint is not None
        for step in program.launches():
            step.launch()  # what was never run cannot be recorded
        recordings = Recordings(backend, program, cuda_graphs)
        recordings.ran()
        recordings.record()
        if recordings.rung != cuda_graphs:
            raise BackendError(recordings.note)
        control_image, encoded = w.control_image, w.hint

        def generate() -> HostLoopOutput:
            program.fill(values)
            backend.upload(control_image, values.control_image(0))
            hint.launch()
            for row in range(hint_rows.shape[0]):
                backend.copy(encoded, hint_rows.part(row, shape=encoded.shape))
            for step in recordings.launches():
                step.launch()
            return HostLoopOutput(backend.download(w.image), backend.download(w.latents))

        return generate


def _why_not(optimization: Optimization, device: Device, optimizations: Sequence[str]) -> str:
    """Why an optimization is not even tried; empty where it is."""
    if optimization.device not in (None, device):
        search = find_gpu()
        return (
            search.reason
            if optimization.device == "gpu" and search.gpu is None
            else f"runs on a {optimization.device.upper()} only"
        )
    return "not asked for" if optimizations and optimization.name not in optimizations else ""


def _opened(bench: _Bench, reasons: dict[str, str], differences: dict[str, float]) -> Iterator[tuple[str, Generate]]:
    """The optimizations that work here and generate the first one's latents; for the others, `reasons` says why not."""
    reference: NDArray[np.float32] | None = None
    for optimization in OPTIMIZATIONS:
        if reasons[optimization.name]:
            continue
        logger.info(f"{optimization.name}: opened")
        try:
            generate = optimization.open(bench)
            latents = generate().latents
        except BackendError as e:
            folder = bench.bundle.folder
            reasons[optimization.name] = str(e).replace(str(folder), folder.name)
            logger.info(f"{optimization.name}: {e}")
            continue
        reference = latents if reference is None else reference
        difference = float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))
        if np.isfinite(difference):
            differences[optimization.name] = difference
        half = optimization.half or bench.bundle.manifest.precision == "fp16"
        tolerance = _TOLERANCE["half" if half else "fp32"]
        if difference <= tolerance:
            yield optimization.name, generate
        else:  # or not a number
            reasons[optimization.name] = f"its latents differ by {difference:.1e}, more than {tolerance:.0e}"
            logger.info(f"{optimization.name}: {reasons[optimization.name]}")


def _rounds(runs: dict[str, Generate], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        logger.info(f"round {k} of {rounds}" if k else "warm-up")
        for name, generate in runs.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            generate()
            if k:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _case(bench: _Bench) -> Case:
    m, request = bench.bundle.manifest, bench.request
    return Case(
        width=m.width,
        height=m.height,
        images=request.num_images_per_prompt,
        steps=request.num_inference_steps,
        scheduler=request.scheduler,
        guidance_scale=request.guidance_scale,
        base=True,
    )
