"""What a job writes for each request: images and a record, under names that follow from the request alone.

    images/3f/3f0c…-0.png      image 0 of the request with this key
    images/3f/3f0c…-1.png
    controls/a1/a1d4….png      a control image as it was used, by the digest of its pixels
    records/3f/3f0c….json      written last: where it is, the request is done

Every file is written beside its place, brought to the disk and renamed. So at any moment a file is whole or absent,
and two processes that write the same request write the same bytes.
"""

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image

from ..errors import CnppError
from ..files import PARTIAL, replace_file
from ..messages import one_line, printable
from ..runtime.images.image_files import Pixels
from ..runtime.images.png_files import encode_png
from ..runtime.output.metadata import CHUNK, PARAMETERS, pixels_sha256
from ..schema import Record, SchemaError, decode, read_bounded, to_json

ImageFormat: TypeAlias = Literal["png", "webp", "jpeg"]
IMAGE_FORMATS: tuple[str, ...] = get_args(ImageFormat)
FOLDERS = ("images", "controls", "records", "shards")
MAX_RECORD = 4 << 20
# Of EXIF: two strings, and the folder that holds the second.
_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286
_MAX_JPEG_EXIF = 65_000  # a JPEG's segment


class ImageOfRecord(Record):
    """An image that was drawn.

    Attributes:
        file: below the job's folder.
        size: of the file, in bytes.
        scores: of each condition that can be extracted; of two controls of one condition the worse.
        tries: how many seeds were drawn, this one included.
        passed: whether the filter lets it through.
    """

    file: str
    size: int
    pixels_sha256: str
    seed: int
    scores: dict[str, float]
    tries: int
    passed: bool


class ControlOfRecord(Record):
    """A control image as it was used; `file` is below the job's folder."""

    condition: str
    file: str


class RequestOfRecord(Record):
    """Everything that was drawn for a request."""

    key: str
    prompt: str
    images: list[ImageOfRecord]
    controls: list[ControlOfRecord]
    notes: list[str]


@dataclass(frozen=True)
class Outputs:
    """Reads and writes the files of requests.

    Attributes:
        folder: of the job.
        image_format: png, webp or jpeg.
        quality: of webp and jpeg, 1 to 100; with 100 webp is lossless.
    """

    folder: Path
    image_format: ImageFormat = "png"
    quality: int = 90

    def image(self, key: str, index: int) -> str:
        """The name of an image's file, below the folder."""
        ending = "jpg" if self.image_format == "jpeg" else self.image_format
        return f"images/{key[:2]}/{key}-{index}.{ending}"

    def read(self, key: str) -> RequestOfRecord | None:
        """The record of a request that is done; None where something of it is missing."""
        try:
            record = decode(read_bounded(self._record(key), MAX_RECORD), RequestOfRecord)
            whole = all((self.folder / i.file).stat().st_size == i.size for i in record.images)
            there = all((self.folder / c.file).is_file() for c in record.controls)
        except (OSError, SchemaError):
            return None
        return record if whole and there and record.key == key else None

    def write(self, path: str, content: bytes) -> None:
        """A file below the folder; one that is there with these bytes is left alone.

        Raises:
            CnppError: it cannot be written.
        """
        file = self.folder / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, content)
        except OSError as e:
            raise CnppError(
                f"cannot write {printable(file)} ({e.strerror or one_line(e)}): mend that and run again to go on"
            ) from None

    def write_control(self, condition: str, pixels: Pixels) -> ControlOfRecord:
        """Writes a control image, once for all requests that share it."""
        digest = pixels_sha256(pixels)
        file = f"controls/{digest[:2]}/{digest[:32]}.png"
        if not (self.folder / file).is_file():
            self.write(file, encode_png(pixels))
        return ControlOfRecord(condition=condition, file=file)

    def write_record(self, record: RequestOfRecord) -> None:
        """Makes a request done. Its images must have been written."""
        self.write(f"records/{record.key[:2]}/{record.key}.json", to_json(record, None).encode())

    def encode(self, pixels: Pixels, texts: Mapping[str, str]) -> bytes:
        """The bytes of an image's file, with its metadata."""
        return encode_image(pixels, texts, self.image_format, self.quality)

    def remove_partial(self) -> None:
        """Removes what killed processes left half-written."""
        for folder, folders, files in os.walk(self.folder):
            if folder == str(self.folder):
                folders[:] = [name for name in folders if name in FOLDERS]  # nothing else is a job's
            for file in files:
                if file.startswith(".") and PARTIAL in file:
                    with suppress(OSError):
                        (Path(folder) / file).unlink()

    def _record(self, key: str) -> Path:
        return self.folder / "records" / key[:2] / f"{key}.json"


def encode_image(pixels: Pixels, texts: Mapping[str, str], image_format: ImageFormat, quality: int) -> bytes:
    """An image's file with its metadata: in a PNG's text, or in EXIF as AUTOMATIC1111's web UI has it.

    In EXIF, `UserComment` has the settings for people and `ImageDescription` the record that repeats the image. A JPEG
    holds no more than 64 KiB of both: a longer record is left out.

    Args:
        pixels: uint8 [H, W, 3].
        texts: as `metadata.pack` makes them.
        image_format: png, webp or jpeg.
        quality: of webp and jpeg, 1 to 100.
    """
    if image_format == "png":
        return encode_png(pixels, texts)
    comment = b"UNICODE\0" + texts.get(PARAMETERS, "").encode("utf-16-be", "replace")
    description = texts.get(CHUNK, "")
    if image_format == "jpeg" and len(comment) + len(description) > _MAX_JPEG_EXIF:
        description = ""
        comment = comment[: _MAX_JPEG_EXIF // 2 * 2]
    exif = Image.Exif()
    if description:
        exif[_DESCRIPTION] = description
    exif.get_ifd(_EXIF)[_COMMENT] = comment
    buffer = io.BytesIO()
    options: dict[str, Any] = {"exif": exif, "quality": quality}
    if image_format == "webp":
        options |= {"lossless": quality == 100, "method": 4}
    Image.fromarray(pixels).save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def worst(scores: Sequence[tuple[str, float, bool]]) -> dict[str, float]:
    """(condition, score, whether higher is better) of each control → the worst score of each condition."""
    found: dict[str, float] = {}
    for condition, value, higher in scores:
        before = found.get(condition, value)
        found[condition] = min(before, value) if higher else max(before, value)
    return found
