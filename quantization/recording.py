"""What the runtime's own loop gives the large networks: their inputs over prompts, conditions and all time steps."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import ResolvedRequest

Recording = dict[str, list[dict[str, NDArray[Any]]]]


def record_inputs(
    pipeline: Pipeline, requests: Iterable[ResolvedRequest], graphs: Sequence[str], each: int
) -> Recording:
    """Runs requests and keeps what is read by these graphs, by graph.

    Args:
        each: launches that are kept of a graph in one request. Which steps they are of is shifted from request to
            request, so that all time steps occur.
    """
    found: Recording = {graph: [] for graph in graphs}
    for i, request in enumerate(requests):
        ready = pipeline.prepare(request)
        steps = ready.program.schedule.steps
        wanted = {int((k + (i % 8) / 8) * steps / each) % steps for k in range(min(each, steps))}
        for k in range(steps):
            for step in ready.program.step(k):
                if k in wanted and step.graph in found:
                    inputs = {name: pipeline.backend.download(buffer) for name, buffer in step.inputs.items()}
                    found[step.graph].append(inputs)
                step.launch()
    return found


def digest_of(recording: Mapping[str, Sequence[Mapping[str, NDArray[Any]]]]) -> str:
    """SHA-256 over everything that was recorded."""
    digest = hashlib.sha256()
    for graph, launches in sorted(recording.items()):
        for inputs in launches:
            for name, values in sorted(inputs.items()):
                digest.update(f"{graph} {name} {values.dtype} {values.shape} ".encode())
                digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
