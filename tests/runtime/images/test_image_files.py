"""Reading, resizing and writing image files."""

import errno
import io
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from cnpp_trt.errors import CnppError, UserError
from cnpp_trt.runtime.images import image_files as images
from cnpp_trt.runtime.images.fitting import aspect_note, fit
from cnpp_trt.runtime.images.image_files import ImageFile, read_image, resize
from cnpp_trt.runtime.images.png_files import new_folder, save_png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence, features
from PIL.PngImagePlugin import PngImageFile

RNG = np.random.default_rng(0)


def png(samples: np.ndarray, color_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written from the specification alone: samples uint8 or uint16, [H, W, C]."""
    height, width = samples.shape[:2]
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, samples.itemsize * 8, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def read(tmp_path: Path, data: bytes, name: str = "image", **options: object) -> ImageFile:
    (tmp_path / name).write_bytes(data)
    return read_image(tmp_path / name, **options)  # type: ignore[arg-type]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, int(np.iinfo(dtype).max) + 1, shape, dtype=dtype)


def over(color: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Porter-Duff "over" in float64, on [0, 1]."""
    return color * alpha + np.array(background) / 255 * (1 - alpha)


# --- what is read rightly ---------------------------------------------------------------------------------------------


def test_plain_rgb(tmp_path: Path) -> None:
    pixels = random(20, 30, 3)
    result = read(tmp_path, png(pixels, 2))
    assert result.format == "PNG" and not result.lossy and result.path == tmp_path / "image"
    assert result.pixels.dtype == np.uint8 and result.pixels.flags.c_contiguous
    np.testing.assert_array_equal(result.pixels, pixels)


def test_gray_8_and_16_bits(tmp_path: Path) -> None:
    gray = random(20, 30, 1)
    np.testing.assert_array_equal(read(tmp_path, png(gray, 0)).pixels, gray.repeat(3, 2))
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)  # every value there is
    expected = np.round(deep / 257).astype(np.uint8).repeat(3, 2)
    np.testing.assert_array_equal(read(tmp_path, png(deep, 0)).pixels, expected)


def test_rgb_16_bits_is_rounded_not_truncated(tmp_path: Path) -> None:
    deep = random(64, 64, 3, dtype=np.uint16)
    np.testing.assert_array_equal(read(tmp_path, png(deep, 2)).pixels, np.round(deep / 257).astype(np.uint8))


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 128, 3)])
@pytest.mark.parametrize(("color_type", "dtype"), [(6, np.uint8), (6, np.uint16), (4, np.uint8), (4, np.uint16)])
def test_alpha_is_composited(tmp_path: Path, color_type: int, dtype: type, background: tuple[int, int, int]) -> None:
    top = np.iinfo(dtype).max
    samples = random(64, 64, 4 if color_type == 6 else 2, dtype=dtype)
    samples[:8, ..., -1] = 0
    samples[8:16, ..., -1] = top
    result = read(tmp_path, png(samples, color_type), background=background).pixels
    color = samples[..., :-1] / top
    expected = over(color, samples[..., -1:] / top, background) * 255
    assert np.abs(result - expected).max() <= 0.5 + 1e-9
    assert (result[:8] == background).all()  # nothing hidden shows
    np.testing.assert_array_equal(result[8:16], np.broadcast_to(np.round(color * 255), (64, 64, 3))[8:16])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("color_type", [0, 2])
