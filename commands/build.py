"""`cnpp-trt export` and `build`: parse, call one function, print."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import places
from ..bundles.bundle import Bundle
from ..bundles.manifest import GraphOptions
from ..conditions import CONDITIONS
from ..errors import CnppError, UserError
from ..files import require_writable
from ..install import EXPORT_MODULES, cannot_import
from .options import (
    CheckpointOptions,
    Config,
    ControlNets,
    Embeddings,
    Extractors,
    Json,
    Loras,
    Model,
    Plans,
    Vae,
    Variant,
    add_command,
    echo,
    read_conditions,
    read_counts,
    read_pairs,
    read_precision,
    read_size,
    show,
    user_path,
)

if TYPE_CHECKING:
    from ..benchmarks.parity.check_plans import Check
    from ..engines.build import Engines


_MODEL = ("model", "controlnet", "vae", "lora", "embedding", "extractor", "variant", "config")
_EXPORT_PANELS = {
    "Model": (*_MODEL, "precision", "size"),
    "Control": ("cond",),
    "Graphs": ("hoist_prompt", "hoist_time", "split_unet", "deep_cache"),
    "Output": ("out", "as_json"),
}
_EXPORT_EXAMPLES = """Examples:

cnpp-trt export --cond all

cnpp-trt export --model sd15 --cond seg --precision fp16 --size 512

cnpp-trt export --model owner/name --controlnet seg=./controlnet --lora lcm --cond seg"""
_BUILD_PANELS = {
    "Model": (*_MODEL, "bundle", "size"),
    "Control": ("cond",),
    "Sampling": ("images", "prompt_chunks", "guided", "unguided", "both", "dynamic"),
    "Runtime": ("flavor", "compute_capability", "check", "plans"),
    "Builder settings": ("optimization_level", "aux_streams", "tiling_level", "timing_iterations"),
    "Output": ("as_json",),
}
_BUILD_EXAMPLES = """Examples:

cnpp-trt build --cond seg --flavor tensorrt-rtx

cnpp-trt build --bundle ./bundle --cond seg --cond depth --num-images 1-4 --both

cnpp-trt build --model sd15 --cond all --size 512 --size 768x512 --check"""


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    add_command(app, "export", export_command, _EXPORT_PANELS, _EXPORT_EXAMPLES)
    add_command(app, "build", build_command, _BUILD_PANELS, _BUILD_EXAMPLES)


def export_command(
    cond: Annotated[list[str], typer.Option(help=f"A condition, repeatable: {', '.join(CONDITIONS)}, or all.")],
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
    hoist_prompt: Annotated[
        bool | None,
        typer.Option(
            "--hoist-prompt/--no-hoist-prompt", help="Keys and values of the prompt once per prompt. Default: yes."
        ),
    ] = None,
    hoist_time: Annotated[
        bool | None,
        typer.Option("--hoist-time/--no-hoist-time", help="Time embeddings once per schedule. Default: yes."),
    ] = None,
    split_unet: Annotated[
        bool | None,
        typer.Option(
            "--split-unet/--no-split-unet", help="The UNet in two graphs, the first beside the ControlNet. Default: no."
        ),
    ] = None,
    deep_cache: Annotated[
        bool | None,
        typer.Option(
            "--deep-cache/--no-deep-cache",
            help="With what --cache-interval of `run` and the tuner's caching need. Default: no.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder. Default: under CNPP_TRT_HOME.", callback=user_path),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs, each compared with PyTorch. A bundle gains new conditions."""
    options = CheckpointOptions(controlnet, vae, lora, embedding, extractor, variant, config)
    given = {"hoist_prompt": hoist_prompt, "hoist_time": hoist_time, "split_unet": split_unet, "deep_cache": deep_cache}
    graphs = {name: value for name, value in given.items() if value is not None}
    chosen = GraphOptions(**graphs) if graphs else None
    bundle = _export(model, options, read_conditions(cond), precision, size, out, chosen)
    if as_json:
        print(json.dumps({"bundle": str(bundle.folder), **json.loads(bundle.manifest.dumps())}))
    else:
        show(str(bundle.folder))


