"""Consistency over many prompts, as the ControlNet++ paper measures it, of several systems on the same requests.

The paper's protocol (arXiv 2404.07987, section 4.1; `eval/` of its repository): 20 steps, guidance 7.5, four images a
prompt, negative prompt "worst quality, low quality". Every system gets the same prompts, seeds and control images; the
deployed bundle's extractors judge all of them. A prompt leaves a record for each system and condition (`shards`), from
which `scores` computes everything.
"""

import base64
import io
import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...bundles.bundle import Manifest
from ...bundles.defaults import SamplingDefaults
from ...conditions import CONDITIONS
from ...errors import CnppError, UserError
from ...files import replace_file
from ...messages import printable
from ...miniature import EMBEDDED
from ...runtime.control.consistency import MeanIoU, edges, f1_counts, score
from ...runtime.control.extraction import can_extract
from ...runtime.control.palette import labels_from_colors
from ...runtime.images.image_files import read_bytes, read_image, resize
from ...runtime.images.png_files import encode_png
from ...runtime.output.metadata import pixels_sha256
from ...runtime.output.sheet import SheetControl, draw_sheet
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import Control, ResolvedRequest
from .. import records
from ..systems import SUBJECT, ImageGenerator, System
from .dataset import Data
from .shards import Shard, appending, read_records, remove_records

logger = logging.getLogger(__name__)

NEGATIVE_PROMPT = "worst quality, low quality"
# A sheet goes into the report in base64, which makes four bytes of three.
SHEET_BYTES = 75_000
_SHEET_IMAGES = 2
_REPORT_EVERY = 30.0  # seconds

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class SamplingConfig:
    """How images are generated. Image i of prompt k has the seed k * images + i: no two images share their noise."""

    images: int
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    scheduler: str


def sampling_config(
    manifest: Manifest,
    images: int = 4,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
) -> SamplingConfig:
    """The paper's where nothing else is said; an embedded model's own, whose text encoder knows of no quality."""
    embedded = manifest.model in EMBEDDED
    own = SamplingDefaults.of(manifest)
    paper = SamplingDefaults(scheduler=own.scheduler)
    defaults = own if embedded else paper

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    return SamplingConfig(
        images=images,
        negative_prompt=first(negative_prompt, "" if embedded else NEGATIVE_PROMPT),
        num_inference_steps=first(steps, defaults.num_inference_steps),
        guidance_scale=first(guidance_scale, defaults.guidance_scale),
        scheduler=first(scheduler, defaults.scheduler),
    )


@dataclass(frozen=True)
class Study:
    """Systems that generate the same requests, and the one that judges their images.

    Attributes:
        deployed: extracts and judges.
        systems: the deployed one first.
        folder: of the records, `<system>/<condition>/records-1of1.jsonl`.
        keep_pictures: beside them, as `<prompt's index>-<image>.png`.

    Raises:
        UserError: a condition cannot be judged.
    """

    deployed: Pipeline
    systems: Sequence[System]
    data: Data
    conditions: Sequence[str]
    sampling: SamplingConfig
    folder: Path
    keep_pictures: bool = False

    def __post_init__(self) -> None:
        for condition in self.conditions:
            self.deployed.bundle.require_condition(condition)
            if not can_extract(self.deployed.bundle, condition):
                raise UserError(
                    f"{printable(self.deployed.bundle.folder)} has no extractor for {condition!r} to judge images by: "
                    "choose others with --cond"
                )

    def parts(self) -> Iterator[tuple[System, str]]:
        """Every system with every condition that it has."""
        for system in self.systems:
            for condition in self.conditions:
                if condition in system.conditions:
                    yield system, condition

    def place(self, system: System, condition: str) -> Path:
        """The folder of a system's records of a condition."""
        return self.folder / system.name / condition

    def header(self, system: System, condition: str) -> dict[str, Any]:
        """Everything that a record depends on beside its prompt."""
        m = self.deployed.bundle.manifest
        judge = {"bundle": self.deployed.bundle.digest, "backend": self.deployed.backend.name}
        return {
            "system": system.name,
            "condition": condition,
            "width": m.width,
            "height": m.height,
            **asdict(self.sampling),
            "data": self.data.digest,
            "generated by": dict(system.identity),
            "judged by": judge,
        }

    def records(self, system: System, condition: str) -> dict[str, dict[str, Any]]:
        """The records by the prompt's id, in the data's order, whichever process made them.

        Raises:
            UserError: they are of another study, or damaged.
        """
        found = read_records(self.place(system, condition), self.header(system, condition), records.PromptRecord)
        for id_, record in found.items():
            if not _is_whole(record, self.sampling.images, CONDITIONS[condition].metric):
                raise UserError(
                    f"{printable(self.place(system, condition))}: the record of {printable(repr(id_))} is not whole: "
                    "start again with --fresh"
                )
        return {id_: found[id_] for id_ in self.data.ids if id_ in found}

    def request(self, condition: str, index: int) -> ResolvedRequest:
        """The request of a prompt, the same for every system."""
        p = self.sampling
        return ResolvedRequest(
            self.data.prompt(index),
            p.negative_prompt,
            controls=(Control(condition, self.data.control(index, condition)),),
            num_inference_steps=p.num_inference_steps,
            guidance_scale=p.guidance_scale,
            scheduler=p.scheduler,
            seed=index * p.images,
            num_images_per_prompt=p.images,
        )

    def sheet(self, condition: str) -> Path:
        """The file of the sheet of a condition's first prompt."""
        return self.folder / SUBJECT / condition / "sheet.png"

    def pictures(self, system: System, condition: str, index: int) -> list[Path]:
        """The files that a prompt's images are kept in."""
        return [self.place(system, condition) / f"{index}-{i}.png" for i in range(self.sampling.images)]

    def pending(self, system: System, condition: str) -> list[int]:
        """Prompts without a record, or without the files that should lie beside it."""
        done = self.records(system, condition)
        return [
            index
            for index, id_ in enumerate(self.data.ids)
            if id_ not in done or not all(path.is_file() for path in self._files(system, condition, index))
        ]

    def _files(self, system: System, condition: str, index: int) -> list[Path]:
        sheet = [self.sheet(condition)] if system.name == SUBJECT and index == 0 else []
        return sheet + (self.pictures(system, condition, index) if self.keep_pictures else [])