def test_transparent_color_of_a_png(tmp_path: Path, color_type: int, dtype: type) -> None:
    samples = random(20, 20, 1 if color_type == 0 else 3, dtype=dtype)
    samples[3, 4] = samples[9, 9] = key = samples[0, 0].copy()
    chunk = b"".join(struct.pack(">H", int(v)) for v in key)
    background = (9, 200, 77)
    result = read(tmp_path, png(samples, color_type, (b"tRNS", chunk)), background=background).pixels
    keyed = (samples == key).all(-1)
    assert 3 <= keyed.sum() < 20
    expected = np.round(samples / (np.iinfo(dtype).max / 255)).astype(np.uint8).repeat(3 if color_type == 0 else 1, 2)
    expected[keyed] = background
    np.testing.assert_array_equal(result, expected)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices, palette = random(20, 20, 1) % 4, random(4, 3)
    chunk = (b"PLTE", palette.tobytes())
    np.testing.assert_array_equal(read(tmp_path, png(indices, 3, chunk)).pixels, palette[indices[..., 0]])
    alpha = np.array([0, 255, 128, 255])
    result = read(tmp_path, png(indices, 3, chunk, (b"tRNS", alpha.astype(np.uint8).tobytes()))).pixels
    expected = over(palette / 255, alpha[:, None] / 255, (0, 0, 0))[indices[..., 0]] * 255
    assert np.abs(result - expected).max() <= 0.5 + 1e-9


