"""Measurements at full size, with random weights or with the real ones where they are.

    python -m cnpp_trt.developer.full_size plans        plans of SD 1.5, one by one
    python -m cnpp_trt.developer.full_size sd15         all of `sd15`: export, images beside diffusers', plans
    python -m cnpp_trt.developer.full_size extractors   extractors beside the libraries that they come from

`plans` and `sd15` keep what they make in DIR (`--work`, some 20 GB) and write a result for `cnpp-trt report`. Each
command that they run is a process of its own, whose time and peak memory are kept in DIR: what was measured is not
measured again. `sd15` finds random weights under the published names after

    python -m cnpp_trt.developer.random_models.hub HF_HOME
    HF_HOME=… HF_HUB_OFFLINE=1 python -m cnpp_trt.developer.full_size sd15

and takes the real ones with a network and without the first line. `extractors` needs controlnet_aux
(pip install --no-deps controlnet-aux einops) and prints a Markdown table.
"""

import importlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from ..benchmarks.records import EndToEnd, PictureRow, PlanRow, Plans, StageRow
from ..benchmarks.result import BenchmarkResult, default_path
from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS
from ..engines.build import required_graphs
from ..engines.store import PlanStore
from ..errors import CnppError
from ..export.graphs import extractor_graph
from ..export.onnx_graph import OPSET, export_graph, run_onnx
from ..export.sources import Finder
from ..files import replace_file
from ..schema import read_object
from .random_models.checkpoint import make_checkpoint
from .random_models.extractors import REPOSITORIES, make_extractor, photo

MODEL, RANDOM = "sd15", "SD 1.5, random weights"
STEPS, GUIDANCE, SEED = 2, 7.5, 11
PROMPT = "a red house by a lake, at dusk"
FLAVOR = "tensorrt-rtx"
_CNPP_TRT = "cnpp_trt.cli"
_DETECTORS = {"hed": "HEDdetector", "lineart": "LineartDetector"}

Work = Annotated[Path, typer.Option(help="Where checkpoints, bundles, plans, images and times are kept.")]
Out = Annotated[Path | None, typer.Option(help="The result's file. Default: in ./cnpp-trt-results.")]
Map = NDArray[np.uint8]
# photo uint8 [H,W,3] → map uint8 [H,W]
Reference = Callable[[Map], Map]

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def plans(work: Work = Path("artifacts/full-size"), out: Out = None) -> None:
    """Builds the plans of all five conditions, without a GPU (TensorRT-RTX); one after the other."""
    stages = _Stages(work)
    checkpoint, folder, store = work / "sd15-random-all", work / "bundle-fp16", work / "plans"
    if not (checkpoint / "model_index.json").is_file():
        make_checkpoint(checkpoint, conditions=tuple(CONDITIONS))
    stages.run("export, fp16", *_export(str(checkpoint), folder, "fp16"))
    built = stages.run("plans", *_build(folder, store))
    bundle = Bundle.open(folder)
    found = {plan.key.graph: plan for plan in PlanStore(store).plans()}
    rows = [
        PlanRow(
            graph=graph,
            seconds=plan.seconds,
            bytes=plan.size,
            kernels=plan.fusion.layers,
            attentions=plan.fusion.attentions,
            attentions_fused=plan.fusion.attentions_fused,
            norms=plan.fusion.norms,
            norms_fused=plan.fusion.norms_fused,
        )
        for graph, plan in ((graph, found[graph]) for graph in required_graphs(bundle, list(CONDITIONS)))
    ]
    data = Plans(
        model=RANDOM,
        flavor=FLAVOR,
        width=bundle.manifest.width,
        height=bundle.manifest.height,
        plans=rows,
        seconds=built["seconds"],
        peak_bytes=built["peak_bytes"],
    )
    command = "python -m cnpp_trt.developer.full_size plans"
    _write(BenchmarkResult.of("plans", f"{RANDOM}, {FLAVOR}", command, data), "full-size", out)


