"""`cnpp-trt bench`: who competes, on which bundles, and what comes out of it."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ...bundles.bundle import Bundle, bundle_folder
from ...bundles.library import QUANTIZED
from ...errors import CnppError, UserError
from ...export.checkpoint import Checkpoint
from ...export.provenance import find_source_checkpoint
from ...gpu import find_gpu
from ...places import home
from ...runtime.pipeline import Pipeline
from ...runtime.planning import loop_schedule, loop_shape
from ...runtime.sampling.schedulers import build_table
from ...runtime.settings.request import ResolvedRequest
from ..environment import GpuSampler, physical_cores
from ..records import Bench, Case
from ..requests import make_requests
from ..result import BenchmarkResult, Kind, default_path
from .competitors import BY_NAME, COMPETITORS, CompetitorSpec, Device, WorkerConfig, unavailable_reason
from .machine_peak import measure_roofline
from .sweep import SweepPlan, require_gpu, sweep
from .timing import MIN_ROUNDS, TimingPlan, cases, sampling, time_competitors
from .waterfall import waterfall

logger = logging.getLogger(__name__)

Size = tuple[int, int]


@dataclass(frozen=True)
class BenchSettings:
    """What `cnpp-trt bench` measures.

    Attributes:
        sizes: (width, height) in pixels; empty takes the model's own, and one and a half times it. The first of sizes,
            images and steps makes the base case, each of the others varies it.
        scheduler: None takes the model's, and LCM without guidance for few steps.
        contenders: names of `COMPETITORS`; empty takes all of the device.
        threads: of the CPU; None is every physical core.
        rounds, seconds: as in `timing.TimingPlan`.
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


