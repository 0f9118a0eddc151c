"""Pictures that cnpp-trt wrote (their metadata), pictures from anywhere, and prompts."""

import io
import json
from functools import partial
from typing import Any

import numpy as np
from cnpp_trt.runtime import generate as running
from cnpp_trt.runtime.images.image_files import read_image
from cnpp_trt.runtime.output import metadata as records
from cnpp_trt.runtime.pipeline import Pipeline
from cnpp_trt.runtime.repeat import repeat
from cnpp_trt.runtime.settings.options import RuntimeOptions
from cnpp_trt.runtime.settings.request import Control, Request
from cnpp_trt.runtime.text.tokenizer import Tokenizer
from hypothesis import strategies as st
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from .kind import Kind, Place, difference, put
from .mutations import STRINGS, damaged, documents, encode


def metadata(place: Place) -> Kind:
    """A picture of our own with another record in it, repeated as `run --repeat` does."""
    pipeline = Pipeline.open(place.bundle, "onnxruntime-cpu", threads=1)
    control = np.zeros((64, 64, 3), np.uint8)
    request = Request("a house", controls=(Control("seg", control),), num_inference_steps=1, seed=1)
    drawn = running.generate(pipeline, request, place.folder / "drawn")
    with Image.open(drawn.images[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
        document: Any = json.loads(image.info[records.CHUNK])
    whole = drawn.images[0].read_bytes()
    file = place.folder / "picture.png"
    out = place.folder / "out"

    def attempt(example: tuple[str, bytes]) -> None:
        kind, content = example
        if kind == "file":
            put(file, content)
        else:
            info = PngInfo()
            info.add_text(records.CHUNK, content.decode("latin-1", "replace"), zip=kind == "zip")
            Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
        found = records.read_record(file).request
        records.a1111_parameters(records.read_record(file))
        if found.num_inference_steps <= 4 and found.num_images_per_prompt <= 2 and len(found.prompt) < 1_000:
            repeat(file, out, place.bundle, RuntimeOptions("onnxruntime-cpu", threads=1))

    inputs = st.one_of(
        st.tuples(st.just("text"), documents(document)),
        st.tuples(st.just("zip"), documents(document)),
        st.tuples(st.just("file"), damaged(whole)),
    )
    return Kind(inputs, attempt, difference(encode(document)))


def _followed_by(rest: bytes, start: bytes) -> bytes:
    return start + rest


def image(place: Place) -> Kind:
    """Every format that Pillow reads here, and its bytes damaged."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    frames = [pixels.rotate(angle) for angle in (0, 90, 180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    options: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (pixels, "PNG", {}), (pixels.convert("P"), "PNG", {}), (pixels.convert("RGBA"), "PNG", {}),
        (pixels.convert("I;16"), "PNG", {}), (pixels.convert("1"), "PNG", {}), (pixels, "JPEG", {"exif": exif}),
        (pixels.convert("L"), "JPEG", {"progressive": True}), (pixels.convert("CMYK"), "JPEG", {}),
        (pixels, "WEBP", {"exif": exif}), (pixels, "WEBP", {"lossless": True}), (pixels, "GIF", {}),
        (pixels, "GIF", {"save_all": True, "append_images": frames}), (pixels, "BMP", {}), (pixels, "PPM", {}),
        (pixels, "TIFF", {}), (pixels, "TIFF", {"compression": "tiff_lzw"}), (pixels.convert("F"), "TIFF", {}),
        (pixels.convert("I"), "TIFF", {}), (pixels, "JPEG2000", {}), (pixels, "ICO", {}), (pixels, "EPS", {}),
    ]  # fmt: skip
    if features.check("avif"):
        options += [(pixels, "AVIF", {}), (pixels.convert("RGBA"), "AVIF", {})]
    valid = []
    for picture, kind, how in options:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **how)
        valid.append(buffer.getvalue())
    file = place.folder / "picture"

    def attempt(content: bytes) -> None:
        read_image(put(file, content))

    begun = [damaged(content[:64]).map(partial(_followed_by, content[64:])) for content in valid]
    return Kind(st.one_of([*map(damaged, valid), *begun, st.binary(max_size=200)]), attempt, lambda e: repr(e[:400]))


_WORDS = (
    "a house", "red", "(red:1.4)", "((", "))", "[blue]", "BREAK", " BREAK ", "AND", "<lora:x:1>", "\\(",
    ":1e999)", ":-1)", ",", "  ", "\n", "模型", "🙂", "\u0301" * 20, "e" * 200, "\0", "\x1b[31m",
    "<|endoftext|>", "</w>", "ﬁ", "İ", "\ud800",
)  # fmt: skip


def prompt(place: Place) -> Kind:
    """Any text, also very long, through the tokenizer and a picture of one step."""
    pipeline = Pipeline.open(place.bundle, "onnxruntime-cpu", threads=1)
    opened = Tokenizer(place.bundle / "tokenizer")
    control = Control("seg", np.zeros((64, 64, 3), np.uint8))
    words = st.lists(st.one_of(st.sampled_from(_WORDS), st.text(max_size=30)), max_size=40).map("".join)
    long = st.tuples(st.sampled_from([*_WORDS, "x ", "( ", " :", "\t", "BREAK "]), st.integers(1, 100_000)).map(
        lambda pair: (pair[0] * pair[1])[:100_001]
    )

    def attempt(example: tuple[str, str]) -> None:
        text, negative = example
        request = Request(
            text, negative, controls=(control,), num_inference_steps=1, seed=1, long_prompt=len(text) % 2 == 1
        )
        opened.encode(text)
        opened.encode_long(text)
        if len(text) + len(negative) < 1_000:
            pipeline(request)

    return Kind(st.tuples(st.one_of(words, words, long, st.sampled_from(STRINGS)), words), attempt)
