"""A deployed pipeline against the modules it was exported from, launch by launch and step by step.

Both run the same list of launches (`runtime/loop.py`). The reference runs as a request runs; before every launch, what
it is about to read goes into the deployed side's buffers too, and what both wrote is compared. So each graph is judged
on real inputs, whatever went wrong before it; nothing but the trajectory is kept.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...conditions import CONDITIONS
from ...export.checkpoint import Checkpoint
from ...runtime.backends.interface import Backend, Buffer, Step, aligned
from ...runtime.loop import Program, run
from ...runtime.pipeline import Pipeline
from ...runtime.preparing import Prepared
from ...runtime.settings.request import ResolvedRequest
from ..pytorch import exact_float32
from ..records import NOT_FINITE, GraphParity, StepParity
from ..requests import make_requests
from .pytorch_backend import TorchModules

logger = logging.getLogger(__name__)

# Of requests that are there for their graphs alone: with several controls, or of the sizes that plans were built for.
FEW_STEPS = 4

Tensors = Mapping[str, NDArray[Any]]


@dataclass
class Tally:
    """What is known of one graph so far; see `records.GraphParity`."""

    launches: int = 0
    max_abs: float = 0.0
    relative_l2: float = -1.0
    cosine: float = 1.0
    worst: str = ""

    def add(self, launch: str, reference: Tensors, found: Tensors) -> None:
        """Adds the outputs of one launch, by tensor name."""
        self.launches += 1
        for name, want in reference.items():
            difference = tensor_difference(want, found[name])
            self.max_abs = max(self.max_abs, difference.max_abs)
            self.cosine = min(self.cosine, difference.cosine)
            if difference.relative_l2 > self.relative_l2:
                self.relative_l2 = difference.relative_l2
                self.worst = f"{launch}: {name}" + ("" if np.isfinite(self.relative_l2) else ", not finite")

    def record(self, graph: str) -> GraphParity:
        """The tally as a record of the result."""
        return GraphParity(
            graph=graph,
            launches=self.launches,
            max_abs=min(self.max_abs, NOT_FINITE),
            relative_l2=min(self.relative_l2, NOT_FINITE),
            cosine=self.cosine,
            worst=self.worst,
        )


@dataclass
class Trajectory:
    """The states of the reference.

    Before each step its state float32 [4,B,4,h,w] and model input float32 [G,4,h,w], after it the latents [B,4,h,w]; in
    the end the image uint8 [B,H,W,3].
    """

    states: list[NDArray[np.float32]] = field(default_factory=list)
    model_inputs: list[NDArray[np.float32]] = field(default_factory=list)
    latents: list[NDArray[np.float32]] = field(default_factory=list)
    images: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0, 0, 3), np.uint8))


@dataclass(frozen=True)
class TensorDifference:
    """max |found - reference|, their relative L2 difference, and the cosine of the angle between the two as vectors."""

    max_abs: float
    relative_l2: float
    cosine: float


def tensor_difference(reference: NDArray[Any], found: NDArray[Any]) -> TensorDifference:
    """Of two tensors of one shape; differences are infinite and the cosine is 0 where one is not finite.

    Sums and no dot products: between the launches of two runtimes a BLAS with spinning threads of its own costs
    several times what it computes.
    """
    want, got = reference.astype(np.float64), found.astype(np.float64)
    error = np.abs(got - want)
    squared, length, other = (float(np.square(x).sum()) for x in (error, want, got))
    if not np.isfinite(squared):
        return TensorDifference(np.inf, np.inf, 0.0)
    product = float((want * got).sum())
    cosine = product / np.sqrt(length * other) if length and other else float(length == other)
    return TensorDifference(
        float(error.max()), float(np.sqrt(squared / (length or 1.0))), float(np.clip(cosine, -1, 1))
    )


def compare_graphs(
    reference: Pipeline, deployed: Pipeline, request: ResolvedRequest, tallies: dict[str, Tally]
) -> Trajectory:
    """Every launch of a request, on both sides, from the reference's inputs; adds to `tallies`, by graph.

    An fp16 decoder that overflows is left out where the bundle has the fp32 one, as the runtime then decodes again.
    """
    ours, theirs = reference.prepare(request), deployed.prepare(request)
    trajectory = Trajectory()
    _restore_inputs(ours, reference.backend)
    control_images = iter(ours.tensors.control_images)
    conditions = "+".join(c.condition for c in request.controls)
    fallback = "vae_decoder_fp32" if "vae_decoder_fp32" in deployed.bundle.manifest.graphs else None
    for (k, step), (_, other) in zip(_launches(ours.program), _launches(theirs.program), strict=True):
        if not step.graph:  # copies
            step.launch()
            other.launch()
            continue
        if step.stage == "hint":  # one buffer serves all controls
            reference.backend.upload(step.inputs["control_image"], next(control_images)[0][None])
        inputs = _contents(step.inputs, reference.backend)
        step.launch()
        outputs = _contents(step.outputs, reference.backend)
        found = _launch_on(other, inputs, deployed.backend)
        where = step.graph if k is None else f"{step.graph} step {k + 1}"
        overflowed = step.graph == "vae_decoder" and not np.isfinite(found["magnitude"]).all()
        if not (overflowed and fallback):
            tallies.setdefault(step.graph, Tally()).add(f"{where} ({conditions})", outputs, found)
        if step.graph == "unet":
            trajectory.model_inputs.append(inputs["model_input"])
        elif step.graph == "update":
            trajectory.states.append(inputs["state"])
            trajectory.latents.append(outputs["new_state"][0])
        elif step.graph == "vae_decoder":
            trajectory.images = outputs["image"]
            if fallback:
                again = _launch_on(theirs.program.decoder(fallback), inputs, deployed.backend)
                tallies.setdefault(fallback, Tally()).add(f"{fallback} ({conditions})", outputs, again)
    return trajectory


def compare_extractor(
    reference: Pipeline, deployed: Pipeline, condition: str, image: NDArray[np.uint8], tallies: dict[str, Tally]
) -> None:
    """The condition's extractor on an image uint8 [H,W,3], where the bundle has a graph for it."""
    graph = f"extractor_{condition}"
    if not CONDITIONS[condition].extractor_graph or graph not in deployed.bundle.manifest.graphs:
        return
    inputs = {"image": image[None]}
    want, found = (_launch_on(_extraction(p, graph), inputs, p.backend) for p in (reference, deployed))
    tallies.setdefault(graph, Tally()).add(graph, want, found)