@app.command()
def sd15(work: Work = Path("artifacts/sd15"), out: Out = None) -> None:
    """Exports every condition, generates an image of each beside diffusers', and builds the plans."""
    stages = _Stages(work)
    exact, half = work / "fp32", work / "fp16"
    pictures = _pictures(stages, work, exact)
    shutil.rmtree(exact, ignore_errors=True)  # 13 GB, before the fp16 bundle and its plans take 14
    stages.run("export, fp16", *_export(MODEL, half, "fp16"))
    stages.run("plans, tensorrt-rtx", *_build(half, work / "plans"))
    data = EndToEnd(model=MODEL, width=512, height=512, steps=STEPS, stages=stages.rows(), pictures=pictures)
    command = "python -m cnpp_trt.developer.full_size sd15"
    _write(BenchmarkResult.of("end_to_end", f"{MODEL}, every condition", command, data), MODEL, out)


@app.command()
def extractors(
    full: Annotated[bool, typer.Option("--full", help="The published sizes (minutes) instead of tiny ones.")] = False,
    cond: Annotated[list[str] | None, typer.Option(help="Conditions to measure. Default: all.")] = None,
) -> None:
    """Compares extractors with transformers' and controlnet_aux' own steps, on random weights."""
    width, height = (512, 512) if full else (192, 128)
    print(_row(_COLUMNS), _row(["---"] * len(_COLUMNS)), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for condition in cond or REPOSITORIES:
            # Every network has processes of its own: one's memory is not another's.
            with _process() as process:
                path = process.submit(make_extractor, condition, Path(folder) / condition, tiny=not full).result()
            with _process() as process:
                print(process.submit(_measure_extractor, condition, path, width, height).result(), flush=True)


@app.command("diffusers")
def repeat_with_diffusers(picture: Path) -> None:
    """Generates a picture again with diffusers' own pipeline and loaders, from its metadata; JSON on stdout."""
    import diffusers

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
    output: Any = pipeline(
        request.prompt,
        image=Image.fromarray(image_from_base64(control.image)),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed_of(0)),
        output_type="np",
    )
    expected = (output.images[0] * 255).round().astype(np.uint8).astype(np.float64)
    error = np.abs(found - expected)
    answer = {
        "seconds": time.perf_counter() - start,
        "max_difference": int(error.max()),
        "differing": float(np.mean(error > 0)),
        "levels": int(np.ptp(expected)),  # a flat picture would agree with any other
    }
    print(json.dumps(answer))


def reference(condition: str, path: Path) -> Reference:
    """The official demo's own steps from a photo, whose sides are multiples of 64, to its map.

    Args:
        condition: whose extractor it is.
        path: as `random_models.extractors.make_extractor` returns it.

    Raises:
        CnppError: controlnet_aux is not installed.
    """
    if condition in _DETECTORS:
        return _detector(condition, path)
    return _labels(path) if condition == "seg" else _depth(path)


def _labels(folder: Path) -> Reference:
    from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = UperNetForSemanticSegmentation.from_pretrained(folder).eval()

    def labels(image: Map) -> Map:
        outputs = network(processor(Image.fromarray(image), return_tensors="pt").pixel_values)
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        return np.asarray(found[0], np.uint8)

    return torch.inference_mode()(labels)


def _depth(folder: Path) -> Reference:
    from transformers import AutoImageProcessor, DPTForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = DPTForDepthEstimation.from_pretrained(folder).eval()

    def depth(image: Map) -> Map:
        outputs = network(processor(Image.fromarray(image), return_tensors="pt").pixel_values)
        found = processor.post_process_depth_estimation(outputs, target_sizes=[image.shape[:2]])
        # What interpolation brings below 0 would wrap around in the next line, which is how transformers 4.38's
        # pipeline ends.
        output = found[0]["predicted_depth"].numpy().clip(0)
        return np.asarray(output * 255 / np.max(output)).astype(np.uint8)

    return torch.inference_mode()(depth)


