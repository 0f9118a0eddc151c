"""A deployed pipeline against the modules it was exported from, launch by launch and step by step."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...conditions import CONDITIONS
from ...export.checkpoint import Checkpoint
from ...runtime.backends.interface import Step, aligned
from ...runtime.loop import run
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import ResolvedRequest
from ..pytorch import exact_float32
from ..records import NOT_FINITE, GraphParity, StepParity
from ..requests import make_requests
from .launch_comparison import Tally, Trajectory, compare_graphs, launch_on, tensor_difference
from .pytorch_backend import TorchModules

logger = logging.getLogger(__name__)

# Of requests that are there for their graphs alone: with several controls, or of the sizes that plans were built for.
FEW_STEPS = 4


def compare_extractor(
    reference: Pipeline, deployed: Pipeline, condition: str, image: NDArray[np.uint8], tallies: dict[str, Tally]
) -> None:
    """The condition's extractor on an image uint8 [H,W,3], where the bundle has a graph for it."""
    graph = f"extractor_{condition}"
    if not CONDITIONS[condition].extractor_graph or graph not in deployed.bundle.manifest.graphs:
        return
    inputs = {"image": image[None]}
    want, found = (launch_on(_extraction(p, graph), inputs, p.backend) for p in (reference, deployed))
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
