"""`cnpp-trt bench`, `parity`, `consistency` and `report`: parse, call one function, print."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CnppError, UserError
from ..files import require_writable, require_writable_file
from ..install import EXPORT_MODULES, cannot_import
from ..places import results as results_folder
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    Json,
    Plans,
    Precision,
    ResultsFolder,
    SourceControlNets,
    SourceModel,
    Threads,
    deployment,
    read_conditions,
    read_counts,
    read_pairs,
    read_size,
    say,
    show,
    user_path,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    app.command("bench")(bench_command)
    app.command("parity")(parity_command)
    app.command("consistency")(consistency_command)
    app.command("report")(report_command)


def bench_command(
    model: Annotated[
        str | None, typer.Option(help="As for `export`. With --bundle, the checkpoint that it was exported from.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Measure this bundle. Default: the model's, exported where missing.", callback=user_path),
    ] = None,
    controlnet: SourceControlNets = None,
    cond: Annotated[list[str] | None, typer.Option(help="Repeatable, or all: each on its own. Default: seg.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="512 or WxH, in pixels; repeatable. Default: the model's own, and 1.5 times it."),
    ] = None,
    images: Annotated[
        str, typer.Option("--num-images", "-n", "--images", help="Images per prompt, as in 1 or 1-4.")
    ] = "1-4",
    steps: Annotated[
        str,
        typer.Option("--steps", "-s", "--num-inference-steps", help="As in 20,4; up to 8 are LCM without guidance."),
    ] = "20,4,50",
    scheduler: Annotated[str | None, typer.Option(help="For any number of steps. Default: the model's.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Who takes part; repeatable. Default: all.")] = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="Of the base case; the others have a quarter of it.")] = 20,
    seconds: Annotated[float, typer.Option(help="After which a case has no further round, once it has 3.")] = 60.0,
    waterfall: Annotated[bool, typer.Option(help="Measure each of the runtime's techniques too.")] = True,
    out: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """How fast, beside PyTorch: the first of sizes, images and steps is the base case, each other one varies it."""
    from ..benchmarks.latency import bench
    from ..benchmarks.report.tables import markdown_of
    from ..runtime.request import MAX_IMAGES, MAX_STEPS

    conditions, pairs = read_conditions(cond or ["seg"]), read_pairs(controlnet or [])
    settings = bench.Settings(
        sizes=tuple(pixels for pixels in map(read_size, size or []) if pixels is not None),
        images=read_counts(images, most=MAX_IMAGES),
        steps=read_counts(steps, "--steps", MAX_STEPS),
        scheduler=scheduler,
        contenders=tuple(contender or ()),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )
    require_writable(out or results_folder())
    if conditions == ["all"]:
        conditions = bench.conditions_of(model, bundle, pairs)
    results: dict[Path, Any] = {}
    for condition in conditions:
        results |= bench.run(model, bundle, pairs, replace(settings, condition=condition), out, waterfall, say)
    if as_json:
        print(json.dumps({str(path): result.data for path, result in results.items()}))
        return
    for path, result in results.items():
        show(f"{markdown_of(result)}\n\n{path}")


def parity_command(
    model: SourceModel = None,
    bundle: BundleFolder = None,
    controlnet: SourceControlNets = None,
    cond: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all of the bundle's.")] = None,
    size: BundleSize = None,
    precision: Precision = None,
    backend: BackendName = "auto",
    plans: Plans = None,
    images: Annotated[int, typer.Option("--num-images", "-n", "--images", min=1, help="Images of each condition.")] = 8,
    half: Annotated[
        int | None,
        typer.Option(min=0, help="So many of them in PyTorch's fp16 too. Default: all on a GPU; on a CPU 1, if small."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "-s", "--num-inference-steps", min=1, max=1000, help="Denoising steps. Default: the model's."
        ),
    ] = None,
    threads: Threads = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="A TOML file like benchmarks/parity/thresholds.toml.", callback=user_path)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The result's file. Default: in ./cnpp-trt-results.", callback=user_path),
    ] = None,
    as_json: Json = False,
) -> None:
    """How close to PyTorch: every graph, every step, and the images. Exit status 1 where a threshold is missed."""
    from ..benchmarks.parity.thresholds import read_thresholds
    from ..benchmarks.report.fidelity import conclusion
    from ..benchmarks.report.tables import markdown_of
    from ..benchmarks.result import Result, default_path
    from ..export.provenance import find_source_checkpoint

    try:
        import torch

        from ..benchmarks.parity import measure as parity
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("parity", e, *EXPORT_MODULES, "skimage")) from None
    if out is None:
        require_writable(results_folder())
    else:
        require_writable_file(out)
    folder, open_pipeline = deployment(model, bundle, size, precision, backend, threads, plans)
    deployed = open_pipeline(folder)
    own = list(deployed.bundle.manifest.conditions)
    conditions = read_conditions(cond, own)
    checkpoint = find_source_checkpoint(deployed.bundle, model, read_pairs(controlnet or []))
    allowed = read_thresholds(parity.precision_of(deployed), thresholds)
    if threads is not None:
        torch.set_num_threads(threads)
    found = parity.measure(deployed, checkpoint, conditions, allowed, images=images, half=half, steps=steps, report=say)
    m, name = deployed.bundle.manifest, deployed.backend.name
    asked = precision or m.precision
    command = (
        f"cnpp-trt parity --model {shlex.quote(m.model)} --precision {asked} --backend {name.removesuffix('-bf16')}"
    )
    command += "".join(f" --cond {c}" for c in conditions if conditions != own) + f" --images {images}"
    result = Result.of("parity", f"{m.model}, {found['precision']} on {name}", command, found, threads)
    path = out or default_path("parity", f"{deployed.bundle.folder.name}-{name}")
    result.write(path)
    if as_json:
        shown: dict[str, Any] = {**found, "result": str(path)}
        del shown["heatmaps"]  # they are in the file
        print(json.dumps(shown))
    else:
        show(f"{markdown_of(result)}\n\n{conclusion(found)}\n\n{path}")
    for line in found["missed"]:
        say(f"missed: {line}")
    if found["missed"]:
        raise typer.Exit(1)


def consistency_command(
    model: SourceModel = None,
    bundle: BundleFolder = None,
    controlnet: SourceControlNets = None,
    cond: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all of the bundle's.")] = None,
    size: BundleSize = None,
    precision: Precision = None,
    backend: BackendName = "auto",
    plans: Plans = None,
    threads: Threads = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="pytorch, pytorch-fp16, a bundle's folder, or a model with a bundle; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with prompts.jsonl. Default: fresh scenes of the embedded models.", callback=user_path
        ),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="So many. Default: all of --data, or 64 scenes.")] = None,
    images: Annotated[
        int, typer.Option("--num-images", "-n", "--images", min=1, max=16, help="Images per prompt.")
    ] = 4,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Default: the paper's, or none for an embedded model.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "-s",
            "--num-inference-steps",
            min=1,
            max=1000,
            help="Denoising steps. Default: an embedded model's, or the paper's 20.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", help="Default: an embedded model's, or the paper's 7.5."),
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Default: the model's, or unipc.")] = None,
    shard: Annotated[str, typer.Option(help="As in 2/4: this process draws every fourth prompt, from the 2nd.")] = (
        "1/1"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove earlier records instead of going on.")] = False,
    fid: Annotated[
        Path | None, typer.Option(help="A folder of real images: compute the FID to them.", callback=user_path)
    ] = None,
    clip_score: Annotated[
        str | None, typer.Option(help="A CLIP model; the paper's is openai/clip-vit-base-patch16.")
    ] = None,
    out: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """How well images follow their condition, over many prompts, beside PyTorch's. Interrupted, it goes on."""
    from ..benchmarks import systems as sides
    from ..benchmarks.consistency import study as consistency
    from ..benchmarks.consistency.dataset import open_data
    from ..benchmarks.consistency.scores import measure_quality, summarize
    from ..benchmarks.consistency.shards import Shard
    from ..benchmarks.report.tables import markdown_of
    from ..benchmarks.result import Result, default_path

    own_shard = Shard.parse(shard)
    if fresh and own_shard.of > 1:
        raise UserError("--fresh would remove what other shards draw: choose a new folder with --out instead")
    for place in (results_folder(), out or results_folder()):  # the result, and the records
        require_writable(place)
    folder, open_pipeline = deployment(model, bundle, size, precision, backend, threads, plans)
    deployed = open_pipeline(folder)
    m, name = deployed.bundle.manifest, f"{deployed.bundle.folder.resolve().name}-{deployed.backend.name}"
    conditions = read_conditions(cond, list(m.conditions))
    fid_metric, clip_metric = None, None
    if fid is not None or clip_score is not None:  # before anything is drawn: what they need may be missing
        try:
            from ..benchmarks.consistency.quality import ClipScore, Fid
        except ModuleNotFoundError as e:
            raise CnppError(cannot_import("FID and CLIP score", e, "torchmetrics", "torch_fidelity")) from None
        fid_metric = Fid(fid, (m.width, m.height)) if fid is not None else None
        clip_metric = ClipScore(clip_score) if clip_score is not None else None
    study = consistency.Study(
        deployed,
        [
            sides.deployed_side(deployed),
            *sides.other_sides(against or [], deployed, open_pipeline, model, read_pairs(controlnet or []), threads),
        ],
        open_data(deployed, conditions, data, prompts),
        conditions,
        consistency.protocol_of(m, images, negative_prompt, steps, guidance_scale, scheduler),
        out or results_folder() / "consistency" / name,
        keep_pictures=fid_metric is not None or clip_metric is not None,
    )
    if fresh:
        consistency.start_again(study)
    consistency.draw(study, own_shard, say)
    found = summarize(study, say)
    found["quality"] = measure_quality(study, fid_metric, clip_metric, say)
    result = Result.of("consistency", sides.title_of(deployed), consistency.command_of(study, data), found, threads)
    path = default_path("consistency", name)
    result.write(path)
    if as_json:
        shown: dict[str, Any] = {**found, "result": str(path)}
        del shown["sheets"]  # they are in the file
        print(json.dumps(shown))
    else:
        show(f"{markdown_of(result)}\n\n{path}")


def report_command(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Results or folders of them. Default: ./cnpp-trt-results.", callback=user_path),
    ] = None,
    out: ResultsFolder = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="What moved from the first to the second. Default: for two alike."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Results → one HTML page and its Markdown twin; of two results of one kind and title, what moved beyond noise."""
    from ..benchmarks.report.command import run_report

    require_writable(out or results_folder())
    run_report(results or [], out, compare, as_json)
