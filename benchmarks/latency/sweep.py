"""TensorRT's builder settings as a measured choice: plans of each, timed in turn with those of the default ones."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...bundles.bundle import Bundle
from ...engines.plan import BuilderSettings
from ...engines.store import PlanStore
from ...errors import BackendError, CnppError
from ...gpu import find_gpu
from ...runtime.pipeline import Pipeline
from ..image_metrics import max_difference
from ..records import Case, Sweep, SweepRow
from ..requests import make_requests
from ..statistics import paired_ratio, summarize
from .timing import sampling

logger = logging.getLogger(__name__)

# One setting at a time: each changes what the builder searches, and all together would be hundreds of builds.
CHOICES: tuple[BuilderSettings, ...] = (
    BuilderSettings(optimization_level=4),
    BuilderSettings(optimization_level=5),
    BuilderSettings(aux_streams=0),
    BuilderSettings(aux_streams=1),
    BuilderSettings(aux_streams=4),
    BuilderSettings(tiling_level=1),
    BuilderSettings(tiling_level=2),
    BuilderSettings(tiling_level=3),
    BuilderSettings(timing_iterations=8),
)

# Builds plans with these settings into a store.
Build = Callable[[BuilderSettings, Path], object]


@dataclass(frozen=True)
class SweepPlan:
    """What is measured.

    Attributes:
        bundle: whose plans are built.
        condition: of the control image.
        case: size, images, steps and sampler.
        choices: settings beside the default ones.
        rounds: that count, of each choice.
        plans: where the plans go, a folder of each choice; they stay there, so that a sweep that was interrupted goes
            on with them.
    """

    bundle: Bundle
    condition: str
    case: Case
    choices: Sequence[BuilderSettings] = CHOICES
    rounds: int = 20
    plans: Path | None = None


def sweep(plan: SweepPlan, build: Build | None = None) -> Sweep:
    """Builds and measures every choice, each beside the default settings, round by round.

    Two pipelines are open at a time. A choice whose plans cannot be built or run is listed with the reason.

    Args:
        plan: what is measured.
        build: None is TensorRT's own builder.

    Raises:
        CnppError: there is no GPU, or the default settings do not work.
    """
    require_gpu()
    build = build or _builder(plan)
    root = plan.plans or PlanStore().root / "sweep"
    default = BuilderSettings()
    started = time.perf_counter()
    build(default, root / folder_of(default))
    first = SweepRow(name=folder_of(default), title=str(default), reason="")
    first["build_seconds"] = time.perf_counter() - started
    rows = [first]
    with Pipeline.open(plan.bundle, "tensorrt", plans=root / folder_of(default)) as baseline:
        for choice in plan.choices:
            row = SweepRow(name=folder_of(choice), title=str(choice), reason="")
            rows.append(row)
            logger.info(f"{choice}: building")
            started = time.perf_counter()
            try:
                build(choice, root / folder_of(choice))
                row["build_seconds"] = time.perf_counter() - started
                with Pipeline.open(plan.bundle, "tensorrt", plans=root / folder_of(choice)) as other:
                    seconds, row["difference"] = _time(plan, baseline, other)
            except BackendError as e:
                row["reason"] = str(e).replace(str(root), root.name)
                logger.info(f"{choice}: {row['reason']}")
                continue
            first.setdefault("seconds", summarize(seconds[0]))
            row["seconds"] = summarize(seconds[1])
            row["ratio"] = paired_ratio(*seconds)
    return Sweep(model=plan.bundle.manifest.model, condition=plan.condition, case=plan.case, rows=rows)


def require_gpu() -> None:
    """That there is a GPU to build and to time on.

    Raises:
        CnppError: there is none.
    """
    search = find_gpu()
    if search.gpu is None:
        raise CnppError(f"--sweep builds TensorRT plans and times them on a GPU: {search.reason}")


def folder_of(settings: BuilderSettings) -> str:
    """The name of a choice's folder, as in `tiling-level-2`."""
    return "default" if settings == BuilderSettings() else str(settings).replace(", ", "-").replace(" ", "-")


def _builder(plan: SweepPlan) -> Build:
    from ...engines.build import Sizes, build_engines
    from ...engines.flavor import load_flavor

    flavor = load_flavor("auto")
    sizes = Sizes((plan.case["images"],), (plan.case["guidance_scale"] > 1,))

    def build(settings: BuilderSettings, folder: Path) -> None:
        build_engines(plan.bundle, [plan.condition], flavor, PlanStore(folder), sizes, settings)

    return build


def _time(plan: SweepPlan, baseline: Pipeline, other: Pipeline) -> tuple[tuple[list[float], list[float]], int]:
    """Seconds of both in turn, and the largest difference of a pixel between the pictures that warm them up."""
    count = plan.rounds + 2
    # The same for both, made before anything is timed.
    requests = list(make_requests(baseline, plan.condition, range(count), **sampling(plan.case)))
    pictures = []
    for pipeline in (baseline, other):
        pictures.append(pipeline(requests[0]).images)
        pipeline(requests[1])  # what ran once is recorded before it runs again
    seconds: tuple[list[float], list[float]] = ([], [])
    for request in requests[2:]:
        for pipeline, found in zip((baseline, other), seconds, strict=True):
            start = time.perf_counter()
            pipeline(request)
            found.append(time.perf_counter() - start)
    return seconds, max_difference(pictures[0], pictures[1])
