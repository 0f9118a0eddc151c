"""What a picture of SD 1.5's size takes of memory and time on a CPU, by backend: each in a process of its own.

    python -m cnpp_trt.developer.cpu_memory table BUNDLE … [--steps 3] [--variant openvino …] [--pytorch CHECKPOINT]

Random weights do (`random_models/checkpoint.py`, then `cnpp-trt export` and `cnpp-trt quantize`). Prints a Markdown
table: the peak of the whole process, what was resident after loading, in the loop and after the decoder; seconds of a
guided step and of the decoder in the second picture; and after that the seconds of a picture with the levers of the
preset that is shipped for the miniature, whose first is not counted.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..benchmarks.requests import blocks
from ..bundles.defaults import SamplingDefaults
from ..runtime.pipeline import Pipeline
from ..runtime.settings.preset import SHIPPED, read_presets
from ..runtime.settings.request import Control, Request

VARIANTS = {
    "onnxruntime-cpu": {"backend": "onnxruntime-cpu"},
    "openvino": {"backend": "openvino"},
    "openvino-bf16": {"backend": "openvino", "precision": "bf16"},
}
GIB = 2**20  # of KiB, as /proc counts

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def table(
    bundle: list[Path],
    steps: Annotated[int, typer.Option(help="Denoising steps of a picture.")] = 3,
    variant: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(VARIANTS)}; repeatable.")] = None,
    pytorch: Annotated[Path | None, typer.Option(help="The bundle's checkpoint: diffusers too, in eager mode.")] = None,
) -> None:
    """Measures each variant and prints its row."""
    print("| backend | peak, GiB | loaded | in the loop | after | s a step | decoder, s | as tuned, s |")
    print("|---|---|---|---|---|---|---|---|")
    runs = [(f"{folder.name}, {name}", str(folder), name) for folder in bundle for name in variant or VARIANTS]
    if pytorch:
        runs.insert(0, ("diffusers, PyTorch eager", str(pytorch), "pytorch"))
    for title, source, name in runs:
        command = [sys.executable, "-m", "cnpp_trt.developer.cpu_memory", "one", source, name, str(steps)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {title} | {' | '.join('–' if value is None else f'{value:.2f}' for value in row)} |", flush=True)


@app.command()
def one(source: Path, variant: str, steps: int) -> None:
    """Draws pictures in this process; prints the numbers of its row as JSON."""
    row = _diffusers(source, steps) if variant == "pytorch" else _runtime(source, VARIANTS[variant], steps)
    print(json.dumps([None if value is None else round(value, 3) for value in row]))


def _runtime(bundle: Path, options: dict[str, Any], steps: int) -> list[float | None]:
    pipeline, loop = Pipeline.open(bundle, **options), 0.0
    m = pipeline.bundle.manifest
    condition = next(iter(m.conditions))
    requests = [_request(condition, m.width, m.height, steps, seed) for seed in (1, 2)]
    pipeline.prepare(requests[0])
    loaded = _resident("VmRSS")

    def step_ended(*_: object) -> None:
        nonlocal loop
        loop = max(loop, _resident("VmRSS"))

    timings = [pipeline(request, callback_on_step_end=step_ended).timings for request in requests][-1]
    memory = [_resident("VmHWM"), loaded, loop, _resident("VmRSS")]
    levers = next(p.levers for p in read_presets([SHIPPED]) if p.condition == condition)
    tuned = levers.apply(replace(requests[0], num_inference_steps=None), pipeline.defaults)
    pipeline(tuned)
    start = time.perf_counter()
    pipeline(tuned)
    seconds = time.perf_counter() - start
    return [*memory, (timings["controlnet"] + timings["unet"]) / steps, timings["vae_decoder"], seconds]


def _diffusers(checkpoint: Path, steps: int) -> list[float | None]:
    import torch

    from ..benchmarks.pytorch import PyTorch
    from ..export.checkpoint import Checkpoint

    reference = PyTorch(Checkpoint(str(checkpoint)))
    width, height = reference.checkpoint.size(None)
    loaded, loop, ends = _resident("VmRSS"), 0.0, list[float]()

    def step_ended(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal loop
        loop = max(loop, _resident("VmRSS"))
        ends.append(time.perf_counter())
        return kwargs

    with torch.inference_mode():
        for seed in (1, 2):
            ends.clear()
            request = _request("seg", width, height, steps, seed).resolve(SamplingDefaults())
            reference.images(request, step_ended)
            decoded = time.perf_counter() - ends[-1]
    memory = [_resident("VmHWM"), loaded, loop, _resident("VmRSS")]
    return [*memory, (ends[-1] - ends[0]) / (steps - 1) if steps > 1 else None, decoded, None]


def _request(condition: str, width: int, height: int, steps: int, seed: int) -> Request:
    control = Control(condition, blocks(width, height, seed))
    return Request(
        "a photo of colored blocks", controls=(control,), num_inference_steps=steps, guidance_scale=7.5, seed=seed
    )


def _resident(field: str) -> float:
    """GiB: `VmRSS` now, `VmHWM` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / GIB for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    app()
