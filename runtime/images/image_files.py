"""Image files read: whatever Pillow decodes becomes uint8 RGB.

Image files are untrusted input. They are bounded before they are decoded, only raster formats are tried (Pillow would
start Ghostscript for an EPS file), and whatever is wrong with one is a one-line `UserError`.
"""

import contextlib
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from ...errors import UserError
from .file_kinds import format_of, lossy, other_kind

Pixels: TypeAlias = NDArray[np.uint8]
ImageLike: TypeAlias = Pixels | Image.Image | str | os.PathLike[str]
"""An image in memory, uint8 [H, W, 3] in RGB or Pillow's, or the path of an image file."""
Color: TypeAlias = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
"""What transparent pixels of a photo are composited on; those of a control image become black."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_ASPECT = 16
MIN_SIDE = 16
# Beyond this many decoded bytes per byte of file, an oversized image is called a decompression bomb. DEFLATE reaches
# 1032:1 on constant data; photographs stay below 100:1.
BOMB_RATIO = 500

_EXIF_ORIENTATION = 0x0112
# From the stored array to the upright one, by EXIF 2.32's Orientation tag.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class ImageFile:
    """An image as read from a file.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, upright, C-contiguous.
        format: Pillow's name of the file format: 'PNG', 'JPEG', … (a phone's multi-picture JPEG counts as 'JPEG').
        path: where it came from.
        lossy: whether its compression alters pixels, which corrupts label maps.
    """

    pixels: Pixels
    format: str
    path: Path
    lossy: bool


def read_image(path: str | os.PathLike[str], *, background: Color = (0, 0, 0)) -> ImageFile:
    """Read an image file as 8-bit RGB.

    The EXIF orientation is applied; of an animation the first frame is taken; transparent pixels are composited on
    `background`, so that colors hidden under alpha 0 never show. 16-bit samples are divided by 257 and rounded, so
    that 0 and 65535 become 0 and 255. 32-bit integers are taken for 16-bit samples, floats for [0, 1] or else for
    [0, 255]; what fits neither is refused.

    Raises:
        UserError: there is no such file, it is not a readable regular file, not an image, damaged or truncated, empty,
            of an absurd shape (a side below `MIN_SIDE`, one side more than `MAX_ASPECT` times the other), larger than
            `MAX_PIXELS` or `MAX_FILE_BYTES`, or a decompression bomb.
    """
    data = read_bytes(path)
    pixels, kind = decode_image(data, repr(os.fspath(path)), background=background)
    return ImageFile(pixels, kind, Path(path), lossy(data, kind))


def to_pixels(image: ImageLike, what: str, *, background: Color = (0, 0, 0)) -> Pixels:
    """An image of any kind as a new array, uint8 [H, W, 3] in RGB, that cannot be written to.

    Args:
        image: an array, Pillow's image (decoded as `read_image` decodes a file) or the path of a file.
        what: what messages call it, as in `the seg image`.
        background: what transparent pixels are composited on.

    Raises:
        UserError: it is no image, or its file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        pixels = read_image(image, background=background).pixels
    elif isinstance(image, Image.Image):
        pixels = _from_pillow(image, what, background)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        pixels = image.copy(order="C")
    else:
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"{what} must be a uint8 array [height, width, 3], an image of Pillow's or a path, not {kind}")
    if 0 in pixels.shape:
        raise UserError(f"{what} is empty: {pixels.shape[1]}x{pixels.shape[0]} pixels")
    pixels.flags.writeable = False
    return pixels