def command_of(study: Study, data: Path | None) -> str:
    """What would measure it again; folders by their names alone.

    Args:
        study: that was measured.
        data: the user's own folder.
    """
    m, p, (_, *others) = study.deployed.bundle.manifest, study.sampling, study.systems
    words = ["cnpp-trt consistency --model", shlex.quote(m.model), "--precision", study.deployed.precision]
    words += ["--backend", study.deployed.backend.name.removesuffix("-bf16")]
    words += [f"--cond {condition}" for condition in study.conditions]
    words += [f"--against {shlex.quote(system.name)}" for system in others]
    if data is not None:
        words += ["--data", shlex.quote(data.resolve().name)]
    if p.negative_prompt != sampling_config(m).negative_prompt:
        words += ["--negative-prompt", shlex.quote(p.negative_prompt)]
    words += [f"--prompts {len(study.data.ids)} --images {p.images} --steps {p.num_inference_steps}"]
    words += [f"--guidance-scale {p.guidance_scale:g} --scheduler {p.scheduler}"]
    return " ".join(words)


def start_again(study: Study) -> None:
    """Removes what a study left earlier."""
    for system, condition in study.parts():
        remove_records(study.place(system, condition))
        for path in study.place(system, condition).glob("*.png"):
            path.unlink(missing_ok=True)


def generate(study: Study, shard: Shard) -> None:
    """Generates and judges the images of every prompt of this shard that has no record yet.

    Raises:
        UserError: earlier records are of another study.
    """
    # All of them before the first image is generated: a refusal must not come after hours.
    work = {
        (system.name, condition): [index for index in study.pending(system, condition) if shard.takes(index)]
        for system, condition in study.parts()
    }
    for system in study.systems:
        if lacking := [condition for condition in study.conditions if condition not in system.conditions]:
            logger.info(f"{system.name} has no {', '.join(lacking)}: left out")
        own = {condition: pending for (name, condition), pending in work.items() if name == system.name and pending}
        if own:
            _generate_system(study, system, own, shard)


def _generate_system(study: Study, system: System, work: Mapping[str, Sequence[int]], shard: Shard) -> None:
    opened = system.open()  # goes when this returns: two systems are not held at once
    for condition, pending in work.items():
        _generate_prompts(study, system, opened, condition, pending, shard)


def _generate_prompts(
    study: Study, system: System, opened: ImageGenerator, condition: str, pending: Sequence[int], shard: Shard
) -> None:
    start = said = time.perf_counter()
    with appending(study.place(system, condition), shard, study.header(system, condition)) as append:
        for done, index in enumerate(pending, 1):
            append(_generate_prompt(study, system, opened, condition, index))
            if (now := time.perf_counter()) - said > _REPORT_EVERY or done == len(pending):
                logger.info(f"{system.name}, {condition}: {done} of {len(pending)} prompts in {now - start:.0f} s")
                said = now


def _generate_prompt(
    study: Study, system: System, opened: ImageGenerator, condition: str, index: int
) -> dict[str, Any]:
    request = study.request(condition, index)
    images = list(opened(request).images)
    given = request.controls[0].pixels
    found = [study.deployed.extract(condition, image) for image in images]
    scores = [score(condition, given, extracted) for extracted in found]
    if study.keep_pictures:
        for path, image in zip(study.pictures(system, condition, index), images, strict=True):
            _replace(path, encode_png(image))
    if index == 0 and system.name == SUBJECT:
        _replace(study.sheet(condition), encode_sheet(request, images, found, scores))
    return {
        "id": study.data.ids[index],
        "seeds": list(request.seeds),
        "scores": [s.value for s in scores],
        "counts": counts(condition, given, found),
        "pixels": [pixels_sha256(image) for image in images],
    }


