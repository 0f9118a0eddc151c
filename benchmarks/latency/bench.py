"""`cnpp-trt bench`: who competes, on which bundles, and what comes out of it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...bundles.bundle import Bundle, bundle_folder
from ...errors import CnppError, UserError
from ...export.checkpoint import Checkpoint
from ...export.provenance import find_source_checkpoint
from ...gpu import find_gpu
from ...places import home
from ...runtime.pipeline import Pipeline, structure_of
from ...runtime.request import ResolvedRequest
from ...runtime.sampling.schedulers import build_table
from ..environment import physical_cores
from ..records import Bench, Case
from ..requests import make_requests
from ..result import Kind, Result, default_path
from .competitors import BY_NAME, ENTRIES, Device, Entry, Opening, why_not
from .machine_peak import floor as measure_floor
from .timing import MIN_ROUNDS, Plan, Report, cases, measure, sampling
from .waterfall import waterfall

Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    sizes: (width, height) in pixels; empty takes the model's own, and one and a half times it. The first of sizes,
        images and steps makes the base case, each of the others varies it.
    scheduler: None takes the model's, and LCM without guidance for few steps.
    contenders: names of `ENTRIES`; empty takes all of the device.
    threads: of the CPU; None is every physical core.
    rounds, seconds: as in `latency.Plan`.
    """

    condition: str = "seg"
    sizes: tuple[Size, ...] = ()
    images: tuple[int, ...] = (1, 2, 3, 4)
    steps: tuple[int, ...] = (20, 4, 50)
    scheduler: str | None = None
    contenders: tuple[str, ...] = ()
    threads: int | None = None
    rounds: int = 20
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.contenders if name not in BY_NAME]:
            raise UserError(f"unknown contender {unknown[0]!r}: choose from {', '.join(BY_NAME)}")
        if self.rounds < 1 or not self.seconds > 0:
            raise UserError(f"{self.rounds} rounds in {self.seconds:g} s measure nothing: give more than 0 of both")


