"""`cnpp-trt run`: parses, calls one function, prints."""

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from ..files import require_writable
from ..messages import printable
from ..places import runs
from .options import (
    BackendName,
    BundleFolder,
    BundleSize,
    Device,
    Json,
    Model,
    Plans,
    Precision,
    Presets,
    Threads,
    VramBudget,
    add_command,
    echo,
    read_conditions,
    read_size,
    require_choice,
    resolve_bundle,
    runtime_options,
    show,
    user_path,
)
from .progress import drawing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..runtime.generate import GenerateResult
    from ..runtime.settings.preset import Preset

_PANELS = {
    "Model": ("model", "bundle", "size", "precision"),
    "Prompt": (
        "prompt",
        "negative_prompt",
        "prompt_weights",
        "long_prompt",
        "clip_skip",
        "clip_skip_negative",
    ),
    "Control": (
        "cond",
        "image",
        "extract",
        "resize_mode",
        "control_scale",
        "control_start",
        "control_end",
        "guess_mode",
    ),
    "Sampling": (
        "steps",
        "scheduler",
        "timestep_spacing",
        "guidance_scale",
        "guidance_start",
        "guidance_end",
        "seed",
        "num_images",
        "init_image",
        "strength",
        "preset",
        "guidance_interval",
        "controlnet_interval",
        "cache_interval",
    ),
    "Runtime": ("backend", "device", "plans", "vram_budget", "threads"),
    "Output": ("out", "repeat", "as_json"),
}
"""Where the help shows each option."""

_EXAMPLES = """Examples:

cnpp-trt run --cond seg --image map.png -p "a red house by a lake" -n 4

cnpp-trt run --cond depth --cond canny --extract --image photo.jpg --resize-mode crop -s 30

cnpp-trt run --repeat cnpp-trt-runs/run-0001/image-0.png"""


def register(app: typer.Typer) -> None:
    """Adds the command to `cnpp-trt`. Nothing heavy is imported until it runs."""
    add_command(app, "run", run_command, _PANELS, _EXAMPLES)


