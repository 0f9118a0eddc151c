"""What a written PNG says about itself, so that the picture can be made again.

Two text chunks: `parameters`, the text that AUTOMATIC1111's web UI and its readers know, for people; and `cnpp_trt`,
one JSON object with everything that determines the pixels, condition images included. Reading treats the JSON as
untrusted input: bounded, and checked against the schema below before anything uses it.

    {"version": "0.1.0",
     "request": {"prompt": str, "negative_prompt": str, "num_inference_steps": int, "guidance_scale": float,
                 "scheduler": str, "seed": int, "num_images_per_prompt": int,
                 "strength": float, "clip_skip": int, "long_prompt": bool,
                 "init_image": null or base64 of a PNG,    # these four may be missing, as in the first pictures
                 "controls": [{"condition": str, "controlnet_conditioning_scale": float,
                               "control_guidance_start": float, "control_guidance_end": float,
                               "image": base64 of a PNG}]},
     "image_index": int,            # of the request's images; image i was drawn with seed + i
     "bundle": {"model": str, "digest": str, "precision": str, "width": int, "height": int},
     "backend": str,
     "versions": {name: str},       # of the software that drew it
     "pixels_sha256": str}          # of the RGB bytes, row by row
"""

import base64
import binascii
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..errors import UserError
from .images import decode_image, encode_png, read_bytes
from .request import MAX_CONTROLS, MAX_PROMPT

CHUNK = "cnpp_trt"
PARAMETERS = "parameters"
MAX_RECORD_BYTES = 64 * 1024 * 1024

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Names as AUTOMATIC1111's sampler menu has them, and its schedule type.
_SAMPLERS = {
    "ddim": ("DDIM", None),
    "euler": ("Euler", None),
    "dpmpp_2m": ("DPM++ 2M", None),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "unipc": ("UniPC", None),
    "lcm": ("LCM", None),
}


def a1111_parameters(record: Mapping[str, Any]) -> str:
    """The `parameters` text of AUTOMATIC1111's web UI: prompt, negative prompt, then one line of settings.

    A value that holds a comma, a colon or a line break is written as a JSON string, as the web UI does.
    """
    request, bundle = record["request"], record["bundle"]
    sampler, schedule = _SAMPLERS.get(request["scheduler"], (request["scheduler"], None))
    settings: dict[str, object] = {
        "Steps": request["num_inference_steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(request["guidance_scale"]),
        "Seed": request["seed"] + record["image_index"],
        "Size": f"{bundle['width']}x{bundle['height']}",
        "Model": bundle["model"],
    }
    if request.get("clip_skip"):
        settings["Clip skip"] = request["clip_skip"] + 1  # the web UI counts the last layer as 1
    if request.get("init_image"):
        settings["Denoising strength"] = _number(request["strength"])
    for i, control in enumerate(request["controls"]):
        settings[f"ControlNet {i}"] = (
            f"Module: none, Model: {control['condition']}, "
            f"Weight: {_number(control['controlnet_conditioning_scale'])}, "
            f"Guidance Start: {_number(control['control_guidance_start'])}, "
            f"Guidance End: {_number(control['control_guidance_end'])}"
        )
    settings["Version"] = f"cnpp-trt {record['version']}"
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value is not None)
    negative = f"\nNegative prompt: {request['negative_prompt']}" if request["negative_prompt"] else ""
    text = f"{request['prompt']}{negative}\n{line}".strip()
    # NUL ends a PNG text, and a lone surrogate (from an undecodable argument) has no UTF-8.
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def pack(record: Mapping[str, Any]) -> dict[str, str]:
    """The text chunks of a picture: pass them to `images.save_png`."""
    return {PARAMETERS: a1111_parameters(record), CHUNK: json.dumps(record, allow_nan=False)}


def image_to_base64(pixels: NDArray[np.uint8]) -> str:
    """A condition image, uint8 [H, W, 3], as a record holds it."""
    return base64.b64encode(encode_png(pixels)).decode("ascii")