def test_one_bit_cmyk_and_integers_and_floats(tmp_path: Path) -> None:
    bits = random(20, 24) > 127
    np.testing.assert_array_equal(
        read(tmp_path, encode(Image.fromarray(bits), "PNG")).pixels, bits[..., None].repeat(3, 2) * np.uint8(255)
    )
    ink = random(20, 24, 4)
    ink[..., 3] = 0
    cmyk = read(tmp_path, encode(Image.fromarray(ink, "CMYK"), "TIFF")).pixels
    np.testing.assert_array_equal(cmyk, 255 - ink[..., :3])
    integers = random(20, 24, dtype=np.uint16).astype(np.int32)
    expected = np.round(integers / 257)
    np.testing.assert_array_equal(
        read(tmp_path, encode(Image.fromarray(integers), "TIFF")).pixels[..., 1], expected.astype(np.uint8)
    )
    floats = RNG.random((20, 24), dtype=np.float32)
    for scale in (1, 255):
        result = read(tmp_path, encode(Image.fromarray(floats * np.float32(scale)), "TIFF")).pixels
        assert np.abs(result[..., 2] - floats.astype(np.float64) * 255).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """The upright picture's corners, by the table of EXIF 2.32 (where the stored row 0 and column 0 belong)."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:8, :8] = 255  # the stored top left corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = read(tmp_path, encode(Image.fromarray(pixels), "PNG", exif=exif)).pixels
    assert result.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[orientation]
    corner = result[:8] if top else result[-8:]
    corner = corner[:, :8] if left else corner[:, -8:]
    assert (corner == 255).all() and result.sum() == 64 * 3 * 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (32, 24), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    with Image.open(io.BytesIO(data)) as image:
        assert len(list(ImageSequence.Iterator(image))) == 3
    assert np.abs(read(tmp_path, data).pixels.astype(int) - (250, 0, 0)).max() <= 6


def test_jpeg_is_lossy(tmp_path: Path) -> None:
    result = read(tmp_path, encode(Image.new("RGB", (32, 24), (10, 200, 30)), "JPEG"))
    assert result.format == "JPEG" and result.lossy
    assert np.abs(result.pixels.astype(int) - (10, 200, 30)).max() <= 4


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_paths_that_hold_no_image(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "no such file", "check the path")
    refused(tmp_path, "directory")
    refused("bad\0path", "not a path")
    (tmp_path / "text.png").write_text("hello there")
    refused(tmp_path / "text.png", "not an image")
    (tmp_path / "void.png").touch()
    refused(tmp_path / "void.png", "empty")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n")
    refused(tmp_path / "x.eps", "PostScript")
    new_line = tmp_path / "a\nb"
    refused(new_line, "no such file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # the superuser may read anything
    refused(tmp_path / "x.png", "Permission denied", "check its permissions")


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.png"

    def header(width: int, height: int, padding: int = 0) -> None:
        ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = png(random(16, 16, 3), 2, (b"tEXt", b"x\0" + b"y" * padding))
        file.write_bytes(data[:12] + b"IHDR" + ihdr + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr)) + data[33:])

    header(0, 0)
    refused(file, "no pixels")
    header(10_000, 3)
    refused(file, "10000×3", "ratio", "crop or resize")
    header(15, 15)
    refused(file, "at least 16")
    header(16, 257)
    refused(file, "at most 16")
    for side in (9_000, 13_000, 100_000):  # within Pillow's limit, beyond its warning, beyond its error
        header(side, side)
        refused(file, "decompression bomb", "64,000,000")
    header(9_000, 9_000, padding=600_000)
    refused(file, "too large", "9,000×9,000", "resize it")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 1000)
    refused(file, "bytes", "give a smaller file")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF"])
def test_every_truncation_is_one_line(tmp_path: Path, kind: str) -> None:
    whole = encode(Image.fromarray(random(40, 40, 3)), kind)
    for share in (0.05, 0.3, 0.6, 0.9):
        data = whole[: max(12, int(len(whole) * share))]
        (tmp_path / "cut").write_bytes(data)
        refused(tmp_path / "cut", "truncated")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM"]), data=st.data())
def test_damage_is_read_or_refused_in_one_line(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole = bytearray(encode(Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged").write_bytes(whole)
    try:
        pixels = read_image(tmp_path / "damaged").pixels
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["lanczos", "nearest"])
@pytest.mark.parametrize("size", [(64, 64), (128, 96), (33, 57), (40, 30)])
def test_resize_is_diffusers(resample: Literal["nearest", "lanczos"], size: tuple[int, int]) -> None:
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor(resample=resample)
    pixels = random(30, 40, 3)
    width, height = size
    expected = np.asarray(processor.resize(Image.fromarray(pixels), height=height, width=width))
    np.testing.assert_array_equal(resize(pixels, width, height, resample), expected)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30)])
def test_png_round_trip_with_text(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels, text = random(*shape), {"a": "plain", "b": "café — 猫\nline 2", "c": "é"}
    save_png(tmp_path / "x.png", pixels, text)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert isinstance(image, PngImageFile)
        assert image.text == text
    data = (tmp_path / "x.png").read_bytes()
    assert data.count(b"tEXt") == 2 and data.count(b"iTXt") == 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_png(tmp_path / "x.png", random(16, 16, 3))
    assert (tmp_path / "x.png").read_text() == "mine"
    with pytest.raises(UserError, match="folder does not exist"):
        save_png(tmp_path / "no" / "x.png", random(16, 16, 3))


def test_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs RLIMIT_FSIZE as Linux has it")
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(CnppError, match="cannot be written") as caught:
            save_png(tmp_path / "x.png", random(200, 200, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_numbered_folders_do_not_race(tmp_path: Path) -> None:
    (tmp_path / "out" / "run-0007").mkdir(parents=True)
    (tmp_path / "out" / "run-x").mkdir()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "out"), range(40)))
    assert sorted(f.name for f in folders) == [f"run-{i:04d}" for i in range(8, 48)]
    assert all(f.is_dir() for f in folders)


# --- other formats ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    data = encode(Image.fromarray(random(40, 48, 3)), "AVIF")
    result = read(tmp_path, data)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "AVIF"
        np.testing.assert_array_equal(result.pixels, np.asarray(image.convert("RGB")))
    assert result.format == "AVIF" and result.lossy
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut", "damaged or truncated")


@pytest.mark.parametrize(
    ("options", "lossy"),
    [({"quality": 90}, True), ({"lossless": True}, False), ({"lossless": True, "exif": b"x"}, False)],
)
def test_webp_is_lossy_or_not(tmp_path: Path, options: dict[str, object], lossy: bool) -> None:
    picture = random(32, 32, 3)
    result = read(tmp_path, encode(Image.fromarray(picture), "WEBP", **options))
    assert result.lossy is lossy
    assert (result.pixels == picture).all() != lossy


def box(brand: bytes, *others: bytes) -> bytes:
    """A file type box (ISO/IEC 14496-12, 4.3)."""
    body = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">I", 4 + len(body)) + body + bytes(200)


OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "iphone.heic": (box(b"heic", b"mif1", b"heic"), "HEIC"),
    "burst.heif": (box(b"msf1", b"hevc"), "HEIC"),
    "x.cr3": (box(b"crx ", b"crx ", b"isom"), "RAW"),
    "x.mp4": (box(b"isom", b"isom", b"avc1"), "video"),
    "x.jxl": (b"\xff\x0a" + bytes(99), "JPEG XL"),
    "boxed.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    "x.pdf": (b"%PDF-1.7\n" + bytes(99), "PDF"),
    "x.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "x.svg": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "bare.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "x.psd": (b"8BPS\0\1" + bytes(99), "Photoshop"),
    "x.exr": (b"v/1\x01" + bytes(99), "OpenEXR"),
    "x.cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "RAW"),
    "x.NEF": (b"MM\0*" + bytes(99), "RAW"),
    "x.raf": (b"FUJIFILMCCD-RAW 0201" + bytes(99), "RAW"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_formats_are_named(tmp_path: Path, name: str) -> None:
    data, kind = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, kind, "save it as PNG or JPEG")


def test_real_jpeg_2000_and_icon_and_pdf_are_named(tmp_path: Path) -> None:
    """As Pillow writes them."""
    for name, kind in (
        ("x.jp2", "JPEG 2000"),
        ("x.j2k", "JPEG 2000"),
        ("x.pdf", "PDF"),
        ("x.ico", "icon"),
        ("x.eps", "P"),
    ):
        Image.fromarray(random(32, 32, 3)).save(tmp_path / name)
        refused(tmp_path / name, kind, "not read here")


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["nearest", "lanczos"])
@pytest.mark.parametrize("size", [(64, 64), (96, 40), (40, 96), (33, 57)])
@pytest.mark.parametrize("shape", [(50, 90, 3), (90, 50, 3), (31, 33, 3)])
def test_crop_and_pad_are_pillows(
    resample: Literal["nearest", "lanczos"], size: tuple[int, int], shape: tuple[int, ...]
) -> None:
    picture = random(*shape)
    method = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}[resample]
    cropped = ImageOps.fit(Image.fromarray(picture), size, method)
    np.testing.assert_array_equal(fit(picture, *size, "crop", resample), np.asarray(cropped))
    padded = ImageOps.pad(Image.fromarray(picture), size, method, color=(0, 0, 0))
    np.testing.assert_array_equal(fit(picture, *size, "pad", resample), np.asarray(padded))
    stretched = Image.fromarray(picture).resize(size, method)
    np.testing.assert_array_equal(fit(picture, *size, "stretch", resample), np.asarray(stretched))


@pytest.mark.parametrize("shape", [(50, 90, 3), (90, 50, 3), (64, 64, 3)])
def test_padding_a_photo_repeats_its_edge(shape: tuple[int, ...]) -> None:
    """`resize and fill` of AUTOMATIC1111 (modules/images.py, resize_image) pastes the first and last row, stretched."""
    picture = random(*shape)
    ours = fit(picture, 64, 64, "pad", "lanczos", fill="edge")
    padded = np.asarray(ImageOps.pad(Image.fromarray(picture), (64, 64), Image.Resampling.LANCZOS, color=(0, 0, 0)))
    inside = np.flatnonzero(padded.any((1, 2))), np.flatnonzero(padded.any((0, 2)))
    rows, columns = (np.clip(np.arange(64), which.min(), which.max()) for which in inside)
    np.testing.assert_array_equal(ours, padded[rows][:, columns])


def test_what_is_squeezed_is_said() -> None:
    assert aspect_note("x.png", random(64, 64, 3), 512, 512) is None
    assert aspect_note("x.png", random(512, 520, 3), 512, 512) is None  # 1.6 %
    assert "2.00 times narrower; --resize-mode crop or pad" in str(aspect_note("x.png", random(64, 128, 3), 512, 512))
    assert "2.00 times flatter" in str(aspect_note("x.png", random(64, 64, 3), 512, 256))
