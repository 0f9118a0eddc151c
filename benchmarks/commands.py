"""`cnpp-trt bench`, `parity`, `consistency` and `report`: parse, call one function, print."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Json, read_counts, read_pairs, read_size, say


def register(app: typer.Typer) -> None:
    """Adds the commands to `cnpp-trt`. Nothing heavy is imported until one of them runs."""
    app.command("bench")(bench_command)
    app.command("parity")(parity_command)
    app.command("report")(report_command)


def bench_command(
    model: Annotated[
        str | None, typer.Option(help="As for `export`. With --bundle, the checkpoint that it was exported from.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Measure this bundle. Default: the model's, exported where missing.")
    ] = None,
    controlnet: Annotated[list[str] | None, typer.Option(help="COND=PATH, as it was exported; repeatable.")] = None,
    cond: Annotated[str, typer.Option(help="The condition.")] = "seg",
    size: Annotated[
        list[str] | None, typer.Option(help="512 or WxH, in pixels; repeatable. Default: the model's own.")
    ] = None,
    images: Annotated[str, typer.Option(help="Images per prompt, as in 1 or 1-4.")] = "1-4",
    steps: Annotated[str, typer.Option(help="Denoising steps; up to 8 are LCM without guidance.")] = "20,4,50",
    scheduler: Annotated[str | None, typer.Option(help="For any number of steps. Default: the model's.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Who takes part; repeatable. Default: all.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every physical core.")] = None,
    rounds: Annotated[int, typer.Option(help="Of the base case; the others have a quarter of it.")] = 20,
    seconds: Annotated[float, typer.Option(help="After which a case has no further round, once it has 3.")] = 60.0,
    waterfall: Annotated[bool, typer.Option(help="Measure each of the runtime's techniques too.")] = True,
    out: Annotated[Path | None, typer.Option(help="The folder of the results. Default: under CNPP_TRT_HOME.")] = None,
    as_json: Json = False,
) -> None:
    """How fast, beside PyTorch: the first of sizes, images and steps is the base case, each other one varies it."""
    from . import bench
    from .report.tables import markdown_of

    settings = bench.Settings(
        condition=cond,
        sizes=tuple(pixels for pixels in map(read_size, size or []) if pixels is not None),
        images=read_counts(images),
        steps=read_counts(steps),
        scheduler=scheduler,
        contenders=tuple(contender or ()),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )
    results = bench.run(model, bundle, read_pairs(controlnet or []), settings, out, waterfall, say)
    if as_json:
        print(json.dumps({str(path): result.data for path, result in results.items()}))
        return
    for path, result in results.items():
        print(f"{markdown_of(result)}\n\n{path}")


def parity_command(
    model: Annotated[
        str | None, typer.Option(help="As for `run`. With --bundle, the checkpoint that it was exported from.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A bundle's folder. Default: the model's, under CNPP_TRT_HOME.")
    ] = None,
    controlnet: Annotated[list[str] | None, typer.Option(help="COND=PATH, as it was exported; repeatable.")] = None,
    cond: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all of the bundle's.")] = None,
    size: Annotated[str | None, typer.Option(help="Which of the model's bundles: 512 or WxH.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Which of the model's bundles: fp32 or fp16. With --backend openvino also f32 or bf16."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="auto, tensorrt, onnxruntime-cuda, onnxruntime-cpu or openvino.")
    ] = "auto",
    plans: Annotated[Path | None, typer.Option(help="The plan store. Default: under CNPP_TRT_HOME.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of each condition.")] = 8,
    half: Annotated[
        int | None,
        typer.Option(min=0, help="So many of them in PyTorch's fp16 too. Default: all on a GPU; on a CPU 1, if small."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's, or 20.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every physical core.")] = None,
    thresholds: Annotated[Path | None, typer.Option(help="A TOML file like benchmarks/thresholds.toml.")] = None,
    out: Annotated[Path | None, typer.Option(help="The result's file. Default: under CNPP_TRT_HOME.")] = None,
    as_json: Json = False,
) -> None:
    """How close to PyTorch: every graph, every step, and the images. Exit status 1 where a threshold is missed."""
    from ..bundle import find_bundle
    from ..errors import CnppError
    from ..export.checkpoint import checkpoint_of
    from ..runtime.backends.choose import preferred_precisions
    from ..runtime.backends.openvino import PRECISIONS as OPENVINO_PRECISIONS
    from ..runtime.pipeline import Pipeline
    from .result import Result, default_path
    from .verdict import read_thresholds

    try:
        import torch

        from . import parity
        from .parity_tables import describe
    except ModuleNotFoundError as e:
        raise CnppError(f"parity needs {e.name}: pip install 'cnpp-trt[bench,export]'") from None
    openvino_precision, precision = (precision, None) if precision in OPENVINO_PRECISIONS else (None, precision)
    pixels = read_size(size)
    folder = bundle or find_bundle(model or "miniature", precision, pixels, preferred_precisions(backend))
    deployed = Pipeline.open(folder, backend, threads, openvino_precision=openvino_precision, plans=plans)
    own = list(deployed.bundle.manifest.conditions)
    conditions = own if not cond or cond == ["all"] else list(dict.fromkeys(cond))
    checkpoint = checkpoint_of(deployed.bundle, model, read_pairs(controlnet or []))
    allowed = read_thresholds(parity.precision_of(deployed), thresholds)
    if threads is not None:
        torch.set_num_threads(threads)
    found = parity.measure(
        deployed, checkpoint, conditions, allowed, images=images, half=half, steps=steps, report=say
    )
    m, name = deployed.bundle.manifest, deployed.backend.name
    asked = openvino_precision or m.precision
    command = f"cnpp-trt parity --model {m.model} --precision {asked} --backend {name.removesuffix('-bf16')}"
    command += "".join(f" --cond {c}" for c in conditions if conditions != own) + f" --images {images}"
    result = Result.of("parity", f"{m.model}, {found['precision']} on {name}", command, found, threads)
    path = out or default_path("parity", f"{deployed.bundle.folder.name}-{name}")
    result.write(path)
    if as_json:
        shown: dict[str, Any] = {**found, "result": str(path)}
        del shown["heatmaps"]  # they are in the file
        print(json.dumps(shown))
    else:
        print(f"{describe(found)}\n\n{path}")
    for line in found["missed"]:
        say(f"missed: {line}")
    if found["missed"]:
        raise typer.Exit(1)


def report_command(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Results or folders of them. Default: those under CNPP_TRT_HOME.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder. Default: CNPP_TRT_HOME/report.")] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="What moved from the first to the second. Default: for two alike."),
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Write this file's tables anew from the results in the repository.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Results → one HTML page and its Markdown twin; of two results of one kind and title, what moved beyond noise."""
    from .report.command import run_report

    run_report(results or [], out, compare, readme, as_json)
