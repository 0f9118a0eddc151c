"""What a setting costs: its launches are counted, and each takes what it took when it was measured."""

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from ..benchmarks.latency.flop_count import NullBackend, free_sizes
from ..bundles.bundle import Bundle
from ..errors import UserError
from ..files import replace_file
from ..messages import printable
from ..runtime.backends.interface import Step
from ..runtime.loop import Program
from ..runtime.pipeline import Pipeline
from ..runtime.planning import loop_schedule, loop_shape
from ..runtime.sampling.schedulers import build_table
from ..runtime.settings.request import ResolvedRequest
from ..schema import Meta, SchemaError, decode, read_bounded, to_json

ROUNDS = 7
_HOST = "host"  # what no launch accounts for: filling the buffers, copying the image

Seconds = dict[Annotated[str, Meta(max_length=500)], Annotated[float, Meta(ge=0)]]


class CostModel:
    """Seconds of requests, from those of their launches.

    What was measured is kept in a file, so that a search which goes on decides as it would have.

    Args:
        pipeline: that runs them.
        file: of the seconds by launch.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, pipeline: Pipeline, file: Path) -> None:
        self._pipeline = pipeline
        self._file = file
        self._seconds: Seconds = {}
        if file.is_file():
            try:
                self._seconds = decode(read_bounded(file), Seconds)
            except (OSError, SchemaError) as e:
                raise UserError(f"{printable(file)} is damaged ({e}): delete it, or give --fresh") from None

    def seconds(self, request: ResolvedRequest) -> float:
        """Of a request whose prompt and control image are new; launches of a kind that is new are measured first."""
        counted = launches_of(self._pipeline.bundle, request)
        if any(launch not in self._seconds for launch in (*counted, _HOST)):
            self._measure(request)
        return self._seconds[_HOST] + sum(count * self._seconds[launch] for launch, count in counted.items())

    def _measure(self, request: ResolvedRequest) -> None:
        bundle, backend = self._pipeline.bundle, self._pipeline.backend
        program = self._pipeline.prepare(request).program
        samples: dict[str, list[float]] = {}
        wholes: list[float] = []
        for _ in range(ROUNDS + 1):
            clock = backend.stopwatch()
            for step in (program.text, *program.hints, *program.launches()):
                step.launch()
                clock.mark(_label(bundle, step))
            for label, taken in clock.seconds().items():
                samples.setdefault(label, []).append(taken)
            start = time.perf_counter()
            self._pipeline(request)  # its prompt and control image are known by now
            wholes.append(time.perf_counter() - start)
        counted = launches_of(bundle, request)
        # The first round takes what is done once: memory is touched, kernels are compiled.
        found = {label: statistics.median(taken[1:]) / counted[label] for label, taken in samples.items()}
        self._seconds = {**found, **self._seconds}
        if _HOST not in self._seconds:
            encoding = ("text_encoder", "hint_")
            launched = sum(n * found[label] for label, n in counted.items() if not label.startswith(encoding))
            self._seconds[_HOST] = max(statistics.median(wholes[1:]) - launched, 0.0)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, to_json(self._seconds))


def launches_of(bundle: Bundle, request: ResolvedRequest) -> Counter[str]:
    """How often a request launches each graph at each size; nothing is run or allocated."""
    table = build_table(
        request.scheduler, bundle.manifest.scheduler_config, request.num_inference_steps, 0, request.timestep_spacing
    )
    schedule = loop_schedule(bundle, request, table)
    backend: Any = NullBackend()
    program = Program(backend, bundle, loop_shape(bundle, request, schedule), schedule)
    return Counter(_label(bundle, step) for step in (program.text, *program.hints, *program.launches()))


def _label(bundle: Bundle, step: Step) -> str:
    """A graph with the sizes that it runs at; `copies` for what launches none."""
    if not step.graph:
        return "copies"
    return f"{step.graph} {json.dumps(free_sizes(bundle, step), sort_keys=True)}"
