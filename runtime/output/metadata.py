"""What a written PNG says about itself, so that the picture can be made again.

Two text chunks: `parameters`, the text that AUTOMATIC1111's web UI and its readers know, for people; and `cnpp_trt`,
one JSON object with everything that determines the pixels, condition images included: a `PictureRecord`. A record that
is read may come from anywhere: its size is bounded, and all of it is checked before anything uses it.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...conditions import CONDITIONS
from ...engines.flavor import MODULES as TENSORRT_FLAVORS
from ...errors import UserError
from ...messages import printable, unknown_choice
from ...schema import Meta, Record, SchemaError, decode, to_json
from ...versions import __version__
from ..images.image_files import MAX_PIXELS, decode_image, read_bytes
from ..images.png_files import encode_png
from ..sampling.scheduler_config import TIMESTEP_SPACINGS
from ..sampling.scheduler_names import A1111, SCHEDULE_TYPES
from ..sampling.schedulers import SCHEDULERS
from ..settings.options import BACKENDS
from ..settings.request import (
    MAX_CONTROLS,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SCALE,
    MAX_SEED,
    MAX_STEPS,
    Control,
    Request,
    ResolvedRequest,
)

CHUNK = "cnpp_trt"
PARAMETERS = "parameters"
MAX_RECORD_BYTES = 64 * 1024 * 1024
MAX_TEXT_BYTES = 48 * 1024 * 1024
"""Of a picture's text chunks together: Pillow refuses to open a PNG with more than 64 MiB of them."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# As backends call themselves.
_BACKENDS = (
    *(name for name in BACKENDS if name != "auto"),
    *(flavor for flavor in TENSORRT_FLAVORS if flavor not in BACKENDS),
    "openvino-bf16",
)

_Prompt: TypeAlias = Annotated[str, Meta(max_length=MAX_PROMPT)]
_Scale: TypeAlias = Annotated[float, Meta(ge=-MAX_SCALE, le=MAX_SCALE)]
_Seed: TypeAlias = Annotated[int, Meta(ge=0)]
_Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
_Image: TypeAlias = Annotated[str, Meta(max_length=MAX_RECORD_BYTES)]
_Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]
_Sha256: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Side: TypeAlias = Annotated[int, Meta(ge=8, le=16_384)]


class ControlRecord(Record):
    """A `Control`; `image` is base64 of a PNG, the control image as it was used."""

    condition: str
    controlnet_conditioning_scale: _Scale
    control_guidance_start: _Share
    control_guidance_end: _Share
    image: _Image

    def __post_init__(self) -> None:
        _require_one_of("condition", self.condition, CONDITIONS)


