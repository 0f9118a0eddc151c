"""Control images in, generated images with their metadata and the sheet out: what `cnpp-trt run` does."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import to_builtins

from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS
from ..errors import CnppError, UserError
from ..messages import one_line
from ..schema import convert
from ..versions import RUNTIME_PACKAGES, __version__, installed
from .control.consistency import Score, graded_score
from .control.extraction import can_extract
from .control.plausibility import control_image_note
from .images.fitting import ResizeMode, aspect_note, fit
from .images.image_files import WHITE, Pixels, read_image
from .images.png_files import save_png
from .init_image import fit_init_image
from .output import metadata
from .output.metadata import BundleRecord, PictureRecord
from .output.saving import Saved, kept_note, save_images
from .output.sheet import SheetControl, draw_sheet
from .settings.request import Control, Request

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .result import Result
    from .watching import OnProgress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlOption:
    """One `--cond` with what goes with it; without an image the model's own example is used."""

    condition: str
    image: Path | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, eq=False)
class UserRequest:
    """What a user asked for.

    Attributes:
        request: ready to be drawn.
        notes: on what was done to the images and what looks wrong with them, one line each.
        photos: for each control, the photo that it was extracted from, uint8 [*,*,3], or None.
    """

    request: Request
    notes: tuple[str, ...]
    photos: tuple[Pixels | None, ...]


@dataclass(frozen=True)
class GenerateResult:
    """The files of a request, with its scores and timings.

    Attributes:
        folder: where they are.
        images: the paths of the images, image 0 first.
        sheet: the path of the sheet; None without controls.
        scores: for each control, its condition and the score of each image; controls that cannot be extracted are left
            out.
        seeds: of each image.
        timings: seconds by stage, writing and the sheet (extraction and scoring) included.
        reason: why this backend.
        memory: peak bytes of device memory by part; empty on a CPU.
    """

    folder: Path
    images: tuple[Path, ...]
    sheet: Path | None
    scores: tuple[tuple[str, tuple[Score, ...]], ...]
    seeds: tuple[int, ...]
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
            "seed": self.seeds[0],
            "folder": str(self.folder),
            "images": [str(path) for path in self.images],
            "sheet": self.sheet and str(self.sheet),
            "scores": [{"condition": name, "images": [asdict(s) for s in found]} for name, found in self.scores],
            "request": {**self.request, "controls": controls, "init_image": self.request["init_image"] is not None},
        }


def make_request(
    pipeline: "Pipeline",
    controls: Sequence[ControlOption],
    *,
    extract: bool = False,
    init_image: Path | None = None,
    resize_mode: ResizeMode = "stretch",
    prompt: str | None = None,
    seed: int | None = None,
    **fields: Any,
) -> UserRequest:
    """A request from a user's options; control image, prompt and seed are those of the bundle's example by default.

    Args:
        pipeline: that will run it.
        controls: conditions with the files of their images.
        extract: the images are photos to extract the conditions from.
        init_image: the image to begin with.
        resize_mode: how images of another size than the bundle's are brought to it.
        prompt, seed: None is the example's.
        **fields: further fields of `Request`.

    Raises:
        UserError: a value or a file cannot be used.
    """
    manifest = pipeline.bundle.manifest
    size = (manifest.width, manifest.height)
    notes: list[str] = []
    made, examples, photos = [], [], []
    for option in controls:
        pipeline.bundle.require_condition(option.condition)
        photo = None
        if option.image is None:
            examples.append(_example(pipeline.bundle, option.condition))
            image = read_image(examples[-1]["path"]).pixels
        elif extract:
            photo = read_image(option.image, background=WHITE).pixels
            image = pipeline.extract(option.condition, _fitted(photo, option.image, size, resize_mode, notes))
        else:
            image = _control_image(pipeline.bundle, option, resize_mode, notes)
        photos.append(photo)
        made.append(Control(option.condition, image, option.scale, option.start, option.end))
    begin = None
    if init_image is not None:
        begin = _fitted(read_image(init_image, background=WHITE).pixels, init_image, size, resize_mode, notes)
    example: Mapping[str, Any] = examples[0] if examples else {}
    request = Request(
        prompt=example.get("prompt", "") if prompt is None else prompt,
        controls=tuple(made),
        seed=example.get("seed") if seed is None else seed,
        init_image=begin,
        **fields,
    )
    if prompt is None and not request.prompt:
        notes.append("the prompt is empty: say what to draw with --prompt")
    return UserRequest(request, tuple(dict.fromkeys(notes)), tuple(photos))