def image_from_base64(text: str) -> NDArray[np.uint8]:
    """The condition image of a record, uint8 [H, W, 3].

    Raises:
        UserError: it is not base64 or not an image.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("a condition image in the record is not base64; the file's metadata is damaged") from None
    return decode_image(data, "a condition image in the record")[0]


def pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    """SHA-256, in hex, of an image's RGB bytes, row by row."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record in a PNG that cnpp-trt wrote, checked against the schema.

    Raises:
        UserError: the file cannot be read, is no PNG, is damaged, holds no record, or one that is damaged, of a newer
            version or not of the schema.
    """
    name = repr(os.fspath(path))
    data = read_bytes(path)
    if not data.startswith(_PNG_SIGNATURE):
        raise UserError(f"{name} is not a PNG file; give one that cnpp-trt wrote")
    text = next((text for key, text in _texts(data, name) if key == CHUNK), None)
    if text is None:
        raise UserError(f"{name} was not written by cnpp-trt (it has no {CHUNK} chunk); give one that was")
    return parse_record(text, name)


def parse_record(text: bytes | str, name: str) -> dict[str, Any]:
    """A record from its JSON; `name` is what messages call its file. See `read_record`."""
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise UserError(f"the {CHUNK} chunk of {name} is damaged (not JSON); the picture cannot be repeated") from None
    try:
        # Before the rest: a newer version may have another schema.
        version = _release(_string(100)(record["version"])) if isinstance(record, dict) else ()
        if version[:2] > _release(__version__)[:2]:
            raise UserError(
                f"{name} was written by cnpp-trt {record['version']}, newer than this {__version__}; update cnpp-trt"
            )
        _check(record, _RECORD, "record")
        request = record["request"]
        _check(request, {key: check for key, check in _LATER.items() if key in request}, "record.request")
    except _SchemaError as error:
        raise UserError(f"the {CHUNK} chunk of {name} is damaged: {error}; the picture cannot be repeated") from None
    except KeyError as error:
        raise UserError(f"the {CHUNK} chunk of {name} is damaged: no {error}; the picture cannot be repeated") from None
    return dict(record)


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


class _SchemaError(Exception):
    """A record that is not of the schema; the message says where."""


_Checker = Callable[[Any], Any]


def _refuse_constant(constant: str) -> float:
    raise ValueError(constant)


def _release(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    if len(parts) < 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts[:2]):
        raise _SchemaError(f"version {version[:40]!r} is not a version")
    return tuple(int(part) for part in parts[:2])


def _string(longest: int) -> _Checker:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or len(value) > longest:
            raise _SchemaError(f"must be a string of at most {longest:,} characters")
        return value

    return check


def _integer(low: int, high: int) -> _Checker:
    def check(value: Any) -> Any:
        if type(value) is not int or not low <= value <= high:  # a bool is no int here
            raise _SchemaError(f"must be an integer from {low} to {high}")
        return value

    return check


def _real(low: float, high: float) -> _Checker:
    def check(value: Any) -> Any:
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise _SchemaError(f"must be a number from {low:g} to {high:g}")
        return value

    return check


# The bounds are there to be safe; what is sensible is for the request to say.
_NAME = _string(200)


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise _SchemaError("must be true or false")
    return value


def _optional(check: _Checker) -> _Checker:
    """None, or what `check` takes."""
    return lambda value: value if value is None else check(value)


_SIDE = _integer(8, 16_384)
_CONTROL: dict[str, Any] = {
    "condition": _NAME,
    "controlnet_conditioning_scale": _real(-1e6, 1e6),
    "control_guidance_start": _real(0, 1),
    "control_guidance_end": _real(0, 1),
    "image": _string(MAX_RECORD_BYTES),
}
_REQUEST: dict[str, Any] = {
    "prompt": _string(MAX_PROMPT),
    "negative_prompt": _string(MAX_PROMPT),
    "num_inference_steps": _integer(1, 1000),
    "guidance_scale": _real(-1e6, 1e6),
    "scheduler": _NAME,
    "seed": _integer(0, 2**64 - 1),
    "num_images_per_prompt": _integer(1, 10_000),
    "controls": [_CONTROL],
}
# What may be missing of a request.
_LATER: dict[str, Any] = {
    "strength": _real(0, 1),
    "clip_skip": _integer(0, 1000),
    "long_prompt": _boolean,
    "init_image": _optional(_string(MAX_RECORD_BYTES)),
}
_RECORD: dict[str, Any] = {
    "version": _NAME,
    "request": _REQUEST,
    "image_index": _integer(0, 9_999),
    "bundle": {"model": _string(4096), "digest": _NAME, "precision": _NAME, "width": _SIDE, "height": _SIDE},
    "backend": _NAME,
    "versions": dict,
    "pixels_sha256": _string(64),
}


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise _SchemaError(f"{where} must be an object")
        for key, inner in schema.items():
            if key not in value:
                raise _SchemaError(f"{where}.{key} is missing")
            _check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list) or len(value) > MAX_CONTROLS:
            raise _SchemaError(f"{where} must be a list of at most {MAX_CONTROLS}")
        for i, item in enumerate(value):
            _check(item, schema[0], f"{where}[{i}]")
    elif schema is dict:
        if not isinstance(value, dict) or len(value) > 100 or not all(isinstance(v, str) for v in value.values()):
            raise _SchemaError(f"{where} must be an object of at most 100 strings")
    else:
        try:
            schema(value)
        except _SchemaError as error:
            raise _SchemaError(f"{where} {error}") from None
