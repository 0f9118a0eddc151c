"""The images of a study: every prompt that has no record yet is generated and judged."""

import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ...conditions import CONDITIONS
from ...errors import CnppError
from ...files import replace_file
from ...messages import printable
from ...runtime.control.consistency import score
from ...runtime.images.image_files import resize
from ...runtime.images.png_files import encode_png
from ...runtime.output.metadata import pixels_sha256
from ...runtime.output.sheet import SheetControl, draw_sheet
from ...runtime.settings.request import ResolvedRequest
from ..systems import SUBJECT, ImageGenerator, System
from .shards import Shard, appending
from .study import Picture, Study, counts

logger = logging.getLogger(__name__)

# A sheet goes into the report in base64, which makes four bytes of three.
SHEET_BYTES = 75_000
_SHEET_IMAGES = 2
_REPORT_EVERY = 30.0  # seconds


class Generator(Protocol):
    """What generates the prompts of a study: this process, or workers elsewhere."""

    def records(self, system: System, condition: str, pending: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """The records of these prompts, in their order."""
        ...


class LocalGenerator:
    """This process alone.

    Args:
        study: whose prompts it generates.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._opened: tuple[str, ImageGenerator] | None = None

    def records(self, system: System, condition: str, pending: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """The records of these prompts, in their order."""
        for index in pending:
            yield self.record(system, condition, index)

    def record(self, system: System, condition: str, index: int) -> Mapping[str, Any]:
        """Generates and judges the images of one prompt."""
        if self._opened is None or self._opened[0] != system.name:
            self._opened = None  # two systems are not held at once
            self._opened = (system.name, system.open())
        return _generate_prompt(self._study, system, self._opened[1], condition, index)


def generate(study: Study, shard: Shard, generator: Generator | None = None) -> None:
    """Generates and judges the images of every prompt of this shard that has no record yet.

    Args:
        study: what is generated.
        shard: the part of it.
        generator: that does it; None: this process.

    Raises:
        UserError: earlier records are of another study.
    """
    # All of them before the first image is generated: a refusal must not come after hours.
    work = [
        (system, condition, [index for index in study.pending(system, condition) if shard.takes(index)])
        for system, condition in study.parts()
    ]
    for system in study.systems:
        if lacking := [condition for condition in study.conditions if condition not in system.conditions]:
            logger.info(f"{system.name} has no {', '.join(lacking)}: left out")
    generator = generator or LocalGenerator(study)
    for system, condition, pending in work:
        if pending:
            _generate_prompts(study, system, condition, pending, shard, generator)


def _generate_prompts(
    study: Study, system: System, condition: str, pending: Sequence[int], shard: Shard, generator: Generator
) -> None:
    start = said = time.perf_counter()
    with appending(study.place(system, condition), shard, study.header(system, condition)) as append:
        for done, record in enumerate(generator.records(system, condition, pending), 1):
            append(record)
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
