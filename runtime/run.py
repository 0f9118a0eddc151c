"""One `cnpp-trt run`: control images in, pictures with their metadata and the sheet out."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..bundle import Bundle, bundle_folder, find_bundle
from ..conditions import CONDITIONS
from ..doctor import installed
from ..errors import UserError
from . import metadata
from .consistency import Score, score
from .extraction import can_extract
from .images import ImageFile, new_folder, read_image, save_png
from .init_image import fit_init_image
from .pipeline import OnStepEnd, Pipeline, Result
from .request import Control, Request
from .schedulers import DEFAULT_SCHEDULER
from .sheet import SheetControl, draw_sheet

# diffusers' defaults, where neither the user nor the model says otherwise.
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 7.5


@dataclass(frozen=True)
class ControlOption:
    """One `--cond` with what goes with it; without an image the model's own example is used."""

    condition: str
    image: Path | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """What a run wrote.

    Attributes:
        folder: the new folder of this run.
        images: the pictures' paths, image 0 first.
        sheet: the sheet's path; None without controls.
        scores: for each control, its condition and the score of each image; controls that cannot be extracted are left
            out.
        timings: seconds by stage, extraction and writing included.
        reason: why this backend.
        memory: peak bytes of device memory by part; empty on a CPU.
    """

    folder: Path
    images: tuple[Path, ...]
    sheet: Path | None
    scores: tuple[tuple[str, tuple[Score, ...]], ...]
    seed: int
    timings: dict[str, float]
    notes: tuple[str, ...]
    pixels_sha256: tuple[str, ...]
    request: dict[str, Any]
    bundle: dict[str, Any]
    backend: str
    reason: str
    memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; control images are left out."""
        controls = [{k: v for k, v in c.items() if k != "image"} for c in self.request["controls"]]
        return {
            **asdict(self),
            "folder": str(self.folder),
            "images": [str(path) for path in self.images],
            "sheet": self.sheet and str(self.sheet),
            "scores": [{"condition": name, "images": [asdict(s) for s in found]} for name, found in self.scores],
            "request": {**self.request, "controls": controls, "init_image": self.request["init_image"] is not None},
        }


@dataclass(frozen=True)
class Repeated:
    """`drawn` and whether the picture came out the same: `max_difference` is 0 then (of 255 levels)."""

    drawn: Drawn
    max_difference: int


def make_request(
    pipeline: Pipeline,
    controls: Sequence[ControlOption],
    *,
    extract: bool = False,
    init_image: Path | None = None,
    prompt: str | None = None,
    seed: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    **fields: Any,
) -> tuple[Request, list[str]]:
    """A request from a user's options; what was not said comes from the bundle's example and defaults.

    Args:
        extract: the images are photos to extract the conditions from.
        init_image: the image to begin with.
        fields: further fields of `Request`.
    Returns: the request, and notes on what was done to the images, one line each.
    Raises: UserError
    """
    manifest = pipeline.bundle.manifest
    notes: list[str] = []
    made, examples = [], []
    for option in controls:
        pipeline.bundle.require_condition(option.condition)
        if option.image is None:
            examples.append(_example(pipeline.bundle, option.condition))
            image = read_image(examples[-1]["path"]).pixels
        else:
            image = _read(pipeline, option.condition, option.image, extract, notes)
        made.append(Control(option.condition, image, option.scale, option.start, option.end))
    example: Mapping[str, Any] = examples[0] if examples else {}
    defaults = manifest.defaults
    request = Request(
        prompt=example.get("prompt", "") if prompt is None else prompt,
        controls=tuple(made),
        seed=example.get("seed") if seed is None else seed,
        num_inference_steps=_first(num_inference_steps, defaults.get("num_inference_steps"), NUM_INFERENCE_STEPS),
        guidance_scale=_first(guidance_scale, defaults.get("guidance_scale"), GUIDANCE_SCALE),
        init_image=None if init_image is None else read_image(init_image, background=(255, 255, 255)).pixels,
        scheduler=_first(scheduler, defaults.get("scheduler"), DEFAULT_SCHEDULER),
        **fields,
    )
    return request, notes


def draw(
    pipeline: Pipeline,
    request: Request,
    out: Path,
    notes: Sequence[str] = (),
    callback_on_step_end: OnStepEnd | None = None,
) -> Drawn:
    """Runs a request and writes `image-0.png`, … and `sheet.png` into a new numbered folder under `out`.

    Raises: UserError, BackendError; CnppError where the files cannot be written.
    """
    result = pipeline(request, callback_on_step_end)
    request = replace(request, seed=result.seed)
    start = perf_counter()
    rows = [
        _row(pipeline, control, image, result) for control, image in zip(request.controls, result.controls, strict=True)
    ]
    extracted = perf_counter()

    folder = new_folder(out)
    records = _records(pipeline, request, result)
    paths = tuple(folder / f"image-{i}.png" for i in range(len(result.images)))
    for path, image, record in zip(paths, result.images, records, strict=True):
        save_png(path, image, metadata.pack(record))
    sheet = None
    if rows:
        sheet = folder / "sheet.png"
        details = f"{request.scheduler} · {request.num_inference_steps} steps · guidance {request.guidance_scale:g}"
        captions = [f"seed {result.seed + i}" for i in range(len(result.images))]
        save_png(
            sheet,
            draw_sheet(
                list(result.images), [row for row, _ in rows], prompt=request.prompt, details=details, captions=captions
            ),
        )
    timings = {**result.timings, "extract": extracted - start, "write": perf_counter() - extracted}
    timings["total"] += timings["extract"] + timings["write"]
    record = records[0]
    return Drawn(
        folder=folder,
        images=paths,
        sheet=sheet,
        scores=tuple((c.condition, found) for c, (_, found) in zip(request.controls, rows, strict=True) if found),
        seed=result.seed,
        timings=timings,
        notes=(*notes, *result.notes),
        pixels_sha256=tuple(r["pixels_sha256"] for r in records),
        request=record["request"],
        bundle=record["bundle"],
        backend=record["backend"],
        reason=pipeline.reason,
        memory=pipeline.backend.memory(),
    )


def repeat(
    file: Path,
    out: Path,
    bundle: Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
    openvino_precision: str | None = None,
    plans: Path | None = None,
    vram_budget: int | None = None,
) -> Repeated:
    """Draws a picture again from the metadata that `draw` wrote into it.

    The whole request is repeated, all its images, because a picture may depend on the batch it was drawn in by the
    last bit.

    Args:
        bundle: None finds the bundle by the model's name, precision and size.
        backend, threads, openvino_precision, plans, vram_budget: as in `Pipeline.open`.
    Raises: UserError where the file is no such picture or its bundle cannot be found.
    """
    record = metadata.read_record(file)
    before = read_image(file).pixels
    made_with = record["bundle"]
    size = (made_with["width"], made_with["height"])
    if bundle is None:
        bundle = bundle_folder(made_with["model"], made_with["precision"], *size)
        if not bundle.is_dir():
            bundle = find_bundle(made_with["model"], made_with["precision"], size)
    pipeline = Pipeline.open(
        bundle, backend, threads, openvino_precision=openvino_precision, plans=plans, vram_budget=vram_budget
    )
    notes = []
    if pipeline.bundle.digest != made_with["digest"]:
        notes.append(f"{bundle} is not the bundle that drew {file}: the picture may differ")
    if pipeline.backend.name != record["backend"]:
        notes.append(f"{file} was drawn on {record['backend']}, now on {pipeline.backend.name}")
    fields = dict(record["request"])
    if (init_image := fields.get("init_image")) is not None:
        fields["init_image"] = metadata.image_from_base64(init_image)
    fields["controls"] = tuple(
        Control(
            c["condition"],
            metadata.image_from_base64(c["image"]),
            c["controlnet_conditioning_scale"],
            c["control_guidance_start"],
            c["control_guidance_end"],
        )
        for c in fields["controls"]
    )
    drawn = draw(pipeline, Request(**fields), out, notes)
    after = read_image(drawn.images[record["image_index"]]).pixels
    if after.shape != before.shape:
        raise UserError(
            f"{bundle} draws {after.shape[1]}x{after.shape[0]} pixels, {file} has {before.shape[1]}x{before.shape[0]}"
        )
    return Repeated(drawn, int(np.abs(after.astype(int) - before.astype(int)).max()))


def _read(pipeline: Pipeline, condition: str, path: Path, extract: bool, notes: list[str]) -> NDArray[np.uint8]:
    # A photo's transparent parts are looked at on white; those of a control image are "nothing here": black.
    file = read_image(path, background=(255, 255, 255) if extract else (0, 0, 0))
    if extract:
        return pipeline.extract(condition, file.pixels)
    if condition == "seg" and "palette" not in pipeline.bundle.manifest.conditions[condition]:
        notes += _seg_notes(file)
    return file.pixels


def _seg_notes(file: ImageFile) -> list[str]:
    from .palette import labels_from_colors

    inexact = labels_from_colors(file.pixels)[1]
    if file.lossy:
        return [
            f"{file.path} is a {file.format}: its compression corrupts segmentation colours ({inexact:.0%} inexact); "
            "use PNG"
        ]
    if inexact > 0.01:
        return [
            f"{inexact:.0%} of {file.path} is in none of ADE20K's colours: is it a segmentation map? "
            "(--extract takes photos)"
        ]
    return []


def _example(bundle: Bundle, condition: str) -> dict[str, Any]:
    example = bundle.manifest.conditions[condition]
    if "image" not in example:
        raise UserError(f"{bundle.folder} ships no example for {condition!r}: give an image with --image FILE")
    return {**example, "path": bundle.folder / example["image"]}


def _row(
    pipeline: Pipeline, control: Control, given: NDArray[np.uint8], result: Result
) -> tuple[SheetControl, tuple[Score, ...]]:
    title = CONDITIONS[control.condition].title
    if not can_extract(pipeline.bundle, control.condition):
        blank = np.full_like(given, 255)
        return SheetControl(title, given, [blank] * len(result.images), ["no extractor"] * len(result.images)), ()
    extracted = [pipeline.extract(control.condition, image) for image in result.images]
    scores = tuple(score(control.condition, given, found) for found in extracted)
    return SheetControl(title, given, extracted, scores), scores


def _records(pipeline: Pipeline, request: Request, result: Result) -> list[dict[str, Any]]:
    m = pipeline.bundle.manifest
    fields = {f: getattr(request, f) for f in _RECORDED}
    init_image = None
    if request.init_image is not None:
        # As it was used, like the control images: a photo may be larger than a record.
        init_image = metadata.image_to_base64(fit_init_image(pipeline.bundle, request.init_image, []))
    controls = [
        {
            "condition": c.condition,
            "controlnet_conditioning_scale": c.controlnet_conditioning_scale,
            "control_guidance_start": c.control_guidance_start,
            "control_guidance_end": c.control_guidance_end,
            "image": metadata.image_to_base64(image),
        }
        for c, image in zip(request.controls, result.controls, strict=True)
    ]
    shared = {
        "version": __version__,
        "request": {**fields, "seed": result.seed, "controls": controls, "init_image": init_image},
        "bundle": {
            "model": m.model,
            "digest": pipeline.bundle.digest,
            "precision": m.precision,
            "width": m.width,
            "height": m.height,
        },
        "backend": pipeline.backend.name,
        "versions": {"python": platform.python_version(), **installed(_RUNTIME_PACKAGES)},
    }
    return [
        {**shared, "image_index": i, "pixels_sha256": metadata.pixels_sha256(image)}
        for i, image in enumerate(result.images)
    ]


_RUNTIME_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
_RECORDED = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "scheduler",
    "num_images_per_prompt",
    "strength",
    "clip_skip",
    "long_prompt",
)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
