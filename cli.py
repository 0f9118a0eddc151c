"""The `cnpp-trt` command: parses, calls one function, prints. Results on stdout, everything else on stderr."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .benchmarks import commands
from .bundle import Bundle, home
from .conditions import CONDITIONS
from .errors import CnppError, UserError
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    Config,
    ControlNets,
    Embeddings,
    Extractors,
    Json,
    Loras,
    Model,
    Parts,
    Plans,
    Precision,
    Vae,
    Variant,
    VramBudget,
    deployment,
    read_bytes,
    read_counts,
    read_pairs,
    read_size,
    say,
    split_precision,
)

app = typer.Typer(
    help="ControlNet++ as ONNX graphs and TensorRT engines, and a runtime without PyTorch.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Typer's base of "no such option", "missing option" and the like; it has no public name.
_UsageError: Any = typer.BadParameter.__base__


_INTERRUPTED = 130


def main() -> NoReturn:
    """Exit status: 0, 1 for a failure, 2 for what the user can mend, 130 and 143 when interrupted or terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        # Not standalone: Typer would frame a usage error in a box of several lines.
        status = app(standalone_mode=False) or 0
    except _UsageError as e:
        if not e.format_message():  # the help was printed instead
            sys.exit(2)
        say(f"error: {' '.join(e.format_message().split()).rstrip('.')}: see `cnpp-trt --help`")
        sys.exit(2)
    except CnppError as e:
        if debug:
            raise
        say(f"error: {e}")
        sys.exit(2 if isinstance(e, UserError) else 1)
    if status == _INTERRUPTED:  # what Typer makes of a KeyboardInterrupt
        say("interrupted: nothing half-made is left")
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks; may stand anywhere.")] = False,
) -> None:
    if version:
        print(f"cnpp-trt {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command("export")
def export_command(
    cond: Annotated[list[str], typer.Option(help=f"Repeatable: {', '.join(CONDITIONS)}, or all.")],
    model: Model = "miniature",
    controlnet: ControlNets = None,
    vae: Vae = None,
    lora: Loras = None,
    embedding: Embeddings = None,
    extractor: Extractors = None,
    variant: Variant = None,
    config: Config = None,
    precision: Annotated[str, typer.Option(help="fp32 (CPU) or fp16 (TensorRT).")] = "fp32",
    size: Annotated[str | None, typer.Option(help="512 or WxH, in pixels. Default: the model's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. Default: under CNPP_TRT_HOME.")] = None,
    as_json: Json = False,
) -> None:
    """Checkpoint → bundle of ONNX graphs, each compared with PyTorch. A bundle that exists gains new conditions."""
    parts = Parts(controlnet, vae, lora, embedding, extractor, variant, config)
    bundle = _export(model, parts, cond, precision, size, out)
    if as_json:
        print(
            json.dumps({"bundle": str(bundle.folder), "digest": bundle.digest, **json.loads(bundle.manifest.dumps())})
        )
    else:
        print(bundle.folder)


@app.command()
def build(
    cond: Annotated[list[str], typer.Option(help=f"Repeatable: {', '.join(CONDITIONS)}, or all.")],
    model: Model = "miniature",
    bundle: Annotated[
        Path | None, typer.Option(help="Build from this bundle; no checkpoint and no PyTorch are needed.")
    ] = None,
    controlnet: ControlNets = None,
    vae: Vae = None,
    lora: Loras = None,
    embedding: Embeddings = None,
    extractor: Extractors = None,
    variant: Variant = None,
    config: Config = None,
    size: Annotated[
        list[str] | None, typer.Option(help="512 or WxH, in pixels; repeatable. Default: the model's own.")
    ] = None,
    flavor: Annotated[str, typer.Option(help="auto, tensorrt (needs the GPU) or tensorrt-rtx (builds anywhere).")] = (
        "auto"
    ),
    images: Annotated[str, typer.Option(help="Images per prompt, as in 1, 1-4 or 1,4: a profile each.")] = "1",
    prompt_chunks: Annotated[
        str, typer.Option(help="Chunks of 77 tokens a prompt may have, as in 1, 1-3 or 1,2: a profile each.")
    ] = "1",
    guided: Annotated[bool, typer.Option("--guided", help="For guidance scales above 1.")] = False,
    unguided: Annotated[bool, typer.Option("--unguided", help="For guidance scales of 1 or less.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Guided and unguided. Default: what the model needs.")] = False,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="One profile for the whole range of sizes: slower.")
    ] = False,
    optimization_level: Annotated[int | None, typer.Option(help="TensorRT's, 0 to 5.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every graph with PyTorch after the build, as `parity` does.")
    ] = False,
    out: Plans = None,
    as_json: Json = False,
) -> None:
    """Bundle → TensorRT plans, and what was fused in each. Exports the fp16 bundle first where it is missing."""
    from .engines.build import Engines, Sizes, build_engines, guided_by_default
    from .engines.builder import Settings
    from .engines.describe import engines_json, engines_table
    from .engines.flavor import load_flavor
    from .engines.store import PlanStore

    if bundle is not None and size:
        raise UserError("--size goes with --model: a bundle has its one size")
    settings, counts = Settings(optimization_level), read_counts(images)
    chunks = read_counts(prompt_chunks, "--prompt-chunks")
    loaded = load_flavor(flavor)
    loaded.target()  # whether it can build here at all is known before anything is exported
    sizes_given: list[str | None] = [*size] if size else [None]
    parts = Parts(controlnet, vae, lora, embedding, extractor, variant, config)
    bundles = (
        [Bundle.open(bundle)]
        if bundle is not None
        else [_export(model, parts, cond, "fp16", s, None) for s in sizes_given]
    )
    # Before anything is built: what a check needs may be missing.
    checks = [_check_of(opened, model, bundle is None, controlnet) for opened in bundles] if check else []
    made: list[Engines] = []
    found: list[Any] = []
    with _progress_bar() as progress:
        for i, opened in enumerate(bundles):
            conditions = list(opened.manifest.conditions) if cond == ["all"] else cond
            asked = tuple(g for g, wanted in ((True, guided or both), (False, unguided or both)) if wanted)
            sizes = Sizes(counts, asked or (guided_by_default(opened),), dynamic, chunks)
            made.append(build_engines(opened, conditions, loaded, PlanStore(out), sizes, settings, say, progress))
            found.append(checks[i](conditions, sizes, out, say) if check else None)
    if as_json:
        rows = [engines_json(e) | ({"check": f} if f else {}) for e, f in zip(made, found, strict=True)]
        print(json.dumps(rows))
    else:
        for opened, engines, outcome in zip(bundles, made, found, strict=True):
            print(f"{opened.folder}\n{engines_table(engines)}\nin {PlanStore(out).root}")
            if outcome:
                from .benchmarks.check import describe_check

                print(f"\n{describe_check(outcome, opened.manifest.precision)}")
    failures = [line for outcome in found if outcome for line in outcome["missed"]]
    for line in failures:
        say(f"missed: {line}")
    if failures:
        raise typer.Exit(1)