def compare_steps(deployed: Pipeline, request: ResolvedRequest, trajectory: Trajectory) -> StepParity:
    """The deployed loop by itself, and each of its steps from the reference's own state."""
    free: list[float] = []
    deployed(
        request,
        callback_on_step_end=lambda k, _, latents: free.append(_relative(trajectory.latents[k], latents)),
    )

    ready = deployed.prepare(request)
    program, put = ready.program, deployed.backend.upload
    forced: list[float] = []
    for k, (state, model_input) in enumerate(zip(trajectory.states, trajectory.model_inputs, strict=True)):
        put(program.state(k), state)
        put(program.workspace.model_input, model_input.astype(program.workspace.model_input.dtype))
        run(program.step(k), ready.clock)
        forced.append(_relative(trajectory.latents[k], deployed.backend.download(program.state(k + 1))[0]))
    return StepParity(condition=request.controls[0].condition, free=free, forced=forced)


def request_of_both(requests: Sequence[ResolvedRequest]) -> list[ResolvedRequest]:
    """The first request with the second's controls as well, in a few steps: for the graph that adds residuals."""
    if len(requests) < 2:
        return []
    first, second = requests[:2]
    steps = min(FEW_STEPS, first.num_inference_steps)
    return [replace(first, controls=(*first.controls, *second.controls), num_inference_steps=steps)]