def _detector(condition: str, file: Path) -> Reference:
    spec = importlib.util.find_spec("controlnet_aux")
    if spec is None:
        raise CnppError("controlnet_aux is not installed: pip install --no-deps controlnet-aux einops")
    # The package's own code is never run: it imports every detector, with dependencies that are not here.
    sys.modules.setdefault("controlnet_aux", importlib.util.module_from_spec(spec))
    module = importlib.import_module(f"controlnet_aux.{condition}")
    detector = getattr(module, _DETECTORS[condition]).from_pretrained(file.parent)

    def extract(image: Map) -> Map:
        side = min(image.shape[:2])
        lines = detector(image, detect_resolution=side, image_resolution=side, output_type="np")
        return np.asarray(lines[:, :, 0], np.uint8)

    return extract


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
            typer.echo(stage, err=True)
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, text=True)
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
        """Those that are no picture."""
        return [
            StageRow(stage=stage, seconds=found["seconds"], peak_bytes=found["peak_bytes"])
            for stage, found in self._known.items()
            if not stage.startswith("picture")
        ]


def _export(model: str, folder: Path, precision: str) -> list[object]:
    asked = ["--model", model, "--cond", "all", "--precision", precision, "--out", folder]
    return [_CNPP_TRT, "export", *asked]


def _build(bundle: Path, store: Path) -> list[object]:
    return [_CNPP_TRT, "build", "--flavor", FLAVOR, "--cond", "all", "--bundle", bundle, "--plans", store]


def _pictures(stages: _Stages, work: Path, bundle: Path) -> list[PictureRow]:
    """One of each condition, extracted from a photo, and what diffusers generates from the same control image."""
    stages.run("export, fp32", *_export(MODEL, bundle, "fp32"))
    photo = _photo(work / "photo.png")
    rows = []
    for condition in CONDITIONS:
        asked = ["--cond", condition, "--image", photo, "--extract", "--prompt", PROMPT, "--seed", SEED]
        asked += ["--steps", STEPS, "--guidance-scale", GUIDANCE, "--scheduler", "unipc", "--json"]
        asked += ["--backend", "onnxruntime-cpu", "--bundle", bundle, "--out", work / "pictures"]
        generated = stages.run(f"picture, {condition}", _CNPP_TRT, "run", *asked)
        picture = json.loads(generated["out"])["images"][0]
        compared = stages.run(f"picture, {condition}, diffusers", "cnpp_trt.developer.full_size", "diffusers", picture)
        answer = json.loads(compared["out"])
        if answer["levels"] < 2:
            raise CnppError(f"the picture of {condition} is flat: nothing is compared")
        rows.append(
            PictureRow(
                condition=condition,
                seconds=generated["seconds"],
                peak_bytes=generated["peak_bytes"],
                max_difference=answer["max_difference"],
                differing=answer["differing"],
                reference_seconds=compared["seconds"],
                reference_peak_bytes=compared["peak_bytes"],
            )
        )
    return rows


def _photo(file: Path) -> Path:
    if not file.is_file():
        from ..runtime.images.png_files import save_png

        save_png(file, photo(512, 512), {})
    return file


def _measure_extractor(condition: str, path: Path, width: int, height: int) -> str:
    """One row of the table. Peak memory is this process's, up to the export's end."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    graph = extractor_graph(condition, Finder().find(path), width, height)
    weights = sum(p.numel() for p in graph.module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        spec = export_graph(graph, Path(folder), "fp32", OPSET["fp32"])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        image = photo(height, width, seed=1)
        start = time.perf_counter()
        (found,) = run_onnx(Path(folder) / spec.file, {"image": image[None]})
        run = time.perf_counter() - start
    expected = reference(condition, path)(image)
    differ = found[0] != expected
    largest = "–" if condition == "seg" else np.abs(found[0].astype(int) - expected).max()
    library = "controlnet_aux" if condition in _DETECTORS else "transformers"
    cells = (
        condition,
        f"{weights / 1e6:.1f} M",
        f"{width}×{height}",
        library,
        largest,
        f"{differ.mean():.4%}",
        len(np.unique(expected)),
        f"{seconds:.0f} s",
        f"{peak:.1f} GiB",
        f"{run:.1f} s",
    )
    return _row(cells)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


_COLUMNS = (
    *("extractor", "weights", "photo", "reference", "largest difference", "values that differ"),
    *("different values", "export", "peak memory", "load and run"),
)


def _process() -> Any:
    return ProcessPoolExecutor(1, get_context("spawn"))


def _write(result: BenchmarkResult, name: str, out: Path | None) -> None:
    path = out or default_path(result.kind, name)
    result.write(path)
    print(path)


if __name__ == "__main__":
    app()
