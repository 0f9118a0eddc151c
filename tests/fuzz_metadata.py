"""Pictures from the internet with a damaged or hostile record: `--repeat` reads each or refuses it in one line."""

import base64
import copy
import json
import random
import struct
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from cnpp_trt import __version__
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.images.png_files import encode_png
from cnpp_trt.runtime.output.metadata import read_record, request_from_record

SECONDS = 10  # for one picture, on a busy machine

_IMAGE = np.full((24, 32, 3), 90, np.uint8)
_PNG = encode_png(_IMAGE)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _huge_png() -> str:
    """Declares the right size in its first header and 4 gigapixels in a second one."""
    second = _chunk(b"IHDR", struct.pack(">IIBBBBB", 65_535, 65_535, 8, 2, 0, 0, 0))
    return base64.b64encode(_PNG[:33] + second + _PNG[33:]).decode()


RECORD: dict[str, Any] = {
    "version": __version__,
    "request": {
        "prompt": "a house",
        "negative_prompt": "",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "scheduler": "unipc",
        "seed": 1,
        "num_images_per_prompt": 1,
        "strength": 0.8,
        "clip_skip": 0,
        "long_prompt": False,
        "init_image": None,
        "controls": [
            {
                "condition": "seg",
                "controlnet_conditioning_scale": 1.0,
                "control_guidance_start": 0.0,
                "control_guidance_end": 1.0,
                "image": base64.b64encode(_PNG).decode(),
            }
        ],
    },
    "image_index": 0,
    "bundle": {"model": "miniature", "digest": "ab" * 32, "precision": "fp32", "width": 32, "height": 24},
    "backend": "onnxruntime-cpu",
    "versions": {"numpy": "2"},
    "pixels_sha256": "cd" * 32,
}

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1.5, 17, 1e308, -1e308, 2**63, 2**64, 10**400, "", "x" * 5000, "x" * 200_000,
    "\x1b[31mred\x1b]0;title\x07", "\u202egnp.exe", "\ud800", "\0", "a\nb\rc", "../../../etc/passwd", "/", "..",
    "C:\\x", "$(touch x)", "'; rm -rf ~ #", "(a+)+$", "fp32|fp16", ".*", "nan", [], {}, [[]], {"\x1b[0m": 1},
    ["\x1b"] * 3, [{}] * 20, {"a": {"b": {"c": []}}}, "aGVsbG8=", "é", _huge_png(),
    base64.b64encode(_PNG[:60]).decode(), base64.b64encode(encode_png(np.zeros((300, 300, 3), np.uint8))).decode(),
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a record."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [p for key in keys for p in ((*path, key), *_places(value[key], (*path, key)))]


def _changed(rng: random.Random) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *way, last = rng.choice(_places(record))
        inner: Any = record
        for key in way:
            inner = inner[key]
        match rng.randrange(8):
            case 0:
                del inner[last]
            case 1 if isinstance(inner, dict):
                inner[rng.choice(["__init__", "guess_mode", "\x1b[2J", "", "\ud800", "path"])] = rng.choice(HOSTILE)
            case _:
                inner[last] = copy.deepcopy(rng.choice(HOSTILE))
        if not _places(record):
            break
    return record


def _chunk_of(record: Any, rng: random.Random) -> bytes:
    body = json.dumps(record).encode()
    match rng.randrange(10):
        case 0:  # random bytes in place of some
            raw = bytearray(body)
            for _ in range(rng.randrange(1, 20)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            body = bytes(raw)
        case 1:
            body = body[: rng.randrange(len(body))]
        case 2:
            body = rng.randbytes(rng.randrange(200))
        case 3:
            body = b"[" * rng.choice((10, 5000, 200_000))
        case 4:
            bomb = zlib.compress(b" " * (1 << 20)) if rng.random() < 0.9 else zlib.compress(bytes(80 << 20))
            return _chunk(b"zTXt", b"cnpp_trt\0\0" + bomb)
        case 5:
            return _chunk(b"zTXt", b"cnpp_trt\0\0" + zlib.compress(body)[: rng.randrange(1, 400)])
        case 6:
            flags = bytes([rng.randrange(3), rng.randrange(2)])
            return _chunk(b"iTXt", b"cnpp_trt\0" + flags + b"\0" * rng.randrange(4) + zlib.compress(body))
    return _chunk(b"tEXt", b"cnpp_trt\0" + body)


def _picture(rng: random.Random) -> bytes:
    """A PNG with a record that is wrong somewhere: in a value, its JSON, its chunk or the file."""
    chunk = bytearray(_chunk_of(_changed(rng), rng))
    match rng.randrange(8):
        case 0:  # its length
            chunk[:4] = struct.pack(">I", rng.choice((0, 1, 2**31, 2**32 - 1, len(chunk))))
        case 1:  # its checksum
            chunk[-1] ^= 1
        case 2:
            chunk[rng.randrange(len(chunk))] ^= 1 << rng.randrange(8)
    data = _PNG[:33] + bytes(chunk) * rng.choice((1, 1, 1, 2)) + _PNG[33:]
    return data[: rng.randrange(len(data))] if rng.random() < 0.05 else data


def fuzz_metadata(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Reads `count` damaged pictures: how many were `read`, and how many `refused`.

    Raises: AssertionError where one took too long or its message is not one printable line; whatever else a traceback
        would show.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    path = folder / "fuzzed.png"
    for i in range(count):
        path.write_bytes(_picture(rng))
        start = time.process_time()
        try:
            request_from_record(read_record(path))
        except UserError as e:
            counts["refused"] += 1
            message = str(e)
            assert message.isprintable() and 0 < len(message) < 1000, (i, message[:1000])
        else:
            counts["read"] += 1
        assert time.process_time() - start < SECONDS, i
    return counts