def run(
    model: str | None,
    bundle: Path | None,
    controlnets: Mapping[str, str],
    settings: Settings,
    out: Path | None,
    techniques: bool,
    report: Report,
) -> dict[Path, Result]:
    """Measures, and writes what it finds. Bundles that are missing are exported first and, on a GPU, plans built.

    Args:
        bundle: measure this one, of the one size that it has; PyTorch takes part where `model` is its checkpoint.
        out: the folder of the results; None is the default one.
        techniques: whether to measure the waterfall too.
    Returns: the results by their files.
    Raises: UserError, CnppError
    """
    device: Device = "gpu" if find_gpu().gpu else "cpu"
    threads = None if device == "gpu" else settings.threads or physical_cores()
    if bundle is not None and settings.sizes:
        raise UserError("--size goes with --model: a bundle has its one size")
    bundles = (
        _exported(model or "miniature", controlnets, settings, "fp16" if device == "gpu" else "fp32")
        if bundle is None
        else [Bundle.open(bundle)]
    )
    base = bundles[0]
    base.require_condition(settings.condition)
    found: dict[Kind, Mapping[str, Any]] = {
        "bench": _contest(bundles, model, controlnets, settings, device, threads, report)
    }
    if techniques:
        case = found["bench"]["cases"][0]["case"]
        found["waterfall"] = waterfall(
            base,
            settings.condition,
            device=device,
            threads=threads,
            rounds=max(MIN_ROUNDS, settings.rounds // 2),
            report=report,
            **sampling(case),
        )
    results = {}
    for kind, data in found.items():
        title = f"{base.manifest.model}, {settings.condition}, {device}"
        result = Result.of(kind, title, _command(base, settings), data, threads)
        path = default_path(kind, f"{base.folder.name}-{settings.condition}-{device}")
        path = path if out is None else out / path.name
        result.write(path)
        results[path] = result
    return results


def conditions_of(model: str | None, bundle: Path | None, controlnets: Mapping[str, str]) -> list[str]:
    """All that a bundle, or a model, has. Raises: UserError"""
    if bundle is not None:
        return list(Bundle.open(bundle).manifest.conditions)
    return list(Checkpoint(model or "miniature", controlnets).resolved.conditions)


def _contest(
    bundles: Sequence[Bundle],
    model: str | None,
    controlnets: Mapping[str, str],
    settings: Settings,
    device: Device,
    threads: int | None,
    report: Report,
) -> Bench:
    by_size = {(b.manifest.width, b.manifest.height): b for b in bundles}
    # They only make control images: the contenders have processes of their own.
    artists = {size: Pipeline.open(b, "onnxruntime-cpu", threads=threads) for size, b in by_size.items()}
    fields = {} if settings.scheduler is None else {"scheduler": settings.scheduler}
    example = next(make_requests(artists[next(iter(by_size))], settings.condition, [0], **fields))
    chosen = cases(list(by_size), settings.images, settings.steps, example, few_step=settings.scheduler is None)

    def request(case: Case, index: int) -> ResolvedRequest:
        artist = artists[case["width"], case["height"]]
        return next(make_requests(artist, settings.condition, [index], **sampling(case)))

    openings = _openings(device, settings, by_size, model, controlnets, threads)
    if any(entry.name == "tensorrt" and isinstance(opening, Opening) for entry, opening in openings):
        _build(bundles, settings.condition, chosen)
    measured = measure(openings, Plan(chosen, settings.rounds, settings.seconds), request, report)
    report("what this machine can do: matrix products and memory")
    floor, floor_reason = None, ""
    try:
        config = bundles[0].manifest.scheduler_config
        table = build_table(chosen[0]["scheduler"], config, chosen[0]["steps"])
        floor = measure_floor(bundles[0], structure_of(bundles[0], request(chosen[0], 0), table), device, threads)
    except CnppError as e:
        floor_reason = str(e)
    return Bench(
        model=bundles[0].manifest.model,
        condition=settings.condition,
        device=device,
        threads=threads,
        contenders=measured.contenders,
        cases=measured.cases,
        cold=measured.cold,
        floor=floor,
        floor_reason=floor_reason,
    )


def _command(bundle: Bundle, settings: Settings) -> str:
    """What measures this again; without paths, which would tell of the machine that it was measured on."""
    options = [f"--model {shlex.quote(bundle.manifest.model)}", f"--cond {settings.condition}"]
    options += [f"--size {w}x{h}" for w, h in settings.sizes]
    options += [f"--images {','.join(map(str, settings.images))}", f"--steps {','.join(map(str, settings.steps))}"]
    options += [f"--scheduler {settings.scheduler}"] if settings.scheduler else []
    options += [f"--contender {name}" for name in settings.contenders]
    options += [f"--rounds {settings.rounds}"]
    return " ".join(["cnpp-trt bench", *options])


def _exported(model: str, controlnets: Mapping[str, str], settings: Settings, precision: str) -> list[Bundle]:
    from ...export.exporter import export_model

    checkpoint = Checkpoint(model, controlnets)
    width, height = checkpoint.size(None)
    grain = checkpoint.vae_scale_factor
    larger = (width * 3 // 2 // grain * grain, height * 3 // 2 // grain * grain)
    return [
        export_model(checkpoint, [settings.condition], precision, size, folder_of(checkpoint, precision, size))
        for size in settings.sizes or ((width, height), larger)
    ]


def folder_of(checkpoint: Checkpoint, precision: str, size: Size) -> Path:
    """Where the bundle of a size is, or goes: one that only a benchmark asks for stays out of the user's own bundles,
    where `run` would have to be told from then on which size is meant."""
    usual = bundle_folder(checkpoint.name, precision, *size)
    own = size == checkpoint.size(None)
    return usual if own or usual.is_dir() else home() / "bench" / usual.name


def _openings(
    device: Device,
    settings: Settings,
    bundles: Mapping[Size, Bundle],
    model: str | None,
    controlnets: Mapping[str, str],
    threads: int | None,
) -> list[tuple[Entry, Opening | str]]:
    """Each contender with what opens it, or the reason why it cannot take part.

    Without a GPU its contenders are listed as well, so that a reader sees what was not measured.
    """
    chosen = [BY_NAME[name] for name in settings.contenders] or [
        entry for entry in ENTRIES if device == "cpu" or entry.device == "gpu"
    ]
    some = next(iter(bundles.values()))
    folders = {f"{w}x{h}": bundle.folder for (w, h), bundle in bundles.items()}
    checkpoint: Checkpoint | None = None
    no_checkpoint = ""
    try:
        checkpoint = find_source_checkpoint(some, model, controlnets)
    except UserError as e:
        no_checkpoint = str(e)
    openings: list[tuple[Entry, Opening | str]] = []
    for entry in chosen:
        reason = why_not(entry)
        if not reason and entry.bundle_precision is None:
            reason = no_checkpoint
        elif not reason and entry.bundle_precision != some.manifest.precision:
            reason = f"needs a bundle in {entry.bundle_precision}, and this one is {some.manifest.precision}"
        recipe = checkpoint.recipe.to_json() if checkpoint else {}
        openings.append((entry, reason or Opening(entry.name, folders, recipe, threads)))
    return openings


def _build(bundles: Sequence[Bundle], condition: str, chosen: Sequence[Case]) -> None:
    """The plans of every case, where they are missing."""
    from ...engines.build import Sizes, build_engines
    from ...engines.flavor import load_flavor
    from ...engines.plan import BuilderSettings
    from ...engines.store import PlanStore

    guided = tuple(sorted({case["guidance_scale"] > 1 for case in chosen}, reverse=True))
    sizes = Sizes(tuple(sorted({case["images"] for case in chosen})), guided)
    for bundle in bundles:
        build_engines(bundle, [condition], load_flavor("auto"), PlanStore(), sizes, BuilderSettings())
