"""One call that searches: settings in, a result and a preset file out."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..benchmarks.consistency.dataset import open_data
from ..benchmarks.result import BenchmarkResult, default_path
from ..benchmarks.systems import other_systems, title_of
from ..benchmarks.tuning_records import Confirmed, Tried, Tuning
from ..conditions import CONDITIONS
from ..errors import UserError
from ..files import exclusive, remove_folder, replace_file, require_writable
from ..messages import printable
from ..places import results
from ..runtime.control.extraction import can_extract
from ..runtime.pipeline import Pipeline
from ..runtime.settings.preset import Evidence, Levers, Preset, Span, TunedModel
from ..schema import to_json
from ..versions import __version__
from .ablation import single_levers
from .cost import CostModel
from .search import Attempt, Candidate, Search, SearchSettings
from .space import describe
from .trials import Trials

logger = logging.getLogger(__name__)

# Of launches, as they were measured.
_SECONDS = "seconds.json"
_EXACT_SECONDS = "exact-seconds.json"


@dataclass(frozen=True)
class TuneSettings:
    """What is searched for, and where it goes.

    Attributes:
        condition: that the preset is for.
        search: how much is tried.
        data: a folder with `prompts.jsonl`; None takes fresh scenes of the embedded models.
        ablation: whether levers are measured one by one, too.
        against: systems that the preset is timed in turn with: `pytorch`, a bundle's folder, or a model with a bundle.
        fresh: remove what an earlier search drew instead of going on with it.
        out: the folder of records, result and preset; None takes the default one.
    """

    condition: str
    search: SearchSettings = field(default_factory=SearchSettings)
    data: Path | None = None
    ablation: bool = False
    against: Sequence[str] = ()
    fresh: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Tuned:
    """What a search gave: the result with its file, and the preset with its file."""

    result: BenchmarkResult
    result_file: Path
    preset: Preset
    preset_file: Path


def tune(pipeline: Pipeline, settings: TuneSettings, reference: Pipeline | None = None) -> Tuned:
    """Finds the fastest setting within the budget.

    Interrupted, a second call with the same settings goes on with what was drawn.

    Args:
        pipeline: that draws and judges, without presets.
        settings: what is searched for.
        reference: draws the exact setting that others are compared with: the original of a bundle whose model takes few
            steps, or whose precision or decoder is another. None: `pipeline`.

    Raises:
        UserError: nothing is within the budget; a setting, the prompts or earlier records cannot be used.
        CnppError: a package is missing.
    """
    condition, bundle = settings.condition, pipeline.bundle
    bundle.require_condition(condition)
    if not can_extract(bundle, condition):
        raise UserError(f"{printable(bundle.folder)} has no extractor for {condition!r} to judge images by")
    if reference is not None:
        _require_comparable(pipeline, reference, condition)
    out = settings.out or results()
    require_writable(out)
    name = f"{bundle.folder.resolve().name}-{pipeline.backend.name}-{condition}"
    if reference is not None:  # distances of images are to its own
        name += f"-to-{reference.bundle.folder.resolve().name}"
    folder = out / "tuning" / name
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock", folder):
        if settings.fresh:
            for each in filter(Path.is_dir, folder.iterdir()):
                remove_folder(each)
            for seconds in (_SECONDS, _EXACT_SECONDS):
                (folder / seconds).unlink(missing_ok=True)
        return _tune(pipeline, settings, reference or pipeline, folder, out, name)


def _tune(pipeline: Pipeline, settings: TuneSettings, reference: Pipeline, folder: Path, out: Path, name: str) -> Tuned:
    condition, s = settings.condition, settings.search
    data = open_data(pipeline, [condition], settings.data, s.needed if settings.data is None else None)
    if len(data.ids) < s.needed:
        raise UserError(
            f"{data.title} are too few: this search can use {s.needed}; give more prompts, or smaller --prompts, "
            "--confirm and --attempts"
        )
    others = other_systems(settings.against, pipeline, Pipeline.open)
    trials = Trials(pipeline, condition, data, folder, exact_levers(reference), reference)
    try:
        cost = CostModel(pipeline, folder / _SECONDS)
        exact_cost = cost if reference is pipeline else CostModel(reference, folder / _EXACT_SECONDS)
        search = Search(trials, cost, s, exact_cost)
        candidates = search.candidates()
        attempts = search.confirm(candidates)
        chosen = attempts[-1]
        race = {"": reference} | {system.title: system.open() for system in others} if others else {}
        against = search.race(chosen.candidate.levers, s.fresh(len(attempts) - 1), race)
        ablation = search.ablation(single_levers(trials.exact, pipeline.bundle)) if settings.ablation else []
    except (KeyboardInterrupt, SystemExit):
        logger.info(f"interrupted: the {trials.drawn} images drawn are kept; the same command goes on from there")
        raise
    command = command_of(pipeline, settings, None if reference is pipeline else reference)
    compared, exact = chosen.candidate.compared, search.exact_seconds
    tuning = Tuning(
        model=pipeline.bundle.manifest.model,
        condition=condition,
        metric=CONDITIONS[condition].metric,
        higher_is_better=CONDITIONS[condition].higher_is_better,
        budget=s.budget,
        exact=" of ".join(filter(None, (describe(trials.exact), trials.exact_bundle))),
        exact_seconds=exact,
        exact_score=compared.exact,
        trials=[_tried(c, exact) for c in candidates],
        attempts=[Confirmed(**_tried(a.candidate, exact), measured=a.speedup) for a in attempts],
        ablation=[_tried(c, exact) for c in ablation],
        against={title or f"{title_of(reference)}, exact": ratio for title, ratio in against.items()},
    )
    result = BenchmarkResult.of("tuning", f"{title_of(pipeline)}, {condition}", command, tuning)
    result_file = out / default_path("tuning", name).name
    result.write(result_file)
    preset = _preset(pipeline, settings, trials, chosen, exact, command)
    preset_file = out / f"{pipeline.bundle.manifest.model.replace('/', '-')}-{condition}.json"
    replace_file(preset_file, to_json(preset))
    return Tuned(result, result_file, preset, preset_file)


def exact_levers(pipeline: Pipeline) -> Levers:
    """The model's own setting, with nothing left out."""
    defaults = pipeline.defaults
    return Levers(num_inference_steps=defaults.num_inference_steps, scheduler=defaults.scheduler)


