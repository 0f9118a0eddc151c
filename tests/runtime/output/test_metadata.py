"""The metadata of written pictures."""

import base64
import copy
import hashlib
import json
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import __version__
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.images.png_files import encode_png, save_png
from cnpp_trt.runtime.output.metadata import (
    PictureRecord,
    a1111_parameters,
    image_from_base64,
    image_to_base64,
    pack,
    parse_record,
    pixels_sha256,
    read_record,
    request_from_record,
    request_record,
)
from cnpp_trt.runtime.settings.request import Control, Request
from cnpp_trt.schema import convert, to_json
from fuzz_metadata import fuzz_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from requested import controls_of

RNG = np.random.default_rng(0)
SIZE = (32, 24)
CONDITION = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)

# What the first pictures did not record.
LATER = {
    "strength": 0.6, "clip_skip": 1, "clip_skip_negative": True, "long_prompt": True, "prompt_weights": True,
    "init_image": image_to_base64(CONDITION),
}  # fmt: skip


# Off unless a request says otherwise.
LEVERS = {
    "timestep_spacing": None,
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "guidance_interval": 1,
    "controlnet_interval": 1,
    "cache_interval": 1,
}


def record(**request: Any) -> dict[str, Any]:
    return {
        "version": __version__,
        "request": {
            "prompt": "a red house by a lake, at dusk",
            "negative_prompt": "worst quality, low quality",
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "scheduler": "unipc",
            "seed": 1,
            "num_images_per_prompt": 4,
            "controls": [
                {
                    "condition": "seg",
                    "controlnet_conditioning_scale": 1.0,
                    "control_guidance_start": 0.0,
                    "control_guidance_end": 0.75,
                    "image": image_to_base64(CONDITION),
                }
            ],
            **request,
        },
        "image_index": 2,
        "bundle": {"model": "miniature", "digest": "ab" * 32, "precision": "fp32", "width": 32, "height": 24},
        "backend": "onnxruntime-cpu",
        "versions": {"numpy": np.__version__},
        "pixels_sha256": pixels_sha256(PIXELS),
    }


def typed(record: dict[str, Any]) -> PictureRecord:
    return convert(record, PictureRecord)


def text_of(record: dict[str, Any]) -> str:
    return a1111_parameters(typed(record))


