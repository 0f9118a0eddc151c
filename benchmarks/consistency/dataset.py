"""What consistency is measured on: prompts with a control image each.

A folder of the user's own has a file `prompts.jsonl`, a JSON object a line:

    {"id": "17", "prompt": "a house by a lake", "condition": "17.png"}
    {"prompt": "a house by a lake", "image": "18.jpg"}

`condition` is a control image; for `seg` also a label map: a PNG with one channel of 8 bits, 0 = wall … 149 = flag, and
255 where unlabeled. Without it the condition is extracted from the photo `image`. Paths are relative to the folder;
without an `id` the line's number is one. Pictures of another size are resized as `cnpp-trt run` does it.
"""

import hashlib
import io
import json
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...conditions import CONDITIONS
from ...errors import UserError
from ...files import sha256_of
from ...messages import one_line, printable
from ...miniature import EMBEDDED
from ...miniature.scenes import draw_scene
from ...runtime.control.palette import colors_from_labels, labels_from_colors
from ...runtime.images.image_files import MAX_FILE_BYTES, decode_image, read_bytes, read_image, resize
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import MAX_PROMPT
from ...schema import Meta, Record, SchemaError, decode, read_bounded
from ..requests import FIRST_SCENE, control

PROMPTS = "prompts.jsonl"
MAX_LINES = 1_000_000
MAX_LINE_BYTES = 1 << 20
# A share of pixels in none of ADE20K's colors above which a picture is no segmentation map.
MAX_INEXACT = 0.01


class Data(Protocol):
    """Prompts with their control images.

    Attributes:
        title: for people.
        digest: of all that prompts and control images are made from.
        ids: of the prompts, in order, each another one.
    """

    title: str
    digest: str
    ids: list[str]

    def prompt(self, index: int) -> str:
        """The prompt of this index."""
        ...

    def control(self, index: int, condition: str) -> NDArray[np.uint8]:
        """The control image at the bundle's size, uint8 [H,W,3]."""
        ...


class Scenes:
    """Fresh scenes of the embedded models, made on the fly: nothing was trained or measured on them."""

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        if pipeline.bundle.manifest.model not in EMBEDDED:
            raise UserError(
                f"there are no prompts for {pipeline.bundle.manifest.model}: give a folder of them with --data FOLDER"
            )
        self._pipeline = pipeline
        self.title = f"{count} fresh scenes"
        # More of them go on from fewer: the digest is that of how scenes are drawn.
        first = draw_scene(FIRST_SCENE)
        self.digest = hashlib.sha256(first.image.tobytes() + first.caption.encode()).hexdigest()
        self.ids = [str(i) for i in range(count)]

    def prompt(self, index: int) -> str:
        """The caption of the scene."""
        return draw_scene(FIRST_SCENE + index).caption

    def control(self, index: int, condition: str) -> NDArray[np.uint8]:
        """The scene's control image, uint8 [H,W,3]."""
        return control(self._pipeline, condition, index)[0]


class _Fields(Record):
    """A line of the file; what is empty was not given."""

    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)]
    id: Annotated[str, Meta(max_length=200)] = ""
    condition: Annotated[str, Meta(max_length=4096)] = ""
    image: Annotated[str, Meta(max_length=4096)] = ""


@dataclass(frozen=True)
class _Line:
    number: int
    id: str
    prompt: str
    condition: Path | None
    image: Path | None

    @property
    def file(self) -> Path:
        file = self.condition or self.image
        assert file is not None  # one of them is there: _read_line
        return file