def _require_comparable(pipeline: Pipeline, reference: Pipeline, condition: str) -> None:
    """Checks that both draw images of one size under the condition.

    Raises:
        UserError: they do not.
    """
    reference.bundle.require_condition(condition)
    own, other = pipeline.bundle.manifest, reference.bundle.manifest
    if (own.width, own.height) != (other.width, other.height):
        raise UserError(
            f"{printable(reference.bundle.folder)} generates {other.width}x{other.height}, the bundle that is tuned "
            f"{own.width}x{own.height}: give an --exact of the same size"
        )


def command_of(pipeline: Pipeline, settings: TuneSettings, reference: Pipeline | None = None) -> str:
    """What would search again; bundles by their models, folders by their names alone."""
    m, s = pipeline.bundle.manifest, settings.search
    backend, bf16, _ = pipeline.backend.name.partition("-bf16")
    words = ["cnpp-trt tune --model", shlex.quote(m.model), "--precision", "bf16" if bf16 else m.precision]
    words += [f"--backend {backend} --cond {settings.condition} --budget {s.budget:g} --trials {s.trials}"]
    words += [f"--prompts {s.prompts} --confirm {s.confirm} --attempts {s.attempts}"]
    if settings.data is not None:
        words += ["--data", shlex.quote(settings.data.resolve().name)]
    if reference is not None:
        words += ["--exact", shlex.quote(reference.bundle.manifest.model)]
    words += [f"--against {shlex.quote(name)}" for name in settings.against]
    return " ".join([*words, *(["--ablation"] if settings.ablation else [])])


def _tried(candidate: Candidate, exact_seconds: float) -> Tried:
    return Tried(
        setting=describe(candidate.levers),
        seconds=candidate.seconds,
        speedup=exact_seconds / candidate.seconds,
        loss=candidate.compared.loss,
        psnr=candidate.compared.psnr,
        prompts=candidate.compared.prompts,
    )


def _preset(
    pipeline: Pipeline, settings: TuneSettings, trials: Trials, chosen: Attempt, exact_seconds: float, command: str
) -> Preset:
    compared, speedup = chosen.candidate.compared, chosen.speedup
    evidence = Evidence(
        budget=settings.search.budget,
        metric=CONDITIONS[settings.condition].metric,
        loss=Span(**compared.loss),
        exact=compared.exact,
        tuned=compared.tuned,
        prompts=compared.prompts,
        psnr=compared.psnr,
        speedup=Span(value=speedup["median"], low=speedup["low"], high=speedup["high"]),
        predicted_speedup=exact_seconds / chosen.candidate.seconds,
        backend=pipeline.backend.name,
        exact_levers=trials.exact,
        exact_bundle=trials.exact_bundle,
        command=command,
    )
    return Preset(
        version=__version__,
        model=TunedModel.of(pipeline.bundle, settings.condition),
        condition=settings.condition,
        levers=chosen.candidate.levers,
        evidence=evidence,
    )