class RequestRecord(Record):
    """A `Request`: each field under its own name, images as base64 of a PNG.

    Fields with a default may be missing, as they are in older pictures: the default is what was drawn then.
    """

    prompt: _Prompt
    negative_prompt: _Prompt
    num_inference_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)]
    guidance_scale: _Scale
    scheduler: str
    seed: _Seed | Annotated[tuple[_Seed, ...], Meta(min_length=1, max_length=MAX_IMAGES)]
    num_images_per_prompt: Annotated[int, Meta(ge=1, le=MAX_IMAGES)]
    controls: Annotated[tuple[ControlRecord, ...], Meta(max_length=MAX_CONTROLS)]
    strength: Annotated[float, Meta(gt=0, le=1)] = 0.8
    clip_skip: Annotated[int, Meta(ge=0, le=1000)] = 0
    clip_skip_negative: bool = False
    long_prompt: bool = False
    prompt_weights: bool = False
    init_image: _Image | None = None
    guess_mode: bool = False
    timestep_spacing: str | None = None
    guidance_start: _Share = 0.0
    guidance_end: _Share = 1.0
    guidance_interval: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 1
    controlnet_interval: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 1
    cache_interval: Annotated[int, Meta(ge=1, le=MAX_STEPS)] = 1

    def __post_init__(self) -> None:
        _require_one_of("scheduler", self.scheduler, SCHEDULERS)
        if self.timestep_spacing is not None:
            _require_one_of("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        images = self.num_images_per_prompt
        if isinstance(self.seed, int) and self.seed > MAX_SEED + 1 - images:
            raise ValueError(f"seed must be at most 2**64 - {images} (the number of images)")
        if isinstance(self.seed, tuple) and (len(self.seed) != images or max(self.seed) > MAX_SEED):
            raise ValueError(f"seed must be {images} numbers (the number of images) below 2**64")

    def seed_of(self, image: int) -> int:
        """The seed of an image."""
        return self.seed + image if isinstance(self.seed, int) else self.seed[image]


class BundleRecord(Record):
    """Which bundle drew it; `precision` is that of its large networks."""

    model: Annotated[str, Meta(min_length=1, max_length=4096)]
    digest: _Sha256
    precision: Literal["fp32", "fp16", "int8", "fp8"]
    width: _Side
    height: _Side

    def __post_init__(self) -> None:
        if self.width * self.height > MAX_PIXELS:
            raise ValueError(f"width times height must be at most {MAX_PIXELS:,}")


class PictureRecord(Record):
    """Everything that determines a picture.

    Attributes:
        version: of cnpp-trt.
        image_index: which of the request's images; image i was drawn with seed + i.
        versions: of the software that drew it.
        pixels_sha256: of the RGB bytes, row by row.
    """

    version: _Name
    request: RequestRecord
    image_index: Annotated[int, Meta(ge=0)]
    bundle: BundleRecord
    backend: str
    versions: Annotated[dict[_Name, _Name], Meta(max_length=100)]
    pixels_sha256: _Sha256

    def __post_init__(self) -> None:
        _require_one_of("backend", self.backend, _BACKENDS)
        if self.image_index >= self.request.num_images_per_prompt:
            raise ValueError(f"image_index must be below {self.request.num_images_per_prompt} (the number of images)")


def request_record(
    request: ResolvedRequest, control_images: Collection[NDArray[np.uint8]], init_image: NDArray[np.uint8] | None
) -> RequestRecord:
    """A request as it was run.

    Args:
        request: with every setting and seed.
        control_images: for each control, uint8 [H,W,3] at the bundle's size.
        init_image: uint8 [H,W,3] at the bundle's size, or None.
    """
    controls = tuple(
        ControlRecord(
            condition=c.condition,
            controlnet_conditioning_scale=c.controlnet_conditioning_scale,
            control_guidance_start=c.control_guidance_start,
            control_guidance_end=c.control_guidance_end,
            image=image_to_base64(image),
        )
        for c, image in zip(request.controls, control_images, strict=True)
    )
    first = None if init_image is None else image_to_base64(init_image)
    fields = {name: getattr(request, name) for name in RequestRecord.__struct_fields__}
    return RequestRecord(**{**fields, "controls": controls, "init_image": first})


def request_from_record(record: PictureRecord) -> Request:
    """The request of a record: `request_record`'s inverse.

    Raises:
        UserError: an image is damaged or not of the bundle's size, or the request is none that can be drawn.
    """
    size = (record.bundle.width, record.bundle.height)
    fields = {name: getattr(record.request, name) for name in RequestRecord.__struct_fields__}
    fields["controls"] = tuple(
        Control(
            c.condition,
            image_from_base64(c.image, size),
            c.controlnet_conditioning_scale,
            c.control_guidance_start,
            c.control_guidance_end,
        )
        for c in record.request.controls
    )
    if record.request.init_image is not None:
        fields["init_image"] = image_from_base64(record.request.init_image, size)
    return Request(**fields)


def a1111_parameters(record: PictureRecord) -> str:
    """The `parameters` text of AUTOMATIC1111's web UI: prompt, negative prompt, then one line of settings.

    A value that holds a comma, a colon or a line break is written as a JSON string, as the web UI does.
    """
    request, bundle = record.request, record.bundle
    sampler, schedule = A1111.get(request.scheduler, (request.scheduler, None))
    schedule = SCHEDULE_TYPES.get(request.timestep_spacing or "", schedule)
    settings: dict[str, object] = {
        "Steps": request.num_inference_steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(request.guidance_scale),
        "Seed": request.seed_of(record.image_index),
        "Size": f"{bundle.width}x{bundle.height}",
        "Model": bundle.model,
    }
    if request.clip_skip:
        settings["Clip skip"] = request.clip_skip + 1  # the web UI counts the last layer as 1
    if request.init_image is not None:
        settings["Denoising strength"] = _number(request.strength)
    for i, control in enumerate(request.controls):
        settings[f"ControlNet {i}"] = (
            f"Module: none, Model: {control.condition}, "
            f"Weight: {_number(control.controlnet_conditioning_scale)}, "
            f"Guidance Start: {_number(control.control_guidance_start)}, "
            f"Guidance End: {_number(control.control_guidance_end)}"
            + (", Control Mode: ControlNet is more important" if request.guess_mode else "")
        )
    if (request.guidance_start, request.guidance_end) != (0, 1):
        settings["CFG interval"] = f"{_number(request.guidance_start)}-{_number(request.guidance_end)}"
    if request.guidance_interval > 1:
        settings["CFG every"] = request.guidance_interval
    if request.controlnet_interval > 1:
        settings["ControlNet interval"] = request.controlnet_interval
    if request.cache_interval > 1:
        settings["DeepCache interval"] = request.cache_interval
    settings["Version"] = f"cnpp-trt {record.version}"
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value is not None)
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    text = f"{request.prompt}{negative}\n{line}".strip()
    # NUL ends a PNG text, and a lone surrogate (from an undecodable argument) has no UTF-8.
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def pack(record: PictureRecord) -> dict[str, str]:
    """The text chunks of a picture: pass them to `images.save_png`.

    `CHUNK` is left out where the record is larger than a reader takes.
    """
    texts = {PARAMETERS: a1111_parameters(record), CHUNK: to_json(record, indent=None).rstrip()}
    if sum(map(len, texts.values())) > MAX_TEXT_BYTES:
        del texts[CHUNK]
    return texts