def generate(
    pipeline: "Pipeline",
    request: Request,
    out: Path,
    notes: Sequence[str] = (),
    photos: Sequence[Pixels | None] = (),
    on_progress: "OnProgress | None" = None,
) -> GenerateResult:
    """Runs a request and writes its files into a new numbered folder; see `save_result`.

    Args:
        pipeline, request: what runs.
        out: the parent of the new folder.
        notes: on the request, which go before those of the run.
        photos: for each control, the photo that it was extracted from, or None; for the sheet.
        on_progress: see `Pipeline.__call__`.

    Raises:
        UserError, BackendError: as `Pipeline.__call__`.
        CnppError: as `save_result`.
    """
    result = pipeline(request, on_progress=on_progress)
    return save_result(pipeline, result, out, notes=notes, photos=photos, numbered=True)


def save_result(
    pipeline: "Pipeline",
    result: "Result",
    out: Path,
    *,
    notes: Sequence[str] = (),
    photos: Sequence[Pixels | None] = (),
    numbered: bool = False,
) -> GenerateResult:
    """Writes `image-0.png`, … with their metadata, and `sheet.png`.

    The images are written first: whatever fails or interrupts after that leaves them.

    Args:
        pipeline: that generated the result; it extracts the conditions for the sheet.
        result: of one request.
        out: the folder, or with `numbered` the parent of a new one.
        notes, photos: as for `generate`.
        numbered: whether the files go into a new numbered folder.

    Raises:
        CnppError: files cannot be written, or the sheet cannot be made; the message names the images.
    """
    start = perf_counter()
    try:
        records = picture_records(pipeline, result)
        texts = [metadata.pack(record) for record in records]
    except Exception as e:
        bare = save_images(out, list(result.images), [{}] * len(result.images), numbered=numbered)
        raise CnppError(f"the images' metadata could not be made ({one_line(e)}); {kept_note(bare.images)}") from e
    saved = save_images(out, list(result.images), texts, numbered=numbered)
    written = perf_counter()
    try:
        sheet, scores = _sheet(pipeline, result, photos, saved)
    except KeyboardInterrupt:
        logger.info("before the sheet was made: %s", kept_note(saved.images))
        raise
    except Exception as e:
        raise CnppError(f"the sheet could not be made ({one_line(e)}); {kept_note(saved.images)}") from e
    timings = {**result.timings, "write": written - start, "sheet": perf_counter() - written}
    timings["total"] += timings["write"] + timings["sheet"]
    record = records[0]
    return GenerateResult(
        folder=saved.folder,
        images=saved.images,
        sheet=sheet,
        scores=scores,
        seeds=result.request.seeds,
        timings=timings,
        notes=(*notes, *result.notes, *saved.notes),
        pixels_sha256=tuple(r.pixels_sha256 for r in records),
        request=to_builtins(record.request),
        bundle=to_builtins(record.bundle),
        backend=record.backend,
        reason=pipeline.reason,
        memory=pipeline.backend.memory(),
    )


def _fitted(pixels: Pixels, path: Path, size: tuple[int, int], mode: ResizeMode, notes: list[str]) -> Pixels:
    """A photo at the bundle's size, or as it is where it is stretched: extractor and encoder do that themselves."""
    if mode != "stretch":
        return fit(pixels, *size, mode, "lanczos", fill="edge")
    if note := aspect_note(str(path), pixels, *size):
        notes.append(note)
    return pixels