def counts(condition: str, given: Picture, found: Sequence[Picture]) -> dict[str, list[int]]:
    """What of a prompt's images is pooled: pixels by class for mIoU, edge pixels for F1, nothing else.

    Returns:
        For mIoU the classes that either map has, with their `intersection` and `union`; for F1 `hits` and `marked`, one
            of each, as `runtime.consistency.f1_counts` has them.
    """
    match CONDITIONS[condition].metric:
        case "mIoU":
            metric = MeanIoU()
            for extracted in found:
                metric.update(labels_from_colors(given)[0], labels_from_colors(extracted)[0])
            intersection, union = metric.counts()
            classes = np.flatnonzero(union)
            return {
                "classes": classes.tolist(),
                "intersection": intersection[classes].tolist(),
                "union": union[classes].tolist(),
            }
        case "F1":
            pairs = [f1_counts(edges(given), edges(extracted)) for extracted in found]
            return {"hits": [sum(hits for hits, _ in pairs)], "marked": [sum(marked for _, marked in pairs)]}
        case _:
            return {}


def _is_whole(record: Mapping[str, Any], images: int, metric: str) -> bool:
    """Whether a record has a value for each image, and the counts that its metric pools."""
    names = {"mIoU": ("classes", "intersection", "union"), "F1": ("hits", "marked")}.get(metric, ())
    pooled = {len(record["counts"].get(name, ())) for name in names}
    return (
        all(len(record[name]) == images for name in ("seeds", "scores", "pixels"))
        and len(pooled) <= 1
        and (metric != "F1" or pooled == {1})
    )


def read_sheets(study: Study) -> list[records.Sheet]:
    """The sheets that have been written, one for each condition."""
    paths = {condition: study.sheet(condition) for condition in study.conditions}
    return [
        records.Sheet(condition=condition, png=base64.b64encode(read_bytes(path)).decode("ascii"))
        for condition, path in paths.items()
        if path.is_file()
    ]


def read_pictures(
    study: Study, system: System, condition: str, which: slice = slice(None)
) -> Iterator[tuple[int, list[Picture]]]:
    """(index, its images) of every prompt that was kept.

    Args:
        study: that keeps images.
        system: that generated them.
        condition: of the control images.
        which: of a prompt's images.

    Raises:
        UserError: a picture is not the one that was judged.
    """
    found: Mapping[str, Mapping[str, Any]] = study.records(system, condition)
    for index, id_ in enumerate(study.data.ids):
        if id_ not in found:
            continue
        paths = study.pictures(system, condition, index)[which]
        images = [read_image(path).pixels for path in paths]
        for path, image, digest in zip(paths, images, found[id_]["pixels"][which], strict=True):
            if pixels_sha256(image) != digest:
                raise UserError(
                    f"{printable(path)} is not the picture that was judged: delete it to have it generated again"
                )
        yield index, images


def encode_sheet(
    request: ResolvedRequest, images: Sequence[Picture], found: Sequence[Picture], scores: Sequence[object]
) -> bytes:
    """The sheet of a request's first two images as a PNG of 256 colors.

    The largest side of an image is 256 pixels, or fewer where the file would exceed `SHEET_BYTES`.
    """
    from PIL import Image

    (control,) = request.controls
    shown = slice(_SHEET_IMAGES)
    details = f"{request.scheduler} · {request.num_inference_steps} steps · guidance {request.guidance_scale:g}"
    captions = [f"seed {seed}" for seed in request.seeds][shown]
    resample = CONDITIONS[control.condition].resample
    for side in (256, 192, 128, 96, 64):
        maps = [_at_most(picture, side, resample) for picture in (control.pixels, *found[shown])]
        row = SheetControl(CONDITIONS[control.condition].title, maps[0], maps[1:], scores[shown])
        pictures = [_at_most(image, side, "lanczos") for image in images[shown]]
        sheet = draw_sheet(pictures, [row], prompt=request.prompt, details=details, captions=captions)
        file = io.BytesIO()
        Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() <= SHEET_BYTES:
            break
    return file.getvalue()


def _at_most(picture: Picture, side: int, resample: Literal["nearest", "lanczos"]) -> Picture:
    height, width = picture.shape[:2]
    share = side / max(height, width)
    return resize(picture, round(width * share), round(height * share), resample) if share < 1 else picture


def _replace(path: Path, content: bytes) -> None:
    try:
        replace_file(path, content)
    except OSError as e:
        raise CnppError(
            f"cannot write {printable(path)} ({e.strerror or e}): mend that and run again to go on"
        ) from None
