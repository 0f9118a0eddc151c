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
    finite = np.isfinite(backend.download(program.workspace.magnitudes)[:, 0])
    steps = program.shape.steps
    if not finite[:steps].all():
        raise BackendError(_locate_non_finite(program, tensors, backend, int(np.argmin(finite)), bundle))
    if finite[steps]:
        return []
    if "vae_decoder_fp32" in bundle.manifest.graphs:
        program.decoder("vae_decoder_fp32").launch()
        if np.isfinite(backend.download(program.workspace.magnitudes)[steps, 0]):
            return ["the decoder overflowed fp16: the latents were decoded again in fp32"]
    raise BackendError(f"the decoder's image is not finite ({bundle.manifest.precision}): {advice(bundle)}")


def advice(bundle: Bundle) -> str:
    """What to do where the weights or their precision may be what is wrong."""
    return f"check the weights with `cnpp-trt verify {shlex.quote(str(bundle.folder))}`, or use a fp32 bundle"


def _locate_non_finite(program: Program, tensors: RequestTensors, backend: Backend, bad: int, bundle: Bundle) -> str:
    """Runs up to the bad step again, launch by launch, and looks at every output of it."""
    program.fill(tensors)
    for step in (program.text, *program.hints):
        if tensor := _first_bad(step, backend):
            what = f"{step.graph} gives values that are not finite in {tensor} ({bundle.manifest.precision})"
            return f"{what}: {advice(bundle)}"
    steps = program.shape.steps
    for step in program.denoise:
        if step.index is None or step.index > bad:
            break
        step.launch()
        # The step before had a finite state, but the model input that it made of it may have overflowed.
        if step.index >= bad - 1 and (tensor := _first_bad(step, backend)):
            what = f"{step.graph} gives values that are not finite in {tensor} ({bundle.manifest.precision})"
            return f"step {step.index + 1} of {steps}: {what}: {advice(bundle)}"
    where = f"step {bad + 1} of {steps}"
    return f"{where} gave values that are not finite once, and not when it was run again: is the GPU's memory sound?"


def _first_bad(step: Step, backend: Backend) -> str:
    for name, buffer in step.outputs.items():
        if not np.isfinite(backend.download(buffer)).all():
            return name
    return ""