def check_graphs(
    deployed: Pipeline,
    checkpoint: Checkpoint,
    conditions: Sequence[str],
    sizes: Iterable[tuple[int, bool]],
    device: str = "cpu",
) -> list[GraphParity]:
    """Every graph that these conditions launch, on inputs of a few steps; several controls included.

    Args:
        deployed: the runtime's own pipeline.
        checkpoint: that its bundle was exported from.
        conditions: whose graphs are launched.
        sizes: (images, guided) of each request that is made of a condition.
        device: PyTorch's.
    """
    exact_float32()
    guidance = {True: max(deployed.defaults.guidance_scale, 1.5), False: 1.0}
    steps = min(FEW_STEPS, deployed.defaults.num_inference_steps)
    requests: list[ResolvedRequest] = []
    for images, guided in sizes:
        fields = {"num_images_per_prompt": images, "guidance_scale": guidance[guided], "num_inference_steps": steps}
        own = [r for condition in conditions for r in make_requests(deployed, condition, [0], **fields)]
        requests += [*own, *request_of_both(own)]
    return compare_launches(deployed, checkpoint, requests, device, follow=False)[0]


def compare_launches(
    deployed: Pipeline,
    checkpoint: Checkpoint,
    requests: Sequence[ResolvedRequest],
    device: str = "cpu",
    follow: bool = True,
) -> tuple[list[GraphParity], list[StepParity]]:
    """Every graph that these requests launch and, of those with one control, extractors and, to `follow`, steps."""
    modules = TorchModules(deployed.bundle, checkpoint, device)
    tallies: dict[str, Tally] = {}
    steps: list[StepParity] = []
    for request in requests:
        start = time.perf_counter()
        reference = modules.pipeline()  # a new one each time: it holds its conditions' modules
        trajectory = compare_graphs(reference, deployed, request, tallies)
        names = [c.condition for c in request.controls]
        if len(names) == 1:
            compare_extractor(reference, deployed, names[0], trajectory.images[0], tallies)
            if follow:
                steps.append(compare_steps(deployed, request, trajectory))
        logger.info(f"{' and '.join(names)}: launch by launch in {time.perf_counter() - start:.1f} s")
    return [tally.record(graph) for graph, tally in tallies.items()], steps


def _launches(program: Program) -> Iterator[tuple[int | None, Step]]:
    """Every launch, with the step that it belongs to."""
    for step in (program.text, *program.hints):
        yield None, step
    for k in range(program.schedule.steps):
        for step in program.step(k):
            yield k, step
    for step in program.decode:
        yield None, step


def _restore_inputs(ready: Prepared, backend: Backend) -> None:
    """Uploads the prompt to the buffer that it is encoded from: an encoding that is cached leaves others there."""
    w, values = ready.program.workspace, ready.tensors
    backend.upload(w.input_ids, values.prompts.input_ids)
    backend.upload(w.clip_skip, values.prompts.clip_skip)


def _launch_on(step: Step, inputs: Tensors, backend: Backend) -> Tensors:
    for name, buffer in step.inputs.items():
        backend.upload(buffer, inputs[name].astype(buffer.dtype))
    step.launch()
    return _contents(step.outputs, backend)


def _contents(buffers: Mapping[str, Buffer], backend: Backend) -> dict[str, NDArray[Any]]:
    return {name: backend.download(buffer) for name, buffer in buffers.items()}


def _extraction(pipeline: Pipeline, graph: str) -> Step:
    m = pipeline.bundle.manifest
    pixels = m.height * m.width
    allocate = pipeline.backend.arena(aligned(3 * pixels) + aligned(pixels))
    inputs = {"image": allocate((1, m.height, m.width, 3), "uint8")}
    outputs = {"map": allocate((1, m.height, m.width), "uint8")}
    launch = pipeline.backend.load(graph).bind({**inputs, **outputs})
    return Step("extraction", graph, launch, inputs, outputs)


def _relative(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return min(tensor_difference(reference, found).relative_l2, NOT_FINITE)