class Folder:
    """Prompts of the user's own; see the head of this file.

    Every file is read once, for its digest, and decoded when its prompt's turn comes.

    Args:
        count: how many of the prompts; None for all.

    Raises:
        UserError: the message names the file and line.
    """

    def __init__(self, folder: Path, pipeline: Pipeline, conditions: Sequence[str], count: int | None = None) -> None:
        self._path = folder / PROMPTS
        self._pipeline = pipeline
        lines = self._lines()
        digest = hashlib.sha256()
        for line in lines:
            self._check(line, conditions)
            digest.update(json.dumps([line.id, line.prompt, line.condition is None, sha256_of(line.file)]).encode())
        self.digest = digest.hexdigest()
        self._chosen = lines[:count]
        self.ids = [line.id for line in self._chosen]
        self.title = f"{len(self.ids)} prompts of {printable(folder.resolve().name)}"

    def prompt(self, index: int) -> str:
        """The prompt of this line."""
        return self._chosen[index].prompt

    def control(self, index: int, condition: str) -> NDArray[np.uint8]:
        """The line's control image at the bundle's size, uint8 [H,W,3]; extracted where the line has a photo."""
        line = self._chosen[index]
        try:
            if line.condition is None:
                return self._pipeline.extract(condition, read_image(line.file).pixels)
            picture = read_segmentation(line.file) if condition == "seg" else read_image(line.file).pixels
        except UserError as e:
            raise self._error(line.number, str(e)) from None
        m = self._pipeline.bundle.manifest
        if picture.shape[:2] == (m.height, m.width):
            return picture
        return resize(picture, m.width, m.height, CONDITIONS[condition].resample)

    def _lines(self) -> list[_Line]:
        try:
            texts = read_bounded(self._path).split(b"\n")
        except FileNotFoundError:
            raise UserError(
                f"there is no {printable(self._path)}: write one JSON object a line into it, as in "
                '{"prompt": "a house by a lake", "condition": "17.png"}'
            ) from None
        except OSError as e:
            raise UserError(f"cannot read {printable(self._path)}: {e.strerror or e}") from None
        except SchemaError as e:
            raise UserError(f"cannot read {printable(self._path)}: {e}") from None
        if len(texts) > MAX_LINES:
            raise UserError(f"{printable(self._path)} has {len(texts):,} lines, more than {MAX_LINES:,}")
        lines = [self._line(number, text) for number, text in enumerate(texts, 1) if text.strip()]
        if not lines:
            raise UserError(f"{printable(self._path)} is empty: write one JSON object a line into it")
        first: dict[str, int] = {}
        for line in lines:
            if line.id in first:
                raise self._error(line.number, f"has the id {printable(repr(line.id))} of line {first[line.id]}")
            first[line.id] = line.number
        return lines

    def _line(self, number: int, text: bytes) -> _Line:
        if len(text) > MAX_LINE_BYTES:
            raise self._error(number, f"has {len(text):,} bytes, more than {MAX_LINE_BYTES:,}")
        try:
            fields = decode(text, _Fields)
        except SchemaError as e:
            raise self._error(number, f"is no prompt: {e}: id, prompt, condition and image are known") from None
        if not fields.condition and not fields.image:
            raise self._error(number, "has neither a condition (a control image) nor an image (a photo)")
        if not fields.id.isprintable():
            raise self._error(number, f"has the id {printable(repr(fields.id))}: give one of printable characters")
        folder = self._path.parent
        return _Line(
            number,
            fields.id or str(number),
            fields.prompt,
            folder / fields.condition if fields.condition else None,
            folder / fields.image if fields.image else None,
        )

    def _check(self, line: _Line, conditions: Sequence[str]) -> None:
        try:
            status = line.file.stat()
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else None
            raise self._error(line.number, f"there is no {printable(line.file)} ({reason or one_line(e)})") from None
        if not stat.S_ISREG(status.st_mode):
            raise self._error(line.number, f"{printable(line.file)} is no file")
        if status.st_size > MAX_FILE_BYTES:
            raise self._error(
                line.number, f"{printable(line.file)} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}"
            )
        if line.condition is not None and len(conditions) > 1:
            raise self._error(
                line.number,
                f"{printable(line.file.name)} is one condition of {', '.join(conditions)}: say which with one --cond",
            )

    def _error(self, number: int, what: str) -> UserError:
        return UserError(f"{printable(self._path)}, line {number}: {what}")


def read_segmentation(path: Path) -> NDArray[np.uint8]:
    """A segmentation map in ADE20K's colors, uint8 [H,W,3], from a picture of that, or from a label map.

    Raises:
        UserError: it is not a PNG, or neither of the two.
    """
    data, name = read_bytes(path), printable(path)
    pixels, kind = decode_image(data, name)
    if kind != "PNG":
        raise UserError(
            f"{name} is a {kind}: give a PNG; lossy compression changes labels, which cost ControlNet++ 8 points of "
            "mIoU in the paper's first version"
        )
    with Image.open(io.BytesIO(data)) as image:
        mode = image.mode
    if mode == "L":
        try:
            return colors_from_labels(pixels[..., 0])
        except UserError as e:
            raise UserError(f"{name}: {e} (0 = wall, 255 = unlabeled; ADE20K's own files count from 1)") from None
    if mode in ("1", "I", "I;16", "LA"):
        raise UserError(f"{name} has samples of mode {mode!r}: save labels as a PNG with one channel of 8 bits")
    inexact = labels_from_colors(pixels)[1]
    if inexact > MAX_INEXACT:
        raise UserError(f"{inexact:.0%} of {name} is in none of ADE20K's colors: it is no segmentation map")
    return pixels


def open_data(pipeline: Pipeline, conditions: Sequence[str], folder: Path | None, count: int | None) -> Data:
    """The user's folder, or 64 fresh scenes unless another `count` is asked for."""
    if folder is None:
        return Scenes(pipeline, 64 if count is None else count)
    return Folder(folder, pipeline, conditions, count)
