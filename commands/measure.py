"""`cnpp-trt bench`, `parity`, `consistency` and `report`: parse, call one function, print."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CnppError
from ..files import require_writable
from ..install import EXPORT_MODULES, cannot_import
from ..places import results as results_folder
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    BundleSource,
    Device,
    Json,
    Plans,
    Precision,
    ResultsFolder,
    SourceControlNets,
    SourceModel,
    Threads,
    add_command,
    echo,
    fetched,
    read_conditions,
    read_counts,
    read_pairs,
    read_size,
    require_workers_on_ray,
    resolve_bundle,
    runtime_options,
    show,
    user_path,
)

_BUNDLE = ("model", "bundle", "controlnet", "size", "precision")
_BENCH_PANELS = {
    "Model": ("model", "bundle", "controlnet", "size"),
    "Sampling": ("images", "steps", "scheduler"),
    "Control": ("cond",),
    "Runtime": ("contender", "threads"),
    "Measurement": ("rounds", "seconds", "waterfall", "sweep"),
    "Output": ("out", "as_json"),
}
_BENCH_EXAMPLES = """Examples:

cnpp-trt bench --cond seg --rounds 10

cnpp-trt bench --model sd15 --cond seg --size 512 --steps 20 --num-images 1 --contender tensorrt"""
_PARITY_PANELS = {
    "Model": _BUNDLE,
    "Sampling": ("images", "half", "steps"),
    "Control": ("cond",),
    "Runtime": ("backend", "device", "plans", "threads"),
    "Measurement": ("thresholds",),
    "Output": ("out", "as_json"),
}
_PARITY_EXAMPLES = """Examples:

cnpp-trt parity --cond seg --num-images 2

cnpp-trt parity --model sd15 --precision fp16 --backend tensorrt --thresholds ./thresholds.toml"""
_CONSISTENCY_PANELS = {
    "Model": _BUNDLE,
    "Prompt": ("data", "prompts", "negative_prompt"),
    "Sampling": ("images", "steps", "guidance_scale", "scheduler"),
    "Control": ("cond",),
    "Runtime": ("backend", "device", "plans", "threads", "ray", "workers"),
    "Measurement": ("against", "fid", "clip_score", "shard", "fresh"),
    "Output": ("out", "as_json"),
}
_CONSISTENCY_EXAMPLES = """Examples:

cnpp-trt consistency --cond seg --prompts 8 --num-images 1

cnpp-trt consistency --cond all --against pytorch

cnpp-trt consistency --model sd15 --cond depth --data ./coco --shard 2/4"""
_REPORT_PANELS = {"Output": ("out", "compare", "as_json")}
_REPORT_EXAMPLES = """Examples:

cnpp-trt report