def run_bench(
    model: str | None,
    bundle: Path | None,
    controlnets: Mapping[str, str],
    settings: BenchSettings,
    out: Path | None,
    optimizations: bool,
) -> dict[Path, BenchmarkResult]:
    """Measures, and writes what it finds. Bundles that are missing are exported first and, on a GPU, plans built.

    Args:
        model: name or source of the checkpoint; None is the miniature where `bundle` is None.
        bundle: measure this one, of the one size that it has; PyTorch takes part where `model` is its checkpoint.
        controlnets: the source of each condition's ControlNet, where it is not the model's own.
        settings: what to measure.
        out: the folder of the results; None is the default one.
        optimizations: whether to measure the waterfall too.

    Returns:
        The results by their files.

    Raises:
        UserError, CnppError: the message says what is wrong and what to do.
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
    with GpuSampler() as sampler:
        found: dict[Kind, Mapping[str, Any]] = {
            "bench": _run_benchmark(bundles, model, controlnets, settings, device, threads)
        }
        if optimizations:
            case = found["bench"]["cases"][0]["case"]
            found["waterfall"] = waterfall(
                base,
                settings.condition,
                device=device,
                threads=threads,
                rounds=max(MIN_ROUNDS, settings.rounds // 2),
                **sampling(case),
            )
    results = {}
    for kind, data in found.items():
        title = f"{base.manifest.model}, {settings.condition}, {device}"
        result = BenchmarkResult.of(kind, title, _command(base, settings), data, threads)
        if sampler.ranges:
            result = msgspec.structs.replace(
                result, environment={**result.environment, "gpu_under_load": sampler.ranges}
            )
        path = default_path(kind, f"{base.folder.name}-{settings.condition}-{device}")
        path = path if out is None else out / path.name
        result.write(path)
        results[path] = result
    return results


def run_sweep(
    model: str | None,
    bundle: Path | None,
    controlnets: Mapping[str, str],
    settings: BenchSettings,
    out: Path | None,
) -> dict[Path, BenchmarkResult]:
    """Measures TensorRT's builder settings in the base case, and writes what it finds.

    Args:
        model, bundle, controlnets, out: as for `run_bench`.
        settings: the first of sizes, images and steps is measured, in so many rounds.

    Returns:
        The result by its file.

    Raises:
        UserError, CnppError: there is no GPU, or an argument cannot be used.
    """
    require_gpu()
    if bundle is None:
        first = replace(settings, sizes=settings.sizes[:1] or (Checkpoint(model or "miniature").size(None),))
        [opened] = _exported(model or "miniature", controlnets, first, "fp16")
    else:
        opened = Bundle.open(bundle)
    opened.require_condition(settings.condition)
    fields = {} if settings.scheduler is None else {"scheduler": settings.scheduler}
    with Pipeline.open(opened, "onnxruntime-cpu") as control_pipeline:
        example = next(make_requests(control_pipeline, settings.condition, [0], **fields))
    size = (opened.manifest.width, opened.manifest.height)
    few_step = settings.scheduler is None
    base = cases([size], settings.images[:1], settings.steps[:1], example, few_step=few_step)[0]
    with GpuSampler() as sampler:
        data = sweep(SweepPlan(opened, settings.condition, base, rounds=settings.rounds))
    title = f"{opened.manifest.model}, {settings.condition}, builder settings"
    result = BenchmarkResult.of("sweep", title, _command(opened, settings) + " --sweep", data)
    if sampler.ranges:
        result = msgspec.structs.replace(result, environment={**result.environment, "gpu_under_load": sampler.ranges})
    path = default_path("sweep", f"{opened.folder.name}-{settings.condition}")
    path = path if out is None else out / path.name
    result.write(path)
    return {path: result}


def conditions_of(model: str | None, bundle: Path | None, controlnets: Mapping[str, str]) -> list[str]:
    """All conditions that a bundle, or a model, has.

    Raises:
        UserError: neither can be found.
    """
    if bundle is not None:
        return list(Bundle.open(bundle).manifest.conditions)
    return list(Checkpoint(model or "miniature", controlnets).resolved.conditions)


def _run_benchmark(
    bundles: Sequence[Bundle],
    model: str | None,
    controlnets: Mapping[str, str],
    settings: BenchSettings,
    device: Device,
    threads: int | None,
) -> Bench:
    by_size = {(b.manifest.width, b.manifest.height): b for b in bundles}
    # They only make control images: the contenders have processes of their own.
    control_pipelines = {size: Pipeline.open(b, "onnxruntime-cpu", threads=threads) for size, b in by_size.items()}
    fields = {} if settings.scheduler is None else {"scheduler": settings.scheduler}
    example = next(make_requests(control_pipelines[next(iter(by_size))], settings.condition, [0], **fields))
    chosen = cases(list(by_size), settings.images, settings.steps, example, few_step=settings.scheduler is None)

    def request(case: Case, index: int) -> ResolvedRequest:
        control_pipeline = control_pipelines[case["width"], case["height"]]
        return next(make_requests(control_pipeline, settings.condition, [index], **sampling(case)))

    configs = _worker_configs(device, settings, by_size, model, controlnets, threads)
    if any(spec.name == "tensorrt" and isinstance(config, WorkerConfig) for spec, config in configs):
        _build(bundles, settings.condition, chosen)
    measured = time_competitors(configs, TimingPlan(chosen, settings.rounds, settings.seconds), request)
    logger.info("what this machine can do: matrix products and memory")
    roofline, roofline_reason = None, ""
    try:
        config = bundles[0].manifest.scheduler_config
        table = build_table(chosen[0]["scheduler"], config, chosen[0]["steps"])
        counted = request(chosen[0], 0)
        schedule = loop_schedule(bundles[0], counted, table)
        shape = loop_shape(bundles[0], counted, schedule)
        roofline = measure_roofline(bundles[0], shape, schedule, device, threads)
    except CnppError as e:
        roofline_reason = str(e)
    return Bench(
        model=bundles[0].manifest.model,
        condition=settings.condition,
        device=device,
        threads=threads,
        contenders=measured.contenders,
        cases=measured.cases,
        cold=measured.cold,
        roofline=roofline,
        roofline_reason=roofline_reason,
    )


def _command(bundle: Bundle, settings: BenchSettings) -> str:
    """What measures this again; without paths, which would tell of the machine that it was measured on."""
    options = [f"--model {shlex.quote(bundle.manifest.model)}", f"--cond {settings.condition}"]
    options += [f"--size {w}x{h}" for w, h in settings.sizes]
    options += [f"--images {','.join(map(str, settings.images))}", f"--steps {','.join(map(str, settings.steps))}"]
    options += [f"--scheduler {settings.scheduler}"] if settings.scheduler else []
    options += [f"--contender {name}" for name in settings.contenders]
    options += [f"--rounds {settings.rounds}"]
    return " ".join(["cnpp-trt bench", *options])


def _exported(model: str, controlnets: Mapping[str, str], settings: BenchSettings, precision: str) -> list[Bundle]:
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
    """The folder of the bundle of a size.

    A size that only a benchmark asks for stays out of the user's own bundles: with two sizes there, `run` would need
    `--size` from then on.
    """
    usual = bundle_folder(checkpoint.name, precision, *size)
    own = size == checkpoint.size(None)
    return usual if own or usual.is_dir() else home() / "bench" / usual.name


def _worker_configs(
    device: Device,
    settings: BenchSettings,
    bundles: Mapping[Size, Bundle],
    model: str | None,
    controlnets: Mapping[str, str],
    threads: int | None,
) -> list[tuple[CompetitorSpec, WorkerConfig | str]]:
    """Each contender with what opens it, or the reason why it cannot take part.

    Without a GPU its contenders are listed as well, so that a reader sees what was not measured.
    """
    chosen = [BY_NAME[name] for name in settings.contenders] or [
        spec for spec in COMPETITORS if not spec.only_named and (device == "cpu" or spec.device == "gpu")
    ]
    some = next(iter(bundles.values()))
    checkpoint: Checkpoint | None = None
    no_checkpoint = ""
    try:
        checkpoint = find_source_checkpoint(some, model, controlnets)
    except UserError as e:
        no_checkpoint = str(e)
    configs: list[tuple[CompetitorSpec, WorkerConfig | str]] = []
    for spec in chosen:
        reason = unavailable_reason(spec)
        folders: dict[str, Path] = {}
        try:
            taken = [*bundles.items()] if spec.everywhere else [*bundles.items()][:1]
            folders = {f"{w}x{h}": _bundle_for(spec, bundle).folder for (w, h), bundle in taken}
        except CnppError as e:
            reason = reason or str(e)
        if not reason and spec.bundle_precision is None:
            reason = no_checkpoint
        recipe = checkpoint.recipe.to_json() if checkpoint else {}
        configs.append((spec, reason or WorkerConfig(spec.name, folders, recipe, threads)))
    return configs


def _bundle_for(spec: CompetitorSpec, bundle: Bundle) -> Bundle:
    """The bundle that a contender runs: this one, or what `cnpp-trt quantize` made of it under CNPP_TRT_HOME.

    Raises:
        CnppError: there is none in its precision, or it is of other weights.
    """
    m, wanted = bundle.manifest, spec.bundle_precision
    if wanted in (None, m.number_format):
        return bundle
    if wanted not in QUANTIZED or m.quantization:
        raise CnppError(f"needs a bundle in {wanted}, and this one is {m.number_format}")
    folder = bundle_folder(m.model, wanted, m.width, m.height)
    make = shlex.join(["cnpp-trt", "quantize", "--precision", wanted, "--bundle", str(bundle.folder)])
    if not folder.is_dir():
        raise CnppError(f"no bundle in {wanted}: make it with {make}")
    quantized = Bundle.open(folder)
    if quantized.manifest.base != m.base:
        raise CnppError(f"{folder} is of other weights: delete it, and make it again with {make}")
    return quantized


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