def _check_of(bundle: Bundle, model: str, is_models: bool, controlnet: list[str] | None) -> Callable[..., Any]:
    """What checks the plans of a bundle.

    Raises: UserError where the checkpoint that it was exported from is not known, CnppError where PyTorch is missing.
    """
    from functools import partial

    from .export.reopen import checkpoint_of

    try:
        from .benchmarks.check import check_plans
    except ModuleNotFoundError as e:
        raise CnppError(f"--check needs {e.name}: pip install 'cnpp-trt[export,cpu]'") from None
    given = model if is_models or model != "miniature" else None  # a bundle names its embedded model itself
    return partial(check_plans, bundle, checkpoint_of(bundle, given, read_pairs(controlnet or [])))


engines_app = typer.Typer(help="The plans that were built: list, inspect, prune.", no_args_is_help=True)
app.add_typer(engines_app, name="engines")
Store = Annotated[Path | None, typer.Option("--out", help="The plan store. Default: under CNPP_TRT_HOME.")]


@engines_app.command("list")
def engines_list(store: Store = None, as_json: Json = False) -> None:
    """Every plan of the store."""
    from .engines.describe import plan_json, plans_table
    from .engines.store import PlanStore

    opened = PlanStore(store)
    plans = opened.plans()
    if as_json:
        print(json.dumps([plan_json(plan) for plan in plans]))
    elif plans:
        print(plans_table(plans))
    else:
        say(f"no plans in {opened.root}: make some with `cnpp-trt build --cond …`")