def image_to_base64(pixels: NDArray[np.uint8]) -> str:
    """A condition image, uint8 [H, W, 3], as a record holds it."""
    return base64.b64encode(encode_png(pixels)).decode("ascii")


def image_from_base64(text: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """An image of a record, uint8 [H, W, 3].

    Args:
        size: the (width, height) that it must have, in pixels: no other image is decoded. None: any.

    Raises:
        UserError: it is not base64, not a PNG, damaged or of another size.
    """
    name = "an image in the record"
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is not base64; the file's metadata is damaged") from None
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        raise UserError(f"{name} is not a PNG; the file's metadata is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    if size is not None and (width, height) != size:
        raise UserError(f"{name} is {width}x{height}, not {size[0]}x{size[1]}; the file's metadata is damaged")
    return decode_image(data, name)[0]


def pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    """SHA-256, in hex, of an image's RGB bytes, row by row."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def read_record(path: str | os.PathLike[str]) -> PictureRecord:
    """The record in a PNG that cnpp-trt wrote.

    Raises:
        UserError: the file cannot be read, is no PNG, is damaged, holds no record, or one that is damaged, of a newer
            version or not a `PictureRecord`.
    """
    name = printable(repr(os.fspath(path)))
    data = read_bytes(path)
    if not data.startswith(_PNG_SIGNATURE):
        raise UserError(f"{name} is not a PNG file; give one that cnpp-trt wrote")
    text = next((text for key, text in _texts(data, name) if key == CHUNK), None)
    if text is None:
        raise UserError(f"{name} was not written by cnpp-trt (it has no {CHUNK} chunk); give one that was")
    return parse_record(text, name)


def parse_record(text: bytes | str, name: str) -> PictureRecord:
    """A record from its JSON; `name` is what messages call its file. See `read_record`."""
    try:
        # Before the rest: a newer version may have another schema.
        version = decode(text, _Version).version
        if _release(version) > _release(__version__):
            raise UserError(
                f"{name} was written by cnpp-trt {printable(version, 40)}, newer than this {__version__}; "
                "update cnpp-trt"
            )
        return decode(text, PictureRecord)
    except SchemaError as error:
        raise UserError(f"the {CHUNK} chunk of {name} is damaged: {error}; the picture cannot be repeated") from None


class _Version(msgspec.Struct):
    """The one key that records of every version have."""

    version: str


def _require_one_of(what: str, word: str, choices: Collection[str]) -> None:
    if word not in choices:
        raise unknown_choice(what, word, choices)


def _release(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    found = re.match(r"(\d{1,5})\.(\d{1,5})(?=\.|\Z)", version, re.ASCII)
    if not found:
        raise SchemaError(f"version {printable(repr(version), 40)} is not a version")
    return int(found[1]), int(found[2])


def _number(value: float) -> str:
    """A number without a trailing '.0'."""
    return str(int(value)) if float(value).is_integer() else str(value)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value


def _texts(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Keyword and text of each text chunk. Parsed here because Pillow's limits on text are process-wide globals."""
    position = len(_PNG_SIGNATURE)
    while position < len(data):
        if position + 12 > len(data):
            raise UserError(f"{name} is a truncated PNG file; fetch it again")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise UserError(f"{name} is a truncated PNG file; fetch it again")
        if kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(CHUNK.encode() + b"\0", position + 8):
            body = data[position + 8 : end - 4]
            if zlib.crc32(kind + body) != struct.unpack_from(">I", data, end - 4)[0]:
                raise UserError(f"{name} is a damaged PNG file (its {CHUNK} chunk fails its checksum); fetch it again")
            yield CHUNK, _text(kind, body[len(CHUNK) + 1 :], name)
        if kind == b"IEND":
            return
        position = end


def _text(kind: bytes, body: bytes, name: str) -> bytes:
    compressed = kind == b"zTXt"
    if kind == b"iTXt":  # compression flag, method, language, translated keyword
        compressed = body[:1] == b"\1"
        parts = body[2:].split(b"\0", 2)
        body = parts[2] if len(parts) == 3 else b""
    elif compressed:
        body = body[1:]
    if compressed:
        try:
            body = zlib.decompressobj().decompress(body, MAX_RECORD_BYTES + 1)
        except zlib.error:
            raise UserError(f"the {CHUNK} chunk of {name} is damaged; the picture cannot be repeated") from None
    if len(body) > MAX_RECORD_BYTES:
        raise UserError(
            f"the {CHUNK} chunk of {name} is longer than {MAX_RECORD_BYTES:,} bytes; it is not a real record"
        )
    return body
