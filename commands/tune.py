"""`cnpp-trt tune`: parses, calls one function for each condition, prints."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..places import bundle_at
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    Device,
    Json,
    Model,
    Plans,
    Precision,
    ResultsFolder,
    Threads,
    add_command,
    echo,
    read_conditions,
    resolve_bundle,
    show,
    user_path,
)

if TYPE_CHECKING:
    from ..tuning.command import Tuned

_PANELS = {
    "Model": ("model", "bundle", "size", "precision"),
    "Control": ("cond",),
    "Measurement": (
        "budget",
        "trials",
        "prompts",
        "confirm",
        "attempts",
        "data",
        "ablation",
        "against",
        "exact",
        "fresh",
    ),
    "Runtime": ("backend", "device", "plans", "threads"),
    "Output": ("out", "as_json"),
}
_EXAMPLES = """Examples:

cnpp-trt tune --cond seg --budget 1.0

cnpp-trt tune --model sd15 --cond depth --data ./prompts --budget 0.5 --trials 96

cnpp-trt run --cond seg --preset cnpp-trt-results/miniature-seg.json"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "tune", tune_command, _PANELS, _EXAMPLES)


def tune_command(
    model: Model = "miniature",
    bundle: BundleFolder = None,
    size: BundleSize = None,
    precision: Precision = None,
    cond: Annotated[
        list[str] | None, typer.Option(help="Repeatable, or all: a preset each. Default: the first.")
    ] = None,
    budget: Annotated[
        float,
        typer.Option(help="Points of the condition's metric that may be lost; the upper end of the 95 % interval."),
    ] = 1.0,
    trials: Annotated[int, typer.Option(help="Settings that are tried.")] = 48,
    prompts: Annotated[int, typer.Option(help="For each of them; the best have up to four times as many.")] = 8,
    confirm: Annotated[int, typer.Option(help="Fresh prompts that decide.")] = 96,
    attempts: Annotated[
        int, typer.Option(help="Settings that may be tried to confirm, each on prompts of its own.")
    ] = 4,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with prompts.jsonl. Default: fresh scenes, for the miniatures.", callback=user_path
        ),
    ] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Measure the levers one by one, too.")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="Time the preset in turn with pytorch, or another bundle; repeatable.")
    ] = None,
    exact: Annotated[
        str | None,
        typer.Option(help="A bundle, or a model that has one, to compare with: a few-step or int8 bundle's original."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Draw everything anew instead of going on.")] = False,
    backend: BackendName = "auto",
    device: Device = 0,
    plans: Plans = None,
    threads: Threads = None,
    out: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Find the fastest setting whose pictures still follow their condition, and write it as a preset."""
    from ..benchmarks.report.tables import markdown_of
    from ..tuning.command import TuneSettings, tune
    from ..tuning.search import SearchSettings

    conditions = read_conditions(cond)
    search = SearchSettings(budget, trials, prompts, confirm, attempts)
    folder, open_pipeline = resolve_bundle(model, bundle, size, precision, backend, threads, plans, None, device)
    with ExitStack() as stack:
        pipeline = stack.enter_context(open_pipeline(folder))
        reference = None
        if exact is not None:
            own = bundle_at(exact)
            original, open_original = resolve_bundle(exact, own, size, None, backend, threads, plans, None, device)
            reference = stack.enter_context(open_original(original))
        of_bundle = list(pipeline.bundle.manifest.conditions)
        for condition in of_bundle if conditions == ["all"] else conditions or of_bundle[:1]:
            settings = TuneSettings(condition, search, data, ablation, against or (), fresh, out)
            tuned = tune(pipeline, settings, reference)
            if as_json:
                print(json.dumps(_summary(tuned)))
            else:
                echo(markdown_of(tuned.result))
                show(str(tuned.preset_file))


def _summary(tuned: "Tuned") -> dict[str, object]:
    from ..schema import builtins

    files = {"preset": str(tuned.preset_file), "result": str(tuned.result_file)}
    p = tuned.preset
    return {**files, "condition": p.condition, "levers": builtins(p.levers), "evidence": builtins(p.evidence)}
