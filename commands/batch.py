"""`cnpp-trt batch`: parses, calls one function, prints."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..files import require_writable
from .options import (
    BackendName,
    BundleSize,
    BundleSource,
    Device,
    Json,
    Model,
    Plans,
    Precision,
    Presets,
    VramBudget,
    add_command,
    echo,
    fetched,
    require_choice,
    require_workers_on_ray,
    resolve_bundle,
    runtime_options,
    show,
    user_path,
)
from .progress import counting

if TYPE_CHECKING:
    from ..batch.job import Check, JobSettings, Summary, Team

_PANELS = {
    "Model": ("model", "bundle", "size", "precision", "preset"),
    "Sampling": ("keep", "tries", "score"),
    "Runtime": (
        "check",
        "strict",
        "batch_size",
        "backend",
        "device",
        "plans",
        "vram_budget",
        "threads",
        "ray",
        "workers",
    ),
    "Output": ("out", "image_format", "quality", "parquet", "shards", "as_json"),
}
_EXAMPLES = """Examples:

cnpp-trt batch jobs.jsonl --out pictures --check

cnpp-trt batch jobs.csv --out pictures --parquet --shards 1000

cnpp-trt batch jobs.parquet --out pictures --filter 'score.seg >= 80' --tries 4

cnpp-trt batch jobs.jsonl --out pictures --ray local --workers 2"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "batch", batch_command, _PANELS, _EXAMPLES)


def batch_command(
    jobs: Annotated[
        Path,
        typer.Argument(
            help="Rows as JSON lines, CSV, TSV or Parquet, or a folder of Hugging Face datasets.", callback=user_path
        ),
    ],
    *,
    model: Model = "miniature",
    bundle: BundleSource = None,
    size: BundleSize = None,
    precision: Precision = None,
    preset: Presets = None,
    check: Annotated[bool, typer.Option("--check", help="Read and check every row, and draw nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Draw nothing where a row is wrong.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=16,
            help="Images that are drawn together. Default: 4; with TensorRT, which needs a plan for each number, 1.",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--filter", help="Draw further seeds until this holds, as in 'score.seg >= 80'."),
    ] = None,
    tries: Annotated[
        int | None, typer.Option(min=1, max=1000, help="With --filter: seeds at most. Default: 4.")
    ] = None,
    score: Annotated[bool, typer.Option(help="Score each image by its conditions.")] = True,
    backend: BackendName = "auto",
    device: Device = 0,
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="CPU threads of each worker. Default: as the job was begun, else every physical core; with --ray 1.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Draw on a Ray cluster: its address, auto, or local to start one on this machine."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray. Default: one for each GPU, or for --threads CPUs.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder of all that is written; the same again goes on.", callback=user_path
        ),
    ],
    image_format: Annotated[str, typer.Option("--image-format", help="png, webp or jpeg.")] = "png",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of webp and jpeg; 100 is lossless webp.")] = 90,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write results.parquet too.")] = False,
    shards: Annotated[int | None, typer.Option(min=1, help="Write WebDataset tar files of so many images.")] = None,
    as_json: Json = False,
) -> None:
    """Draw the requests of a file, each once, and go on where it was interrupted. Exit status 1 where a row failed."""
    from ..batch.drawing import DrawingSettings, LocalTeam
    from ..batch.filters import Filter
    from ..batch.job import JobSettings, check_job, physical_cores, recorded, run_job
    from ..batch.outputs import IMAGE_FORMATS
    from ..bundles.bundle import Bundle
    from ..runtime.settings.preset import read_presets

    require_choice("--image-format", image_format, IMAGE_FORMATS)
    if tries is not None and keep is None:
        raise UserError("--tries counts the seeds of a filter: give one with --filter 'score.seg >= 80'")
    if keep is not None and not score:
        raise UserError("--filter needs scores: leave --no-score out")
    require_workers_on_ray(workers, ray)
    before = recorded(out)
    count: int = threads or before.get("threads") or (1 if ray is not None else physical_cores())
    drawing = DrawingSettings(
        keep=Filter() if keep is None else Filter.parse(keep),
        tries=1 if keep is None else tries or 4,
        scored=score,
    )
    options = runtime_options(backend, precision, count, plans, vram_budget, device)
    folder, _ = resolve_bundle(model, fetched(bundle), size, precision, backend, count, plans, vram_budget, device)
    opened = Bundle.open(folder)
    settings = JobSettings(
        jobs,
        out,
        opened,
        count,
        drawing=drawing,
        batch_size=batch_size or before.get("batch_size"),
        image_format=image_format,  # type: ignore[arg-type]  # one of IMAGE_FORMATS
        quality=quality,
        strict=strict,
        parquet=parquet,
        shard_size=shards,
        presets=read_presets(preset or [], opened),
    )
    if check:
        found = check_job(settings)
        _print_check(found, settings, as_json)
        wrong = found.counts.wrong
    else:
        require_writable(out)
        team: Team = LocalTeam(opened, options)
        if ray is not None:
            from ..batch.cluster import RayTeam
            from ..runtime.nodes import BundleOnNodes

            there = BundleOnNodes.of(opened, bundle, settings.batch_size or 1)
            team = RayTeam(ray, workers, there, options)
        with counting() as on_progress:
            summary = run_job(settings, team, on_progress)
        _print_summary(summary, settings, as_json)
        wrong = summary.counts.wrong + summary.failed
    if wrong:
        raise typer.Exit(1)


def _print_check(found: "Check", settings: "JobSettings", as_json: bool) -> None:
    counts = found.counts
    if as_json:
        print(json.dumps({**asdict(counts), "bytes": found.bytes, "hours": found.hours}))
        return
    show(
        f"{counts.rows:,} rows: {counts.requests:,} requests, {counts.duplicates:,} duplicates, {counts.wrong:,} wrong"
    )
    show(
        f"{counts.images:,} images ({counts.images_done:,} are there) in {counts.batches:,} batches of "
        f"{counts.groups:,} structures, about {found.bytes / 1e9:.2f} GB"
    )
    if found.hours is None:
        show(f"hours: known after the first batches into {settings.out}")
    else:
        show(f"about {found.hours:.2f} hours for what is missing, by the batches so far")


def _print_summary(summary: "Summary", settings: "JobSettings", as_json: bool) -> None:
    from ..batch.results import RESULTS

    counts, progress = summary.counts, summary.progress
    path = settings.out / RESULTS
    if as_json:
        of_run = {"drawn": progress.drawn, "seconds": progress.seconds, "mean_scores": progress.means}
        print(json.dumps({**asdict(counts), "failed": summary.failed, **of_run, "results": str(path)}))
        return
    echo(
        f"{counts.rows:,} rows: {counts.done:,} of {counts.requests:,} requests are drawn, {counts.duplicates:,} "
        f"duplicates, {counts.wrong:,} wrong, {summary.failed:,} failed"
    )
    if progress.drawn:
        means = "".join(f", {condition} {value:.2f}" for condition, value in sorted(progress.means.items()))
        echo(f"{progress.drawn:,} images in {progress.seconds:.1f} s, {progress.rate:.2f} images/s{means}")
    show(str(path))
