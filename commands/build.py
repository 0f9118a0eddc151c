"""`cnpp-trt export` and `build`: parse, call one function, print."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import places
from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS
from ..errors import CnppError, UserError
from ..files import require_writable
from ..install import EXPORT_MODULES, cannot_import
from .options import (
    Config,
    ControlNets,
    Embeddings,
    Extractors,
    Json,
    Loras,
    Model,
    Parts,
    PlanStorePath,
    Vae,
    Variant,
    echo,
    read_conditions,
    read_counts,
    read_pairs,
    read_precision,
    read_size,
    show,
    user_path,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    app.command("export")(export_command)
    app.command("build")(build_command)


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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder. Default: under CNPP_TRT_HOME.", callback=user_path),
    ] = None,
    as_json: Json = False,
) -> None:
    """Checkpoint → bundle of ONNX graphs, each compared with PyTorch. A bundle that exists gains new conditions."""
    parts = Parts(controlnet, vae, lora, embedding, extractor, variant, config)
    bundle = _export(model, parts, read_conditions(cond), precision, size, out)
    if as_json:
        print(json.dumps({"bundle": str(bundle.folder), **json.loads(bundle.manifest.dumps())}))
    else:
        show(str(bundle.folder))


def build_command(
    cond: Annotated[list[str], typer.Option(help=f"Repeatable: {', '.join(CONDITIONS)}, or all.")],
    model: Model = "miniature",
    bundle: Annotated[
        Path | None,
        typer.Option(help="Build from this bundle; no checkpoint and no PyTorch are needed.", callback=user_path),
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
    images: Annotated[
        str,
        typer.Option("--num-images", "-n", "--images", help="Images per prompt, as in 1, 1-4 or 1,4: a profile each."),
    ] = "1",
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
    plans: PlanStorePath = None,
    as_json: Json = False,
) -> None:
    """Bundle → TensorRT plans, and what was fused in each. Exports the fp16 bundle first where it is missing."""
    from ..engines.build import MAX_IMAGES, Engines, Sizes, build_engines, guided_by_default
    from ..engines.describe import engines_json, engines_table
    from ..engines.flavor import load_flavor
    from ..engines.plan import BuilderSettings
    from ..engines.store import PlanStore

    if bundle is not None and size:
        raise UserError("--size goes with --model: a bundle has its one size")
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise UserError(f"--optimization-level is TensorRT's, 0 to 5, not {optimization_level}")
    settings, counts = BuilderSettings(optimization_level), read_counts(images, most=MAX_IMAGES)
    chunks = read_counts(prompt_chunks, "--prompt-chunks")
    asked_conditions = read_conditions(cond)
    for text in size or ():
        read_size(text)
    store = PlanStore(plans)
    require_writable(store.root, "--plans")
    loaded = load_flavor(flavor)
    loaded.target()  # whether it can build here at all is known before anything is exported
    sizes_given: list[str | None] = [*size] if size else [None]
    parts = Parts(controlnet, vae, lora, embedding, extractor, variant, config)
    bundles = (
        [Bundle.open(bundle)]
        if bundle is not None
        else [_export(model, parts, asked_conditions, "fp16", s, None) for s in sizes_given]
    )
    # Before anything is built: what a check needs may be missing.
    checks = [_check_of(opened, model, bundle is None, controlnet) for opened in bundles] if check else []
    made: list[Engines] = []
    found: list[Any] = []
    with _progress_bar() as progress:
        for i, opened in enumerate(bundles):
            conditions = list(opened.manifest.conditions) if asked_conditions == ["all"] else asked_conditions
            asked = tuple(g for g, wanted in ((True, guided or both), (False, unguided or both)) if wanted)
            sizes = Sizes(counts, asked or (guided_by_default(opened),), dynamic, chunks)
            made.append(build_engines(opened, conditions, loaded, store, sizes, settings, progress=progress))
            found.append(checks[i](conditions, sizes, plans, echo) if check else None)
    if as_json:
        rows = [engines_json(e) | ({"check": f} if f else {}) for e, f in zip(made, found, strict=True)]
        print(json.dumps(rows))
    else:
        for opened, engines, outcome in zip(bundles, made, found, strict=True):
            show(f"{opened.folder}\n{engines_table(engines)}\nin {store.root}")
            if outcome:
                from ..benchmarks.parity.check_plans import describe_check

                show(f"\n{describe_check(outcome, opened.manifest.precision)}")
    failures = [line for outcome in found if outcome for line in outcome["missed"]]
    for line in failures:
        echo(f"missed: {line}")
    if failures:
        raise typer.Exit(1)


def _check_of(bundle: Bundle, model: str, is_models: bool, controlnet: list[str] | None) -> Callable[..., Any]:
    """What checks the plans of a bundle.

    Raises: UserError where the checkpoint that it was exported from is not known, CnppError where PyTorch is missing.
    """
    from functools import partial

    from ..export.reopen import checkpoint_of

    try:
        from ..benchmarks.parity.check_plans import check_plans
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("--check", e, *EXPORT_MODULES)) from None
    given = model if is_models or model != "miniature" else None  # a bundle names its embedded model itself
    return partial(check_plans, bundle, checkpoint_of(bundle, given, read_pairs(controlnet or [])))


def _export(
    model: str, parts: Parts, conditions: list[str], precision: str, size: str | None, out: Path | None
) -> Bundle:
    from ..export.allocator import return_large_blocks
    from ..export.exporter import PRECISIONS, export_model

    read = read_precision(precision, PRECISIONS) or precision
    pixels = read_size(size)
    require_writable(places.bundles() if out is None else out.absolute().parent)
    checkpoint = parts.checkpoint(model)
    wanted = checkpoint.places.conditions if conditions == ["all"] else conditions
    return_large_blocks()
    return export_model(checkpoint, wanted, read, pixels, out)


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