def parse_a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """How AUTOMATIC1111's web UI reads its `parameters` (modules/infotext_utils.py, parse_generation_parameters)."""
    parameter = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(parameter.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative, in_negative = "", "", False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    values = {key: json.loads(value) if value[:1] == '"' else value for key, value in parameter.findall(last)}
    return prompt, negative, values


def test_a1111_text() -> None:
    assert text_of(record()) == (
        "a red house by a lake, at dusk\n"
        "Negative prompt: worst quality, low quality\n"
        "Steps: 20, Sampler: UniPC, CFG scale: 7.5, Seed: 3, Size: 32x24, Model: miniature, "
        'ControlNet 0: "Module: none, Model: seg, Weight: 1, Guidance Start: 0, Guidance End: 0.75", '
        f"Version: cnpp-trt {__version__}"
    )
    assert "Negative prompt" not in text_of(record(negative_prompt=""))
    assert "Sampler: DPM++ 2M, Schedule type: Karras, " in text_of(record(scheduler="dpmpp_2m_karras"))
    begun = parse_a1111(text_of(record(**LATER)))[2]
    assert (begun["Clip skip"], begun["Denoising strength"]) == ("2", "0.6")
    # Said only where it counts.
    text = text_of(record(**{**LATER, "clip_skip": 0, "init_image": None}))
    assert "Clip skip" not in text and "Denoising" not in text


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(prompt=WORDS, negative=WORDS, model=WORDS.filter(str.strip), steps=st.integers(1, 1000))
def test_a1111_text_is_read_back_by_its_own_parser(prompt: str, negative: str, model: str, steps: int) -> None:
    def lines(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().split("\n"))

    if "Negative prompt:" in prompt + negative:
        return  # ambiguous by design; the JSON chunk is what counts
    source = record(prompt=prompt, negative_prompt=negative, num_inference_steps=steps)
    source["bundle"]["model"] = model.strip()
    read_prompt, read_negative, values = parse_a1111(text_of(source))
    assert lines(read_prompt) == lines(prompt) and lines(read_negative) == lines(negative)
    assert values["Steps"] == str(steps) and values["Seed"] == "3"
    assert values["Version"] == f"cnpp-trt {__version__}"
    if not re.search(r'^"|[\\"]', model):
        assert values["Model"] == model.strip()


@settings(max_examples=50, deadline=None)
@given(prompt=st.text(max_size=200), seed=st.integers(0, 2**64 - 4), guidance=st.floats(-100, 100))
def test_any_record_round_trips_through_its_chunk(prompt: str, seed: int, guidance: float) -> None:
    source = record(prompt=prompt, seed=seed, guidance_scale=guidance)
    assert parse_record(pack(typed(source))["cnpp_trt"], "x") == typed(source)


def test_record_round_trips_through_a_file(tmp_path: Path) -> None:
    source = record(prompt="Zoë and 猫, \0 and\nmore")
    save_png(tmp_path / "x.png", PIXELS, pack(typed(source)))
    back = read_record(tmp_path / "x.png")
    assert back == typed(source)
    np.testing.assert_array_equal(image_from_base64(back.request.controls[0].image, SIZE), CONDITION)
    with Image.open(tmp_path / "x.png") as image:  # as other readers see it
        assert isinstance(image, PngImageFile)
        written = json.loads(image.text["cnpp_trt"])
        later = {name: written["request"].pop(name) for name in (*LATER, "guess_mode")}
        assert {name: written["request"].pop(name) for name in LEVERS} == LEVERS
        assert written == source
        # diffusers' defaults: no clip skip, and image-to-image's strength.
        flags = dict.fromkeys(("clip_skip_negative", "long_prompt", "prompt_weights", "guess_mode"), False)
        assert later == {"strength": 0.8, "clip_skip": 0, "init_image": None, **flags}
        assert image.text["parameters"].startswith("Zoë and 猫")
        assert hashlib.sha256(image.tobytes()).hexdigest() == back.pixels_sha256


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_record(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def insert(path: Path, data: bytes) -> Path:
    """Write a small PNG with chunks after its header."""
    save_png(path, PIXELS)
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + data + whole[33:])
    return path


def test_files_without_a_record(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "no such file")
    Image.fromarray(PIXELS).save(tmp_path / "x.jpg")
    refused(tmp_path / "x.jpg", "not a PNG")
    save_png(tmp_path / "bare.png", PIXELS, {"parameters": "Steps: 20"})
    refused(tmp_path / "bare.png", "was not written by cnpp-trt")
    save_png(tmp_path / "whole.png", PIXELS, pack(typed(record())))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:500])
    refused(tmp_path / "cut.png", "truncated")
    at = data.index(b"guidance_scale")
    (tmp_path / "flipped.png").write_bytes(data[:at] + b"X" + data[at + 1 :])
    refused(tmp_path / "flipped.png", "damaged", "checksum")


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nope", "[" * 100_000, '{"version": NaN}', "9" * 10_000, "\udc00"])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    body = text.encode("utf-8", "surrogatepass")
    refused(insert(tmp_path / "x.png", chunk(b"tEXt", b"cnpp_trt\0" + body)), "damaged")


def test_what_a_record_does_not_have_takes_no_memory() -> None:
    """64 MiB of empty objects would be 1.4 GB of dictionaries."""
    junk = "[" + "{}," * (20 << 20) + "{}]"
    tracemalloc.start()
    try:
        for key in ("more", "request", "versions"):
            assert "damaged" in complaint({**record(), key: None}, json.dumps(key) + ": null", f'"{key}": {junk}')
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


def test_compressed_chunks(tmp_path: Path) -> None:
    packed = zlib.compress(json.dumps(record()).encode())
    assert read_record(insert(tmp_path / "z.png", chunk(b"zTXt", b"cnpp_trt\0\0" + packed))) == typed(record())
    assert read_record(insert(tmp_path / "i.png", chunk(b"iTXt", b"cnpp_trt\0\1\0en\0key\0" + packed))) == typed(
        record()
    )
    bomb = zlib.compress(b" " * (65 * 1024 * 1024))
    refused(insert(tmp_path / "bomb.png", chunk(b"zTXt", b"cnpp_trt\0\0" + bomb)), "longer than")
    refused(insert(tmp_path / "bad.png", chunk(b"zTXt", b"cnpp_trt\0\0nothing")), "damaged")


def test_versions() -> None:
    major, minor = (int(part) for part in __version__.split(".")[:2])
    for version in (f"{major}.{minor + 1}.0", f"{major + 1}.0.0"):
        # of a newer version, whatever its schema
        with pytest.raises(UserError, match=f"newer than this {__version__}; update cnpp-trt"):
            parse_record(json.dumps({"version": version, "anything": 1}), "x")
    parse_record(json.dumps({**record(), "version": f"{major}.{minor}.99"}), "x")
    damaged: tuple[Any, ...] = ("", "one", "1", "1.x", "-1.0", 3, None, "9" * 90 + ".0")
    for version in damaged:
        with pytest.raises(UserError, match="damaged"):
            parse_record(json.dumps({**record(), "version": version}), "x")


# Each with what the message says of it and where: msgspec's paths.
WRONG: list[tuple[tuple[Any, ...], Any]] = [
    (("request",), []),
    (("request", "prompt"), 3),
    (("request", "prompt"), "x" * 100_001),
    (("request", "negative_prompt"), None),
    (("request", "num_inference_steps"), 0),
    (("request", "num_inference_steps"), 1001),
    (("request", "num_inference_steps"), 20.0),
    (("request", "num_inference_steps"), True),
    (("request", "guidance_scale"), "7.5"),
    (("request", "guidance_scale"), 10**400),
    (("request", "guidance_scale"), 10_001),
    (("request", "seed"), -1),
    (("request", "num_images_per_prompt"), 0),
    (("request", "num_images_per_prompt"), 17),
    (("request", "controls"), {}),
    (("request", "controls"), record()["request"]["controls"] * 17),
    (("request", "controls", 0), "seg"),
    (("request", "controls", 0, "condition"), None),
    (("request", "controls", 0, "control_guidance_start"), -0.1),
    (("request", "controls", 0, "control_guidance_end"), 1.1),
    (("request", "controls", 0, "image"), None),
    (("image_index",), -1),
    (("bundle",), None),
    (("bundle", "width"), 0),
    (("bundle", "height"), 1e9),
    (("bundle", "digest"), "x" * 64),
    (("bundle", "digest"), "ab" * 32 + "\n"),
    (("bundle", "precision"), "(a+)+$"),
    (("bundle", "precision"), "../../x"),
    (("bundle", "model"), ""),
    (("backend",), {}),
    (("versions", "numpy"), 2),
    (("pixels_sha256",), 5),
]
# Checked with the record that they are in, which is what the message names then.
UNKNOWN: list[tuple[tuple[Any, ...], Any, str]] = [
    (("request", "scheduler"), "uni", "unknown scheduler 'uni': did you mean 'unipc'?"),
    (("request", "scheduler"), "\x1b[31m", r"unknown scheduler '\\x1b\[31m'"),
    (("request", "controls", 0, "condition"), "pose", "unknown condition 'pose'"),
    (("backend",), "\x1b]0;x\x07", r"unknown backend"),
    (("request", "seed"), 2**64 - 3, r"seed must be at most 2\*\*64 - 4"),
    (("image_index",), 4, "image_index must be below 4"),
    (("request", "__class__"), 1, "unknown field `__class__`"),
    (("request", "guess"), True, "unknown field `guess`"),
    (("path",), "x", "unknown field `path`"),
]


def damaged(path: tuple[Any, ...], value: Any) -> tuple[dict[str, Any], Any]:
    """A record with one value changed, and the object that it is in."""
    changed = copy.deepcopy(record())
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed, inner


def complaint(source: Any, old: str = "", new: str = "") -> str:
    """What is said of a record, or of its JSON with `new` in place of `old`."""
    with pytest.raises(UserError) as caught:
        parse_record(json.dumps(source).replace(old, new), "x")
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "")
def test_schema(path: tuple[Any, ...], value: Any) -> None:
    """Each wrong value is refused by its place, each missing one by its name."""
    changed, inner = damaged(path, value)
    place = "$" + "".join("[0]" if key == 0 else "[...]" if key == "numpy" else f".{key}" for key in path)
    assert f"at `{place}`" in complaint(changed)
    if isinstance(path[-1], str) and path[-1] != "numpy":
        del inner[path[-1]]
        assert f"missing required field `{path[-1]}`" in complaint(changed)


