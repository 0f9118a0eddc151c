"""`cnpp-trt run`: parses, calls one function, prints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..places import runs
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    Json,
    Model,
    Plans,
    Precision,
    VramBudget,
    deployment,
    read_bytes,
    say,
    split_precision,
)


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    app.command("run")(run_command)


def run_command(
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
    from ..runtime import run as running

    out = out or runs()
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
    from ..runtime.run import ControlOption

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
