"""Two pipelines launch by launch, from the same inputs; PyTorch is not needed.

Both run the same list of launches (`runtime/loop.py`). The reference runs as a request runs; before every launch, what
it is about to read goes into the deployed side's buffers too, and what both wrote is compared. So each graph is judged
on real inputs, whatever went wrong before it; nothing but the trajectory is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.backends.interface import Backend, Buffer, Step
from ...runtime.loop import Program
from ...runtime.pipeline import Pipeline
from ...runtime.preparing import Prepared
from ...runtime.settings.request import ResolvedRequest
from ..records import NOT_FINITE, GraphParity

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
    control_images = map(ours.tensors.control_image, range(len(request.controls)))
    conditions = "+".join(c.condition for c in request.controls)
    fallback = "vae_decoder_fp32" if "vae_decoder_fp32" in deployed.bundle.manifest.graphs else None
    for (k, step), (_, other) in zip(_launches(ours.program), _launches(theirs.program), strict=True):
        if not step.graph:  # copies
            step.launch()
            other.launch()
            continue
        if step.stage == "hint":  # one buffer serves all controls
            reference.backend.upload(step.inputs["control_image"], next(control_images))
        inputs = _contents(step.inputs, reference.backend)
        step.launch()
        outputs = _contents(step.outputs, reference.backend)
        found = launch_on(other, inputs, deployed.backend)
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
                again = launch_on(theirs.program.decoder(fallback), inputs, deployed.backend)
                tallies.setdefault(fallback, Tally()).add(f"{fallback} ({conditions})", outputs, again)
    return trajectory


def _launches(program: Program) -> Iterator[tuple[int | None, Step]]:
    """Every launch, with the step that it belongs to."""
    for step in (program.text, *program.hoists.steps(), *program.hints):
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


def launch_on(step: Step, inputs: Tensors, backend: Backend) -> Tensors:
    """The outputs of a launch with these inputs, by tensor name."""
    for name, buffer in step.inputs.items():
        backend.upload(buffer, inputs[name].astype(buffer.dtype))
    step.launch()
    return _contents(step.outputs, backend)


def _contents(buffers: Mapping[str, Buffer], backend: Backend) -> dict[str, NDArray[Any]]:
    return {name: backend.download(buffer) for name, buffer in buffers.items()}