@engines_app.command("inspect")
def engines_inspect(
    name: Annotated[str, typer.Argument(help="A plan's folder name, or the start of it, as in `unet`.")],
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Everything about a plan: what it is for, its sizes, its memory, what was fused and what not, its digest."""
    from .engines.describe import plan_details, plan_json
    from .engines.store import PlanStore

    opened = PlanStore(store)
    plans = [plan for plan in opened.plans() if plan.folder.name.startswith(name)]
    if not plans:
        raise UserError(f"no plan {name!r} in {opened.root}: see `cnpp-trt engines list`")
    if as_json:
        print(json.dumps([{**plan_json(plan), "damage": plan.damage()} for plan in plans]))
    else:
        print("\n\n".join(map(plan_details, plans)))


@engines_app.command("capability")
def engines_capability(
    onnx: Annotated[Path, typer.Argument(help="An ONNX file, as in BUNDLE/unet.onnx.")],
    flavor: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt-rtx.")] = "auto",
) -> None:
    """What of a graph TensorRT can parse, and what not, as Polygraphy finds it."""
    from .engines.capability import capability
    from .engines.flavor import load_flavor

    print(capability(load_flavor(flavor), onnx))


@engines_app.command("prune")
def engines_prune(
    store: Store = None,
    unused: Annotated[bool, typer.Option("--unused", help="Also those of no bundle under CNPP_TRT_HOME.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete plans that cannot be used any more: of TensorRT versions that were replaced, or damaged."""
    from .engines.store import PlanStore, bundle_sources, installed_versions

    opened = PlanStore(store)
    if everything:
        reasons = dict.fromkeys(opened.plans(), "--all")
    else:
        reasons = opened.useless(installed_versions(), bundle_sources() if unused else None)
    for plan, reason in reasons.items():
        say(f"{plan.folder.name}: {reason}")
    freed = 0 if dry_run else opened.remove(reasons) + opened.remove_leftovers()
    if as_json:
        print(json.dumps({"plans": [p.folder.name for p in reasons], "freed": freed, "dry_run": dry_run}))
    else:
        print(f"{len(reasons)} plans{' would be' if dry_run else ''} deleted, {freed / 2**20:.1f} MiB freed")


@app.command()
def run(
    model: Model = "miniature",
    bundle: BundleFolder = None,
    cond: Annotated[list[str] | None, typer.Option(help="Condition; repeatable. Default: the bundle's first.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Control image of each --cond. Default: the model's example.")
    ] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="The images are photos: extract the conditions first.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Default: the example's.")] = None,
    negative_prompt: Annotated[str, typer.Option()] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 1000. Default: the model's, or 20.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="unipc, ddim, euler, dpmpp_2m, dpmpp_2m_karras, lcm. Default: the model's, or unipc."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 or less: unguided. Default: the model's, or 7.5.")
    ] = None,
    control_scale: Annotated[list[float] | None, typer.Option(help="Once for all controls, or one each.")] = None,
    control_start: Annotated[list[float] | None, typer.Option(help="Share of steps at which control starts.")] = None,
    control_end: Annotated[list[float] | None, typer.Option(help="Share of steps at which control ends.")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Begin with this image instead of noise alone.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --init-image: how much of it is drawn anew, above 0 to 1. Default: 0.8.")
    ] = None,
    long_prompt: Annotated[
        bool, typer.Option("--long-prompt", help="Read more than 77 tokens, in chunks as AUTOMATIC1111 does.")
    ] = False,
    clip_skip: Annotated[int, typer.Option(help="Leave out so many of the text encoder's last layers.")] = 0,
    seed: Annotated[int | None, typer.Option(help="0 to 2**64 - 1; image i has seed + i. Default: random.")] = None,
    images: Annotated[int, typer.Option(help="Images of this prompt, 1 to 16.")] = 1,
    size: BundleSize = None,
    precision: Precision = None,
    backend: BackendName = "auto",
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: every physical core.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Pictures go into a new folder in here. Default: under CNPP_TRT_HOME.")
    ] = None,
    repeat: Annotated[Path | None, typer.Option(help="Repeat a picture from its own metadata.")] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures that follow a condition, and a sheet that shows how well they do."""
    from .runtime import run as running

    out = out or home() / "runs"
    if strength is not None and init_image is None:
        raise UserError("--strength says how much of an initial image is drawn anew: give one with --init-image FILE")
    if repeat is not None:
        budget = read_bytes(vram_budget) if vram_budget is not None else None
        repeated = running.repeat(repeat, out, bundle, backend, threads, split_precision(precision)[1], plans, budget)
        _print_drawn(repeated.drawn, as_json, {"max_difference": repeated.max_difference})
        same = repeated.max_difference == 0
        say("the pixels are the same" if same else f"the pixels differ by up to {repeated.max_difference} of 255")
        return
    folder, open_pipeline = deployment(model, bundle, size, precision, backend, threads, plans, vram_budget)
    pipeline = open_pipeline(folder)
    conditions = cond or list(pipeline.bundle.manifest.conditions)[:1]
    controls = _controls(conditions, image or [], extract, control_scale, control_start, control_end)
    request, notes = running.make_request(
        pipeline,
        controls,
        extract=extract,
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=seed,
        num_images_per_prompt=images,
        init_image=init_image,
        **({} if strength is None else {"strength": strength}),
        clip_skip=clip_skip,
        long_prompt=long_prompt,
    )
    _print_drawn(running.draw(pipeline, request, out, notes), as_json, {})


@app.command()
def verify(bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")], as_json: Json = False) -> None:
    """Read every byte of a bundle and compare it with the manifest's digests."""
    opened = Bundle.open(bundle)
    size = opened.verify()
    if as_json:
        print(json.dumps({"bundle": str(bundle), "bytes": size, "digest": opened.digest}))
    else:
        print(
            f"{bundle} is whole: {len(opened.manifest.files)} files, {size / 2**20:.1f} MiB, "
            f"digest {opened.digest[:16]}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, providers, GPU, folders; what works here and what to install. Made to be pasted into an issue."""
    from .doctor import describe, examine

    found = examine()
    print(json.dumps(found) if as_json else describe(found))


def _export(
    model: str, parts: Parts, conditions: list[str], precision: str, size: str | None, out: Path | None
) -> Bundle:
    from .export.exporter import export_model

    checkpoint = parts.checkpoint(model)
    wanted = checkpoint.places.conditions if conditions == ["all"] else conditions
    return export_model(checkpoint, wanted, precision, read_size(size), out, say)


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, float], None] | None]:
    """A bar on stderr where that is a terminal; else none."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda phase, share: bar.update(task, description=phase, completed=share)


def _print_drawn(drawn: Any, as_json: bool, extra: dict[str, Any]) -> None:
    for note in drawn.notes:
        say(f"note: {note}")
    if as_json:
        print(json.dumps({**drawn.to_json(), **extra}))
        return
    stages = {k: v for k, v in drawn.timings.items() if k != "total"}
    say(f"{'total':<13}{drawn.timings['total']:8.3f} s on {drawn.backend} ({drawn.reason})")
    for stage, seconds in stages.items():
        say(f"  {stage:<11}{seconds:8.3f} s")
    if drawn.memory:
        parts = ", ".join(f"{part} {nbytes / 2**20:.0f} MiB" for part, nbytes in drawn.memory.items())
        say(f"device memory {parts}")
    for condition, scores in drawn.scores:
        say(f"consistency {condition}: {', '.join(str(s) for s in scores)}")
    for path in (*drawn.images, *([drawn.sheet] if drawn.sheet else [])):
        print(path)


def _controls(
    conditions: list[str],
    images: list[Path],
    extract: bool,
    scales: list[float] | None,
    starts: list[float] | None,
    ends: list[float] | None,
) -> list[Any]:
    from .runtime.run import ControlOption

    n = len(conditions)
    if extract and not images:
        raise UserError("--extract needs a photo: give one with --image FILE")
    if extract and len(images) == 1:
        images = images * n  # several conditions of one photo
    files: list[Path | None] = [*images] or [None] * n
    if len(files) != n:
        raise UserError(f"{n} --cond and {len(images)} --image: give one image for each condition, or none at all")

    def each(name: str, values: list[float] | None, default: float) -> list[float]:
        values = values or [default]
        if len(values) not in (1, n):
            raise UserError(f"{len(values)} values of {name} for {n} conditions: give one, or one each")
        return values * n if len(values) == 1 else values

    return [
        ControlOption(*row)
        for row in zip(
            conditions,
            files,
            each("--control-scale", scales, 1.0),
            each("--control-start", starts, 0.0),
            each("--control-end", ends, 1.0),
            strict=True,
        )
    ]


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that every `finally` runs and nothing half-made is left.
    say("terminated: nothing half-made is left")
    sys.exit(128 + signum)


commands.register(app)


if __name__ == "__main__":
    main()
