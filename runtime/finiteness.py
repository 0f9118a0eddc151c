"""Checks that everything computed is finite; where it is not, finds the first step and graph of which it is true."""

import shlex

import numpy as np

from ..bundles.bundle import Bundle
from ..errors import BackendError
from .backends.interface import Backend, Step
from .loop import Program, RequestTensors


def check_finite(program: Program, tensors: RequestTensors, backend: Backend, bundle: Bundle) -> list[str]:
    """Looks at the magnitudes that the loop and the decoder left: one small download.

    A decoder that overflowed fp16 is replaced: the latents are decoded again in fp32.

    Returns:
        Notes on that, one line each.

    Raises:
        BackendError: the message names the first step and graph whose output is not finite.
    """
    # What is not finite stays so: every value of a state is in every product that makes the next one.
    state, image = np.isfinite(backend.download(program.workspace.magnitudes)[:, 0])
    if not state:
        raise BackendError(_locate_non_finite(program, tensors, backend, bundle))
    if image:
        return []
    if "vae_decoder_fp32" in bundle.manifest.graphs:
        program.decoder("vae_decoder_fp32").launch()
        if np.isfinite(backend.download(program.workspace.magnitude(decoded=True))).all():
            return ["the decoder overflowed fp16: the latents were decoded again in fp32"]
    raise BackendError(f"the decoder's image is not finite ({bundle.manifest.precision}): {advice(bundle)}")


def advice(bundle: Bundle) -> str:
    """What to do where the weights or their precision may be what is wrong."""
    return f"check the weights with `cnpp-trt verify {shlex.quote(str(bundle.folder))}`, or use a fp32 bundle"


def _locate_non_finite(program: Program, tensors: RequestTensors, backend: Backend, bundle: Bundle) -> str:
    """Runs the request again, launch by launch, until an output is not finite."""
    program.fill(tensors)
    if program.table is not None:
        program.table.times_of = b""  # the next request computes them anew
    for step in (program.text, *program.hoists.steps(), *program.hints):
        if tensor := _first_bad(step, backend):
            what = f"{step.graph} gives values that are not finite in {tensor} ({bundle.manifest.precision})"
            return f"{what}: {advice(bundle)}"
    steps = program.schedule.steps
    for k in range(steps):
        for step in program.step(k):
            step.launch()
            if tensor := _first_bad(step, backend):
                what = f"{step.graph} gives values that are not finite in {tensor} ({bundle.manifest.precision})"
                return f"step {k + 1} of {steps}: {what}: {advice(bundle)}"
    return "a step gave values that are not finite once, and not when it was run again: is the GPU's memory sound?"


def _first_bad(step: Step, backend: Backend) -> str:
    for name, buffer in step.outputs.items():
        if not np.isfinite(backend.download(buffer)).all():
            return name
    return ""