@pytest.mark.parametrize(("path", "value", "words"), UNKNOWN)
def test_closed_sets(path: tuple[Any, ...], value: Any, words: str) -> None:
    assert re.search(words, complaint(damaged(path, value)[0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strength", 0),
        ("strength", 1.5),
        ("strength", "0.6"),
        ("clip_skip", -1),
        ("clip_skip", 1.0),
        ("long_prompt", 1),
        ("guess_mode", 1),
        ("guidance_interval", 0),
        ("controlnet_interval", 0),
        ("guidance_end", 1.5),
        ("init_image", 3),
        ("init_image", "x" * (64 * 1024 * 1024 + 1)),
    ],
)
def test_what_may_be_missing_is_checked_where_it_is_there(key: str, value: Any) -> None:
    for whole in (record(), record(**LATER), record(**{**LATER, "init_image": None})):
        assert parse_record(json.dumps(whole), "x") == typed(whole)
    assert f"at `$.request.{key}`" in complaint(record(**{**LATER, key: value}))


def test_a_request_round_trips() -> None:
    request = Request(
        "a house",
        "rain",
        controls=(Control("depth", CONDITION, 0.5, 0.25, 0.75),),
        num_inference_steps=7,
        guidance_scale=2.5,
        scheduler="ddim",
        num_images_per_prompt=2,
        init_image=PIXELS,
        strength=0.5,
        clip_skip=1,
        long_prompt=True,
        timestep_spacing="trailing",
        guidance_start=0.25,
        guidance_end=0.5,
        guidance_interval=4,
        controlnet_interval=3,
        cache_interval=2,
        seed=9,
    ).resolve(SamplingDefaults())
    other = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    source = {**record(), "image_index": 1}
    source["request"] = json.loads(to_json(request_record(request, [CONDITION], other)))
    back = request_from_record(typed(source))
    same = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scheduler", "num_images_per_prompt")
    for name in (*same, *LEVERS, "strength", "clip_skip", "long_prompt"):
        assert getattr(back, name) == getattr(request, name), name
    assert back.seed == 9
    np.testing.assert_array_equal(back.init_image, other)
    [control] = controls_of(back)
    assert (control.condition, control.controlnet_conditioning_scale) == ("depth", 0.5)
    assert (control.control_guidance_start, control.control_guidance_end) == (0.25, 0.75)
    np.testing.assert_array_equal(control.image, CONDITION)


def test_condition_images_are_untrusted_too() -> None:
    for text, words in (
        ("né", "base64"),
        ("aGVsbG8=", "not a PNG"),
        (image_to_base64(PIXELS), "is 32x32, not 32x24"),
        # A header that declares a picture of 9 gigapixels: nothing of it is decoded.
        (base64.b64encode(encode_png(PIXELS)[:16] + struct.pack(">II", 95_000, 95_000) + bytes(50)).decode(), "95000x"),
        (base64.b64encode(encode_png(CONDITION)[:-40]).decode(), "truncated"),
    ):
        with pytest.raises(UserError, match=words):
            image_from_base64(text, SIZE)
    assert image_from_base64(image_to_base64(CONDITION), SIZE).tobytes() == CONDITION.tobytes()


def test_a_record_that_no_reader_takes_is_left_out() -> None:
    """Pillow refuses a PNG with more than 64 MiB of text."""
    source = record()
    source["request"]["init_image"] = "x" * (60 << 20)
    texts = pack(typed(source))
    assert list(texts) == ["parameters"]
    assert list(pack(typed(record()))) == ["parameters", "cnpp_trt"]


@pytest.mark.slow
def test_fuzzed_pictures(tmp_path: Path) -> None:
    counts = fuzz_metadata(tmp_path, count=400, seed=0)
    assert sum(counts.values()) == 400 and counts["refused"] > 200