def _from_pillow(image: Image.Image, what: str, background: Color) -> Pixels:
    with _decoding(what):
        image.load()
        pixels = _to_rgb(image, b"", what, background)
    turn = _UPRIGHT.get(_orientation(image))
    return np.array(turn(pixels) if turn else pixels, order="C")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The contents of a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        UserError: it cannot be read; the message says why.
    """
    name = repr(os.fspath(path))
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:  # noqa: PTH123
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{name} is not a regular file; give the path of an image file")
            if status.st_size > MAX_FILE_BYTES:
                raise UserError(
                    f"{name} is {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}; give a smaller file"
                )
            return file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no such file: {name}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a directory; give the path of an image file") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(f"{name} cannot be read ({reason}); check its permissions") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is not a path ({error}); check it") from None


def decode_image(
    data: bytes, name: str, *, background: Color = (0, 0, 0), max_pixels: int = MAX_PIXELS
) -> tuple[Pixels, str]:
    """Decode the bytes of an image file; `name` is what messages call it, and more than `max_pixels` are refused.

    Returns:
        pixels, uint8 [H, W, 3], and the format's name; see `read_image`.

    Raises:
        UserError: see `read_image`.
    """
    if not data:
        raise UserError(f"{name} is empty; give an image file")
    if other := other_kind(data, name):
        raise UserError(f"{name} is {other}, which is not read here: save it as PNG or JPEG")
    known = format_of(data)
    if known == "AVIF" and not features.check("avif"):
        raise UserError(f"{name} is an AVIF file, which this Pillow does not read: save it as PNG or JPEG")
    try:
        with _open(data) as image:
            width, height = image.size
            _check_size(name, width, height, len(data), max_pixels)
            with _decoding(name):
                image.load()
                pixels = _to_rgb(image, data, name, background)
            turn = _UPRIGHT.get(_orientation(image))
            upright = turn(pixels) if turn else pixels
            kind = "JPEG" if image.format == "MPO" else str(image.format)
            return np.ascontiguousarray(upright), kind
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_many_pixels(name, None, len(data))) from None
    except UnidentifiedImageError:
        if _declared_size(data, known) is not None:
            raise UserError(f"{name} has no pixels (0 wide or 0 high); give another image") from None
        if known:
            raise UserError(f"{name} is a damaged or truncated {known} file; make or fetch it again") from None
        raise UserError(f"{name} is not an image; give one of {', '.join(FORMATS)}") from None


def resize(pixels: Pixels, width: int, height: int, resample: Literal["nearest", "lanczos"]) -> Pixels:
    """Resize an image exactly as diffusers' `VaeImageProcessor.resize` does with a PIL image.

    Args:
        pixels: uint8 [H, W, 3].
        width, height: the new size, in pixels; the aspect ratio is not kept.
        resample: 'lanczos' is diffusers' default; 'nearest' invents no new colors.

    Returns:
        uint8 [height, width, 3].
    """
    method = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}[resample]
    return np.array(Image.fromarray(pixels).resize((width, height), resample=method))


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. about odd EXIF, which is no concern of the user's
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, UnidentifiedImageError):
            raise
        except Exception as error:
            # A damaged header makes Pillow's plugins raise nearly anything: ValueError, KeyError, struct.error, …
            raise UnidentifiedImageError from error


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except (
        OSError,
        SyntaxError,
        EOFError,
        RuntimeError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        struct.error,
        zlib.error,
    ) as error:
        # Pillow's messages are one line, but say no more than these two cases.
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        state = "truncated" if truncated else "damaged or truncated"
        raise UserError(f"{name} is {state}; make or fetch it again") from None
    except MemoryError:
        raise UserError(f"{name} does not fit into memory; give a smaller image") from None


def _check_size(name: str, width: int, height: int, file_bytes: int, max_pixels: int = MAX_PIXELS) -> None:
    if min(width, height) < 1:
        raise UserError(f"{name} has no pixels (it is {width}×{height}); give another image")
    if width * height > max_pixels:
        raise UserError(_too_many_pixels(name, (width, height), file_bytes, max_pixels))
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{name} is {width}×{height}; sides must be at least {MIN_SIDE} and "
            f"their ratio at most {MAX_ASPECT}; crop or resize it"
        )


def _too_many_pixels(name: str, size: tuple[int, int] | None, file_bytes: int, max_pixels: int = MAX_PIXELS) -> str:
    declared = "far more pixels" if size is None else f"{size[0]:,}×{size[1]:,} pixels"
    if size is None or size[0] * size[1] * 3 > BOMB_RATIO * file_bytes:
        return (
            f"{name} looks like a decompression bomb: {file_bytes:,} bytes that declare {declared}, "
            f"more than {max_pixels:,}; give a smaller image"
        )
    return f"{name} is too large: {declared}, more than {max_pixels:,}; resize it first"


def _declared_size(data: bytes, kind: str | None) -> tuple[int, int] | None:
    """The size a header declares, if it is empty: Pillow reports such a file as no image at all."""
    layout = {"PNG": (">II", 16), "GIF": ("<HH", 6), "BMP": ("<ii", 18)}.get(kind or "")
    if layout is None or len(data) < layout[1] + struct.calcsize(layout[0]):
        return None
    width, height = struct.unpack_from(layout[0], data, layout[1])
    return (width, height) if width == 0 or height == 0 else None


def _orientation(image: Image.Image) -> int:
    # After load(): TIFF images are turned upright by Pillow itself, which then drops the tag.
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF must not cost the picture
        return 1


def _to_rgb(image: Image.Image, data: bytes, name: str, background: Color) -> Pixels:
    """Any mode → uint8 [H, W, 3], composited on the background."""
    deep = _deep_png(data)
    if deep is not None:
        return _flatten(deep, image.info.get("transparency"), background)
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.uint16)
        return _flatten(samples[..., None].repeat(3, 2), image.info.get("transparency"), background)
    if image.mode == "I":
        integers = np.asarray(image)
        if integers.min() < 0 or integers.max() > 65535:
            raise UserError(f"{name} has 32-bit samples beyond 0–65535; convert it to an 8- or 16-bit PNG")
        return _flatten(integers.astype(np.uint16)[..., None].repeat(3, 2), None, background)
    if image.mode == "F":
        floats = np.asarray(image, np.float64)
        if not np.isfinite(floats).all() or floats.min() < 0 or floats.max() > 255:
            raise UserError(f"{name} has float samples beyond 0–1 and 0–255; convert it to an 8- or 16-bit PNG")
        scaled = floats * 255 if floats.max() <= 1 else floats
        return (scaled + 0.5).astype(np.uint8)[..., None].repeat(3, 2)
    if image.has_transparency_data:
        return _flatten(np.asarray(image.convert("RGBA")), None, background)
    return np.asarray(image.convert("RGB"))


def _deep_png(data: bytes) -> NDArray[np.uint16] | None:
    """The samples, uint16 [H, W, 3 or 4], of a PNG of 16 bits per channel in color or with alpha, else None.

    Pillow keeps only the high byte of such files, which is up to one level below the rounded value. Grayscale without
    alpha it keeps whole.
    """
    rgb, gray_alpha, rgb_alpha = 2, 4, 6
    if not data.startswith(b"\x89PNG") or data[24] != 16 or data[25] not in (rgb, gray_alpha, rgb_alpha):
        return None
    import cv2

    decoded: NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16 or decoded.ndim != 3 or decoded.shape[2] not in (3, 4):
        return None  # Pillow's 8 bits, then
    order = [2, 1, 0, 3][: decoded.shape[2]]
    deep: NDArray[np.uint16] = np.asarray(decoded, np.uint16)[..., order]
    return deep


def _flatten(samples: NDArray[np.unsignedinteger], transparent: object, background: Color) -> Pixels:
    """Composite [H, W, 3 or 4] samples of 8 or 16 bits on the background and scale them to 8 bits, rounding once.

    `transparent` is the one fully transparent color of a PNG's tRNS chunk, for samples without an alpha channel.
    """
    top = int(np.iinfo(samples.dtype).max)
    step = top // 255  # 1 or 257
    color = samples[..., :3].astype(np.uint64)
    if samples.shape[-1] == 4:
        alpha = samples[..., 3:].astype(np.uint64)
    elif isinstance(transparent, (int, tuple)):
        alpha = np.where((color == np.asarray(transparent, np.uint64)).all(-1, keepdims=True), 0, top).astype(np.uint64)
    else:
        return ((color + step // 2) // step).astype(np.uint8)
    behind = np.array(background, np.uint64) * step
    mixed = color * alpha + behind * (top - alpha)
    return ((mixed + top * step // 2) // (top * step)).astype(np.uint8)