def run_command(
    model: Model = "miniature",
    bundle: BundleFolder = None,
    size: BundleSize = None,
    precision: Precision = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Default: the example's.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What not to draw; counts with guidance only.")] = "",
    prompt_weights: Annotated[
        bool,
        typer.Option("--prompt-weights", help="Read (word), (word:1.4) and [word] as emphasis, as AUTOMATIC1111 does."),
    ] = False,
    long_prompt: Annotated[
        bool, typer.Option("--long-prompt", help="Read more than 77 tokens, in chunks as AUTOMATIC1111 does.")
    ] = False,
    clip_skip: Annotated[
        int,
        typer.Option(
            help="Leave out so many of the text encoder's last layers, as diffusers counts: AUTOMATIC1111's 2 is 1."
        ),
    ] = 0,
    clip_skip_negative: Annotated[
        bool,
        typer.Option("--clip-skip-negative", help="Skip layers for the negative prompt too, as AUTOMATIC1111 does."),
    ] = False,
    cond: Annotated[
        list[str] | None,
        typer.Option(
            help="seg, canny, hed, lineart or depth; repeatable. `all`: each that the bundle has. Default: its first."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Control image of each --cond. Default: the model's example.", callback=user_path),
    ] = None,
    extract: Annotated[
        bool, typer.Option("--extract", help="The images are photos: extract the conditions first.")
    ] = False,
    resize_mode: Annotated[
        str,
        typer.Option(
            help="Images of another shape: stretch (just resize), crop (crop and resize) or pad (resize and fill)."
        ),
    ] = "stretch",
    control_scale: Annotated[list[float] | None, typer.Option(help="Once for all controls, or one each.")] = None,
    control_start: Annotated[list[float] | None, typer.Option(help="Share of steps at which control starts.")] = None,
    control_end: Annotated[list[float] | None, typer.Option(help="Share of steps at which control ends.")] = None,
    guess_mode: Annotated[
        bool, typer.Option("--guess-mode", help="Follow the control images also where the prompt says nothing.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-inference-steps", "-s", help="Denoising steps, 1 to 1000. Default: the model's, or 20."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            "--sampler",
            help="unipc, ddim, euler, dpmpp_2m, dpmpp_2m_karras or lcm; also as AUTOMATIC1111 (`DPM++ 2M Karras`) or "
            "diffusers calls it. Default: the model's, or unipc.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", help="1 or less: unguided. Default: the model's, or 7.5."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="0 to 2**64 - 1, -1: random; image i has seed + i. Default: the example's.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images of this prompt, 1 to 16.")] = 1,
    images: Annotated[int | None, typer.Option("--images", hidden=True)] = None,
    init_image: Annotated[
        Path | None, typer.Option(help="Begin with this image instead of noise alone.", callback=user_path)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --init-image: how much of it is drawn anew, above 0 to 1. Default: 0.8.")
    ] = None,
    preset: Presets = None,
    timestep_spacing: Annotated[
        str | None,
        typer.Option(help="ays (Align Your Steps: for few steps), karras or trailing. Default: the model's."),
    ] = None,
    guidance_start: Annotated[float | None, typer.Option(help="Share of steps at which guidance starts.")] = None,
    guidance_end: Annotated[
        float | None, typer.Option(help="Share of steps at which guidance ends: the others cost half.")
    ] = None,
    guidance_interval: Annotated[
        int | None,
        typer.Option(help="Guidance is computed at every so many-th step, and kept between. Default: 1."),
    ] = None,
    controlnet_interval: Annotated[
        int | None, typer.Option(help="The ControlNets run at every so many-th step. Default: 1.")
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(help="So do the UNet's deeper layers. Needs a bundle of `export --deep-cache`. Default: 1."),
    ] = None,
    backend: BackendName = "auto",
    device: Device = 0,
    plans: Plans = None,
    vram_budget: VramBudget = None,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Pictures go into a new folder in here. Default: ./cnpp-trt-runs.", callback=user_path
        ),
    ] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="Repeat a picture from its own metadata.", callback=user_path)
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw pictures that follow a condition, and a sheet that shows how well they do."""
    from ..runtime import generate as generation
    from ..runtime.sampling.scheduler_names import read_scheduler

    out = out or runs()
    options = runtime_options(backend, precision, threads, plans, vram_budget, device)
    if repeat is not None:
        from ..runtime.repeat import repeat as repeat_image

        require_writable(out)
        with drawing() as progress:
            repeated = repeat_image(repeat, out, bundle, options, on_progress=progress)
        _print_result(repeated.generated, as_json, {"max_difference": repeated.max_difference})
        same = repeated.max_difference == 0
        echo("the pixels are the same" if same else f"the pixels differ by up to {repeated.max_difference} of 255")
        return
    # Whatever can be known to be wrong is, before a bundle is looked for.
    if strength is not None and init_image is None:
        raise UserError("--strength says how much of an initial image is drawn anew: give one with --init-image FILE")
    read_size(size)
    given = {
        "prompt": prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": None if scheduler is None else read_scheduler(scheduler),
        "seed": secrets.randbits(32) if seed == -1 else seed,
        "strength": strength,
    }
    fields: dict[str, Any] = {
        "negative_prompt": negative_prompt,
        "num_images_per_prompt": num_images if images is None else images,
        "clip_skip": clip_skip,
        "clip_skip_negative": clip_skip_negative,
        "prompt_weights": prompt_weights,
        "long_prompt": long_prompt,
        "guess_mode": guess_mode,
        "timestep_spacing": timestep_spacing,
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "guidance_interval": guidance_interval,
        "controlnet_interval": controlnet_interval,
        "cache_interval": cache_interval,
    }
    fields |= {name: value for name, value in given.items() if value is not None}
    mode = _resize_mode(resize_mode)
    several = (control_scale, control_start, control_end)
    _require_values(fields, cond or [], several)
    everything = cond == ["all"]
    if not everything:
        _controls(cond or ["the first"], image or [], extract, *several)
    folder, open_pipeline = resolve_bundle(
        model, bundle, size, precision, backend, threads, plans, vram_budget, device, preset or ()
    )
    require_writable(out)
    with drawing() as progress:
        pipeline = open_pipeline(folder)
        of_bundle = list(pipeline.bundle.manifest.conditions)
        conditions = of_bundle if everything else cond or of_bundle[:1]
        _require_presets(pipeline.presets, conditions)
        controls = _controls(conditions, image or [], extract, *several)
        asked = generation.make_request(
            pipeline, controls, extract=extract, init_image=init_image, resize_mode=mode, **fields
        )
        for note in asked.notes:  # now, as drawing may take minutes
            echo(f"note: {printable(note, 1000)}")
        result = generation.generate(pipeline, asked.request, out, asked.notes, asked.photos, progress)
    _print_result(result, as_json, {}, printed=len(asked.notes))


def _resize_mode(text: str) -> Any:
    from ..runtime.images.fitting import RESIZE_MODES

    return require_choice("--resize-mode", text, RESIZE_MODES)


def _require_values(fields: dict[str, Any], conditions: list[str], several: tuple[list[float] | None, ...]) -> None:
    """Checks the values that no bundle takes.

    Raises:
        UserError: one cannot be used; the message names the option.
    """
    import numpy as np

    from ..runtime.settings.request import Control, Request

    read_conditions(conditions)
    if "all" in conditions and len(conditions) > 1:
        raise UserError("--cond all stands for every condition of the bundle: give no other --cond beside it")
    nothing = np.zeros((16, 16, 3), np.uint8)
    scales, starts, ends = (values or [default] for values, default in zip(several, (1.0, 0.0, 1.0), strict=True))
    longest = max(len(scales), len(starts), len(ends))
    Request(**fields)
    for i in range(longest):
        values = [each[i] if i < len(each) else each[0] for each in (scales, starts, ends)]
        Control("seg", nothing, *values)


def _require_presets(presets: "Mapping[str, Preset]", conditions: list[str]) -> None:
    """Checks that presets say something of what is drawn.

    Raises:
        UserError: they do not.
    """
    if presets and len(conditions) > 1:
        raise UserError("--preset is for one condition: give one --cond")
    if presets and conditions[0] not in presets:
        raise UserError(f"--preset is for {', '.join(presets)}, not {conditions[0]}: give --cond {next(iter(presets))}")


def _print_result(result: "GenerateResult", as_json: bool, extra: dict[str, Any], printed: int = 0) -> None:
    """Prints what a run wrote; the first `printed` of its notes are printed already."""
    for note in result.notes[printed:]:
        echo(f"note: {printable(note, 1000)}")
    if as_json:
        print(json.dumps({**result.to_json(), **extra}))
        return
    echo(_summary(result.request))
    stages = {k: v for k, v in result.timings.items() if k != "total"}
    echo(f"{'total':<13}{result.timings['total']:8.3f} s on {result.backend} ({result.reason})")
    for stage, seconds in stages.items():
        echo(f"  {stage:<11}{seconds:8.3f} s")
    if result.memory:
        parts = ", ".join(f"{part} {nbytes / 2**20:.0f} MiB" for part, nbytes in result.memory.items())
        echo(f"device memory {parts}")
    for condition, scores in result.scores:
        graded = (f"{s} ({s.grade})" if s.grade else str(s) for s in scores)
        echo(f"consistency {condition}: {', '.join(graded)}")
    for path in (*result.images, *([result.sheet] if result.sheet else [])):
        show(str(path))


def _summary(request: dict[str, Any]) -> str:
    """What was drawn, in one line, as it was used."""
    prompt = printable(request["prompt"], 100) or "(empty)"
    negative = f" · without: {printable(request['negative_prompt'], 60)}" if request["negative_prompt"].strip() else ""
    return (
        f"seed {request['seed']} · {request['num_inference_steps']} steps · {request['scheduler']} · "
        f"guidance {request['guidance_scale']:g} · prompt: {prompt}{negative}"
    )


def _controls(
    conditions: list[str],
    images: list[Path],
    extract: bool,
    scales: list[float] | None,
    starts: list[float] | None,
    ends: list[float] | None,
) -> list[Any]:
    from ..runtime.generate import ControlOption

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
