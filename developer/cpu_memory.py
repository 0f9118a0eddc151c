"""What a picture of SD 1.5's size takes of memory and time on a CPU, by backend: each in a process of its own.

    python -m cnpp_trt.developer.cpu_memory table BUNDLE [--steps 3] [--variant onnxruntime-cpu …]

Random weights do (`random_models/checkpoint.py`, then `cnpp-trt export`). Prints a Markdown table: the peak of the
whole process, what was resident after loading, in the loop and after the decoder, and seconds of the second picture.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..benchmarks.requests import blocks
from ..runtime.pipeline import Pipeline
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
    bundle: Path,
    steps: Annotated[int, typer.Option(help="Denoising steps of a picture.")] = 3,
    variant: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(VARIANTS)}; repeatable.")] = None,
) -> None:
    """Measures each variant and prints its row."""
    print("| backend | peak, GiB | loaded | in the loop | after | ControlNet and UNet, s a step | decoder, s |")
    print("|---|---|---|---|---|---|---|")
    for name in variant or VARIANTS:
        command = [sys.executable, "-m", "cnpp_trt.developer.cpu_memory", "one", str(bundle), name, str(steps)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |", flush=True)


@app.command()
def one(bundle: Path, variant: str, steps: int) -> None:
    """Draws two pictures in this process; prints the numbers of its row as JSON."""
    options: dict[str, Any] = VARIANTS[variant]
    pipeline = Pipeline.open(bundle, **options)
    m, loop = pipeline.bundle.manifest, 0.0
    condition = next(iter(m.conditions))
    requests = [
        Request(
            "a photo of colored blocks",
            controls=[Control(condition, blocks(m.width, m.height, seed))],
            num_inference_steps=steps,
            guidance_scale=7.5,
            seed=seed,
        )
        for seed in (1, 2)
    ]
    pipeline.prepare(requests[0])
    loaded = _resident("VmRSS")

    def step_ended(*_: object) -> None:
        nonlocal loop
        loop = max(loop, _resident("VmRSS"))

    timings = [pipeline(request, callback_on_step_end=step_ended).timings for request in requests][-1]
    seconds = [(timings["controlnet"] + timings["unet"]) / steps, timings["vae_decoder"]]
    print(json.dumps([*np.round([_resident("VmHWM"), loaded, loop, _resident("VmRSS"), *seconds], 3)]))


def _resident(field: str) -> float:
    """GiB: `VmRSS` now, `VmHWM` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / GIB for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    app()