def build_command(
    cond: Annotated[list[str], typer.Option(help=f"A condition, repeatable: {', '.join(CONDITIONS)}, or all.")],
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
    compute_capability: Annotated[
        list[int] | None,
        typer.Option(help="A GPU that TensorRT-RTX builds for, as in 89; repeatable. Default: those it covers."),
    ] = None,
    optimization_level: Annotated[int | None, typer.Option(help="TensorRT's, 0 to 5.")] = None,
    aux_streams: Annotated[int | None, typer.Option(help="Streams that an engine may use beside its own.")] = None,
    tiling_level: Annotated[int | None, typer.Option(help="TensorRT's search for tiles, 0 to 3.")] = None,
    timing_iterations: Annotated[int | None, typer.Option(help="How often TensorRT times a kernel.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every graph with PyTorch after the build, as `parity` does.")
    ] = False,
    plans: Plans = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT plans from a bundle and show what was fused. An fp16 bundle that is missing is exported first."""
    from ..engines.build import MAX_IMAGES, BuildRequest, build_all
    from ..engines.flavor import load_flavor
    from ..engines.plan import BuilderSettings
    from ..engines.store import PlanStore

    if bundle is not None and size:
        raise UserError("--size goes with --model: a bundle has its one size")
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise UserError(f"--optimization-level is TensorRT's, 0 to 5, not {optimization_level}")
    conditions = read_conditions(cond)
    request = BuildRequest(
        conditions=() if conditions == ["all"] else tuple(conditions),
        images=read_counts(images, most=MAX_IMAGES),
        guided=(True,) * (guided or both) + (False,) * (unguided or both),
        dynamic=dynamic,
        chunks=read_counts(prompt_chunks, "--prompt-chunks"),
        settings=BuilderSettings(optimization_level, aux_streams, tiling_level, timing_iterations),
    )
    for text in size or ():
        read_size(text)
    store = PlanStore(plans)
    require_writable(store.root, "--plans")
    tensorrt = load_flavor(flavor).building_for(compute_capability or ())
    tensorrt.target()  # whether it can build here at all is known before anything is exported
    if bundle is not None:
        bundles = [Bundle.open(bundle)]
    else:
        options = CheckpointOptions(controlnet, vae, lora, embedding, extractor, variant, config)
        sizes: Sequence[str | None] = size or [None]
        bundles = [_export(model, options, conditions, "fp16", text, None) for text in sizes]
    # Before anything is built: what a check needs may be missing.
    checkers = [_checker(opened, model, bundle is None, controlnet) for opened in bundles] if check else []
    with _progress_bar() as progress:
        engines = build_all(bundles, request, tensorrt, store, progress)
        checks = [
            checker(built.conditions, built.sizes, plans) for checker, built in zip(checkers, engines, strict=False)
        ]
    _print_engines(engines, checks, store.root, as_json)
    if violations := [line for result in checks for line in result["missed"]]:
        for line in violations:
            echo(f"missed: {line}")
        raise typer.Exit(1)


def _print_engines(engines: "list[Engines]", checks: "list[Check]", store: Path, as_json: bool) -> None:
    from ..engines.describe import engines_json, engines_table

    if as_json:
        rows = [engines_json(built) for built in engines]
        print(json.dumps([row | {"check": check} for row, check in zip(rows, checks, strict=True)] if checks else rows))
        return
    for i, built in enumerate(engines):
        show(f"{built.bundle.folder}\n{engines_table(built)}\nin {store}")
        if checks:
            from ..benchmarks.parity.check_plans import describe_check

            show(f"\n{describe_check(checks[i], built.bundle.manifest.precision)}")


def _checker(bundle: Bundle, model: str, is_models: bool, controlnet: list[str] | None) -> "Callable[..., Check]":
    """What compares the plans of a bundle with PyTorch.

    Raises:
        UserError: the checkpoint that the bundle was exported from is not known.
        CnppError: PyTorch is missing.
    """
    from functools import partial

    from ..export.provenance import find_source_checkpoint

    try:
        from ..benchmarks.parity.check_plans import check_plans
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("--check", e, *EXPORT_MODULES)) from None
    place = model if is_models or model != "miniature" else None  # a bundle names its embedded model itself
    return partial(check_plans, bundle, find_source_checkpoint(bundle, place, read_pairs(controlnet or [])))


def _export(
    model: str,
    options: CheckpointOptions,
    conditions: list[str],
    precision: str,
    size: str | None,
    out: Path | None,
    graphs: GraphOptions | None = None,
) -> Bundle:
    from ..export.allocator import return_large_blocks
    from ..export.exporter import PRECISIONS, export_model

    chosen = read_precision(precision, PRECISIONS) or precision
    pixels = read_size(size)
    require_writable(places.bundles() if out is None else out.absolute().parent)
    checkpoint = options.checkpoint(model)
    return_large_blocks()
    named = checkpoint.resolved.conditions if conditions == ["all"] else conditions
    return export_model(checkpoint, named, chosen, pixels, out, graphs)


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