cnpp-trt report ./before ./after --compare --out ./page"""


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    add_command(app, "bench", bench_command, _BENCH_PANELS, _BENCH_EXAMPLES)
    add_command(app, "parity", parity_command, _PARITY_PANELS, _PARITY_EXAMPLES)
    add_command(app, "consistency", consistency_command, _CONSISTENCY_PANELS, _CONSISTENCY_EXAMPLES)
    add_command(app, "report", report_command, _REPORT_PANELS, _REPORT_EXAMPLES)


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
    contender: Annotated[
        list[str] | None, typer.Option(help="A system to measure; repeatable. Default: all that run here.")
    ] = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the base case; other cases have a quarter.")] = 20,
    seconds: Annotated[float, typer.Option(help="Time limit of a case, which has 3 rounds at least.")] = 60.0,
    waterfall: Annotated[bool, typer.Option(help="Measure each of the runtime's optimizations too.")] = True,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure TensorRT's builder settings in the base case instead; on a GPU.")
    ] = False,
    out: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Measure latency beside PyTorch.

    The first value of --size, --num-images and --steps is the base case; the others are varied one at a time.
    """
    from ..benchmarks.latency import bench
    from ..benchmarks.report.tables import markdown_of
    from ..export.allocator import return_large_blocks
    from ..runtime.settings.request import MAX_IMAGES, MAX_STEPS

    conditions, pairs = read_conditions(cond or ["seg"]), read_pairs(controlnet or [])
    settings = bench.BenchSettings(
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
    return_large_blocks()  # it exports what is missing
    results: dict[Path, Any] = {}
    for condition in conditions:
        chosen = replace(settings, condition=condition)
        if sweep:
            results |= bench.run_sweep(model, bundle, pairs, chosen, out)
        else:
            results |= bench.run_bench(model, bundle, pairs, chosen, out, waterfall)
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
    device: Device = 0,
    plans: Plans = None,
    images: Annotated[int, typer.Option("--num-images", "-n", "--images", min=1, help="Images of each condition.")] = 8,
    half: Annotated[
        int | None,
        typer.Option(
            min=0, help="Images also computed in PyTorch's fp16. Default: all on a GPU; on a CPU 1, if small."
        ),
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
    """Compare every graph, every step and the images with PyTorch. Exit status 1 where a threshold is missed."""
    from ..benchmarks.report.fidelity import conclusion
    from ..benchmarks.report.tables import markdown_of

    try:
        from ..benchmarks.parity.command import ParitySettings, measure_parity
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import("parity", e, *EXPORT_MODULES, "skimage")) from None
    folder, open_pipeline = resolve_bundle(model, bundle, size, precision, backend, threads, plans, device=device)
    deployed = open_pipeline(folder)
    settings = ParitySettings(
        conditions=read_conditions(cond, list(deployed.bundle.manifest.conditions)),
        images=images,
        half=half,
        steps=steps,
        thresholds=thresholds,
        threads=threads,
        model=model,
        controlnets=read_pairs(controlnet or []),
        out=out,
    )
    result, path = measure_parity(deployed, settings)
    data: Any = result.data
    if as_json:
        print(json.dumps({**_without(data, "heatmaps"), "result": str(path)}))
    else:
        show(f"{markdown_of(result)}\n\n{conclusion(data)}\n\n{path}")
    for line in data["missed"]:
        echo(f"missed: {line}")
    if data["missed"]:
        raise typer.Exit(1)


def consistency_command(
    model: SourceModel = None,
    bundle: BundleSource = None,
    controlnet: SourceControlNets = None,
    cond: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all of the bundle's.")] = None,
    size: BundleSize = None,
    precision: Precision = None,
    backend: BackendName = "auto",
    device: Device = 0,
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
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts. Default: all of --data, or 64 scenes.")
    ] = None,
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
    ray: Annotated[
        str | None,
        typer.Option(help="Generate on a Ray cluster: its address, auto, or local to start one on this machine."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray. Default: one for each GPU, or for --threads CPUs.")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: process every n-th prompt, starting at the i-th.")] = "1/1",
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove earlier records instead of resuming.")] = False,
    fid: Annotated[
        Path | None, typer.Option(help="A folder of real images: compute the FID to them.", callback=user_path)
    ] = None,
    clip_score: Annotated[
        str | None, typer.Option(help="A CLIP model; the paper's is openai/clip-vit-base-patch16.")
    ] = None,
    out: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Measure how well images follow their condition, over many prompts, beside PyTorch's. Can be resumed."""
    from ..benchmarks.consistency.command import ConsistencySettings, measure_consistency
    from ..benchmarks.consistency.shards import Shard
    from ..benchmarks.report.tables import markdown_of

    own_shard = Shard.parse(shard)
    require_workers_on_ray(workers, ray)
    threads = threads or (1 if ray is not None else None)
    folder, open_pipeline = resolve_bundle(
        model, fetched(bundle), size, precision, backend, threads, plans, device=device
    )
    deployed = open_pipeline(folder)
    settings = ConsistencySettings(
        conditions=read_conditions(cond, list(deployed.bundle.manifest.conditions)),
        against=against or [],
        data=data,
        prompts=prompts,
        images=images,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        shard=own_shard,
        fresh=fresh,
        fid=fid,
        clip_score=clip_score,
        threads=threads,
        model=model,
        controlnets=read_pairs(controlnet or []),
        out=out,
    )
    on_workers = None
    if ray is not None:
        from ..benchmarks.consistency.cluster import ray_generator
        from ..runtime.nodes import BundleOnNodes

        there = BundleOnNodes.of(deployed.bundle, bundle, images)
        options = runtime_options(backend, precision, threads, plans, None, device)
        on_workers = partial(ray_generator, ray, workers, there, deployed.backend.name, options)
    result, path = measure_consistency(deployed, settings, open_pipeline, on_workers)
    if as_json:
        print(json.dumps({**_without(result.data, "sheets"), "result": str(path)}))
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
        typer.Option(
            "--compare/--no-compare",
            help="Show what changed from the first to the second. Default: for two of one kind.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write results as one HTML page and as Markdown. Two results of one kind and title are compared."""
    from ..benchmarks.report.command import run_report

    require_writable(out or results_folder())
    run_report(results or [], out, compare, as_json)


def _without(data: Mapping[str, Any], pictures: str) -> dict[str, Any]:
    """A result's data without its pictures, which stand in the file."""
    return {key: value for key, value in data.items() if key != pictures}
