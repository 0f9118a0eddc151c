"""What the page and the server tell each other: frames of a WebSocket, each a record and the bytes that go with it."""

import json
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..schema import Record, SchemaError, decode

MAX_PARTS = 32
"""Of one frame."""
_HEAD = struct.Struct("<I")


class ControlMessage(Record):
    """A control; `image` or `labels` is the number of the part that holds it.

    Attributes:
        image: an image file.
        labels: one byte for each pixel of the model's size, row by row: an ADE20K label, or 255 for none.
        extract: the image is a photo from which the condition is extracted.
    """

    condition: str
    image: int | None = None
    labels: int | None = None
    extract: bool = False
    resize_mode: str = "stretch"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class Draw(Record, tag="draw"):
    """A request for images; it takes the place of the one that this page has under way.

    Attributes:
        id: the page's own number of it, which every answer repeats.
        seed: in decimal: a number of JavaScript's would not hold 64 bits.
        init_image: the number of the part with the image file to begin with.
        strength: how much of it is drawn anew, as in `Request`.
        compare: another model that draws the same beside it.
        kept: settings of a restored picture for which the page has no fields.
        preview: whether latents are shown on the way.
    """

    id: int
    model: str
    prompt: str = ""
    negative_prompt: str = ""
    added_prompt: str = ""
    images: int | float = 1  # a fraction is told of by the request's own check, beside its field
    steps: int | float | None = None
    guidance: float | None = None
    scheduler: str | None = None
    seed: str = "0"
    controls: tuple[ControlMessage, ...] = ()
    init_image: int | None = None
    strength: float | None = None
    compare: str | None = None
    kept: "Kept | None" = None
    preview: bool = False


class Kept(Record, omit_defaults=True):
    """Settings that only a restored picture brings."""

    clip_skip: int = 0
    clip_skip_negative: bool = False
    long_prompt: bool = False
    prompt_weights: bool = False
    guess_mode: bool = False


class Stop(Record, tag="stop"):
    """Ends what this page has under way."""


class Example(Record, tag="example"):
    """The model's own example of a condition is asked for."""

    id: int
    model: str
    condition: str


class Read(Record, tag="read"):
    """An image file, as part 1: the settings that it carries, or the labels that a segmentation's colors stand for."""

    id: int
    model: str
    condition: str


Message: TypeAlias = Draw | Stop | Example | Read


def read_message(frame: bytes) -> tuple[Message, list[bytes]]:
    """The record of a frame, and its parts; part 0 is the record itself.

    Raises:
        SchemaError: it is no such frame.
    """
    parts = unpack(frame)
    return decode(parts[0], Message), parts  # type: ignore[arg-type]  # a union of records is a type to msgspec


def unpack(frame: bytes) -> list[bytes]:
    """The parts of a frame.

    Raises:
        SchemaError: lengths and bytes disagree, there is no part, or there are too many.
    """
    parts: list[bytes] = []
    at = 0
    while at < len(frame):
        if at + _HEAD.size > len(frame) or len(parts) == MAX_PARTS:
            raise SchemaError("the frame cannot be read: load the page again")
        (length,) = _HEAD.unpack_from(frame, at)
        at += _HEAD.size
        if at + length > len(frame):
            raise SchemaError("the frame ends early: load the page again")
        parts.append(frame[at : at + length])
        at += length
    if not parts:
        raise SchemaError("the frame is empty: load the page again")
    return parts


def pack(parts: Sequence[bytes]) -> bytes:
    """A frame of parts: before each its length, 4 bytes, the lowest first."""
    return b"".join(piece for part in parts for piece in (_HEAD.pack(len(part)), part))


class Answer:
    """A frame on its way to the page: a record whose fields may name parts by their numbers."""

    def __init__(self, kind: str, **fields: Any) -> None:
        self.fields: dict[str, Any] = {"type": kind, **fields}
        self._parts: list[bytes] = []

    def part(self, content: bytes) -> int:
        """Adds bytes. Returns: their number."""
        self._parts.append(content)
        return len(self._parts)

    def frame(self) -> bytes:
        """The bytes that are sent."""
        return pack([json.dumps(self.fields, allow_nan=False).encode(), *self._parts])