def _control_image(bundle: Bundle, option: ControlOption, mode: ResizeMode, notes: list[str]) -> Pixels:
    assert option.image is not None
    manifest, condition = bundle.manifest, option.condition
    # What is transparent in a control image is "nothing here": black.
    file = read_image(option.image)
    ade20k = "palette" not in manifest.conditions[condition]
    if found := control_image_note(condition, file, ade20k=ade20k, extractable=can_extract(bundle, condition)):
        notes.append(found)
    size = (manifest.width, manifest.height)
    if mode == "stretch":
        if note := aspect_note(str(file.path), file.pixels, *size):
            notes.append(note)
        return file.pixels
    return fit(file.pixels, *size, mode, CONDITIONS[condition].resample)


def _example(bundle: Bundle, condition: str) -> dict[str, Any]:
    example = bundle.manifest.conditions[condition]
    if "image" not in example:
        raise UserError(f"{bundle.folder} ships no example for {condition!r}: give an image with --image FILE")
    return {**example, "path": bundle.file(example["image"])}


def _sheet(
    pipeline: "Pipeline", result: "Result", photos: Sequence[Pixels | None], saved: Saved
) -> tuple[Path | None, tuple[tuple[str, tuple[Score, ...]], ...]]:
    """The sheet's path, and the scores of the controls that can be extracted."""
    request = result.request
    if not request.controls:
        return None, ()
    photos = photos or [None] * len(request.controls)
    rows = [
        _row(pipeline, control, image, photo, result)
        for control, image, photo in zip(request.controls, result.control_images, photos, strict=True)
    ]
    page = draw_sheet(
        list(result.images),
        [row for row, _ in rows],
        prompt=request.prompt,
        details=f"{request.scheduler} · {request.num_inference_steps} steps · guidance {request.guidance_scale:g}",
        captions=[f"seed {seed}" for seed in request.seeds],
        init_image=request.init_image,
    )
    path = saved.folder / "sheet.png"
    save_png(path, page)
    return path, tuple((c.condition, found) for c, (_, found) in zip(request.controls, rows, strict=True) if found)


def _row(
    pipeline: "Pipeline", control: Control, given: Pixels, photo: Pixels | None, result: "Result"
) -> tuple[SheetControl, tuple[Score, ...]]:
    title = CONDITIONS[control.condition].title
    if not can_extract(pipeline.bundle, control.condition):
        blank, images = np.full_like(given, 255), len(result.images)
        return SheetControl(title, given, [blank] * images, ["no extractor"] * images, photo), ()
    extracted = [pipeline.extract(control.condition, image) for image in result.images]
    scores = tuple(graded_score(pipeline.bundle, control.condition, given, found) for found in extracted)
    return SheetControl(title, given, extracted, [_caption(s) for s in scores], photo), scores


def _caption(score: Score) -> str:
    return f"{score} · {score.grade}" if score.grade else str(score)


def picture_records(pipeline: "Pipeline", result: "Result") -> list[PictureRecord]:
    """What each image of a result says of itself: `output.metadata.pack` makes the text of a PNG of it."""
    m, begin = pipeline.bundle.manifest, result.request.init_image
    # As it was used: a photo may be larger than a record.
    init_image = None if begin is None else fit_init_image(pipeline.bundle, begin)[0]
    recorded = metadata.request_record(result.request, result.control_images, init_image)
    fields = {"model": m.model, "digest": pipeline.bundle.digest, "precision": m.number_format}
    bundle = convert({**fields, "width": m.width, "height": m.height}, BundleRecord)
    versions = _versions()
    return [
        PictureRecord(
            version=__version__,
            request=recorded,
            image_index=i,
            bundle=bundle,
            backend=pipeline.backend.name,
            versions=versions,
            pixels_sha256=metadata.pixels_sha256(image),
        )
        for i, image in enumerate(result.images)
    ]


@cache
def _versions() -> dict[str, str]:
    """Of what draws; looking them up takes some milliseconds, and a server does it for every image."""
    return {"python": platform.python_version(), **installed(RUNTIME_PACKAGES)}
