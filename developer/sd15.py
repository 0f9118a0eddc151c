"""The whole of `sd15`, one command after the other: export, a picture of each condition beside diffusers', plans.

    python -m cnpp_trt.developer.random_models.hub HF_HOME
    HF_HOME=… HF_HUB_OFFLINE=1 python -m cnpp_trt.developer.sd15 measure --work DIR

Without the first line, and with a network, it takes the real weights. Each command is a process of its own, whose time
and peak memory are kept in DIR/stages.json: what was measured before is not measured again. The fp32 bundle (13 GB) is
removed before the fp16 bundle (7 GB) and its plans (7 GB) are made.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..benchmarks.records import EndToEnd, PictureRow, StageRow
from ..benchmarks.result import BenchmarkResult, default_path
from ..conditions import CONDITIONS
from ..errors import CnppError
from ..files import replace_file
from ..schema import read_object

MODEL = "sd15"
STEPS, GUIDANCE, SEED = 2, 7.5, 11
PROMPT = "a red house by a lake, at dusk"
_PYTHON = [sys.executable, "-m"]

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def measure(
    work: Annotated[Path, typer.Option(help="Where bundles, plans, pictures and times are kept.")] = Path(
        "artifacts/sd15"
    ),
    out: Annotated[Path | None, typer.Option(help="The result's file. Default: under CNPP_TRT_HOME.")] = None,
) -> None:
    """Everything, and writes a result."""
    stages = _Stages(work)
    exact, half, plans = work / "fp32", work / "fp16", work / "plans"
    pictures = _pictures(stages, work, exact)
    shutil.rmtree(exact, ignore_errors=True)
    stages.run("export, fp16", *_export(half, "fp16"))
    build = ["build", "--flavor", "tensorrt-rtx", "--cond", "all", "--bundle", half, "--out", plans]
    stages.run("plans, tensorrt-rtx", "cnpp_trt.cli", *build)
    data = EndToEnd(model=MODEL, width=512, height=512, steps=STEPS, stages=stages.rows(), pictures=pictures)
    result = BenchmarkResult.of(
        "end_to_end", f"{MODEL}, every condition", "python -m cnpp_trt.developer.sd15 measure", data
    )
    path = out or default_path(result.kind, MODEL)
    result.write(path)
    print(path)


@app.command()
def reference(picture: Path) -> None:
    """Draws a picture again with diffusers' own pipeline and loaders, from its metadata; JSON on stdout."""
    import diffusers
    import numpy as np
    import torch
    from PIL import Image

    from ..export.models import BASE, MODELS
    from ..runtime.images.image_files import read_image
    from ..runtime.output.metadata import image_from_base64, read_record

    found, request = read_image(picture).pixels, read_record(picture).request
    [control] = request.controls
    owner, name, folder = MODELS[MODEL].controlnets[control.condition].split("/", 2)
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        BASE,
        controlnet=_controlnet(f"{owner}/{name}", folder),
        torch_dtype=torch.float32,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    start = time.perf_counter()
    images = pipeline(
        request.prompt,
        image=Image.fromarray(image_from_base64(control.image)),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed_of(0)),
        output_type="np",
    ).images
    expected = (images[0] * 255).round().astype(np.uint8).astype(np.float64)
    error = np.abs(found - expected)
    answer = {
        "seconds": time.perf_counter() - start,
        "max_difference": int(error.max()),
        "differing": float(np.mean(error > 0)),
        "levels": int(np.ptp(expected)),  # a flat picture would agree with any other
    }
    print(json.dumps(answer))


def _controlnet(repository: str, folder: str) -> Any:
    import diffusers

    for inside in (folder, f"{folder}/controlnet"):
        try:
            return diffusers.ControlNetModel.from_pretrained(repository, subfolder=inside)
        except OSError:
            continue
    raise CnppError(f"diffusers finds no ControlNet in {repository}/{folder}")


class _Stages:
    """Commands with the time and memory that they took, kept in a file."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._file = work / "stages.json"
        self._known: dict[str, Any] = read_object(self._file) if self._file.is_file() else {}

    def run(self, stage: str, *command: object) -> dict[str, Any]:
        """seconds, peak_bytes and `out`, what the command printed.

        Raises:
            CnppError: it fails.
        """
        if stage not in self._known:
            print(stage, file=sys.stderr, flush=True)
            start = time.perf_counter()
            process = subprocess.Popen([*_PYTHON, *map(str, command)], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            said = process.stdout.read()
            # Of this one process; Linux counts in KiB.
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise CnppError(f"{stage} failed: see above")
            seconds = time.perf_counter() - start
            self._known[stage] = {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "out": said}
            replace_file(self._file, json.dumps(self._known, indent=1))
        found: dict[str, Any] = self._known[stage]
        return found

    def rows(self) -> list[StageRow]:
        """What is no picture."""
        return [
            StageRow(stage=stage, seconds=found["seconds"], peak_bytes=found["peak_bytes"])
            for stage, found in self._known.items()
            if not stage.startswith("picture")
        ]


def _export(folder: Path, precision: str) -> list[object]:
    asked = ["--model", MODEL, "--cond", "all", "--precision", precision, "--out", folder]
    return ["cnpp_trt.cli", "export", *asked]


def _pictures(stages: _Stages, work: Path, bundle: Path) -> list[PictureRow]:
    """One of each condition, extracted from a photo, and what diffusers draws from the same control image."""
    stages.run("export, fp32", *_export(bundle, "fp32"))
    photo = _photo(work / "photo.png")
    rows = []
    for condition in CONDITIONS:
        asked = ["--cond", condition, "--image", photo, "--extract", "--prompt", PROMPT, "--seed", SEED]
        asked += ["--steps", STEPS, "--guidance-scale", GUIDANCE, "--scheduler", "unipc", "--json"]
        asked += ["--backend", "onnxruntime-cpu", "--bundle", bundle, "--out", work / "pictures"]
        drawn = stages.run(f"picture, {condition}", "cnpp_trt.cli", "run", *asked)
        picture = json.loads(drawn["out"])["images"][0]
        compared = stages.run(f"picture, {condition}, diffusers", "cnpp_trt.developer.sd15", "reference", picture)
        answer = json.loads(compared["out"])
        if answer["levels"] < 2:
            raise CnppError(f"the picture of {condition} is flat: nothing is compared")
        rows.append(
            PictureRow(
                condition=condition,
                seconds=drawn["seconds"],
                peak_bytes=drawn["peak_bytes"],
                max_difference=answer["max_difference"],
                differing=answer["differing"],
                reference_seconds=compared["seconds"],
                reference_peak_bytes=compared["peak_bytes"],
            )
        )
    return rows


def _photo(file: Path) -> Path:
    from .random_models.extractors import photo

    if not file.is_file():
        from ..runtime.images.png_files import save_png

        save_png(file, photo(512, 512), {})
    return file


if __name__ == "__main__":
    app()
