"""Images written as PNG files and folders for them: nothing on disk is ever overwritten."""

import contextlib
import errno
import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ...errors import CnppError, UserError
from .image_files import Pixels


def encode_png(pixels: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file's bytes: pixels uint8 [H, W, 3] or [H, W], and text chunks.

    A text is stored as tEXt where it is Latin-1, otherwise as iTXt (UTF-8).
    """
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    # After PNG's filters little but runs is left to find in a picture: as small within 2 % as with zlib's whole search,
    # for a quarter of its time. Gray maps become up to a half larger.
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], pixels: Pixels, text: Mapping[str, str] | None = None) -> None:
    """Write a new PNG file; an existing file is never touched, a partial one is removed.

    Args:
        path: must not exist; its folder must.
        pixels: uint8 [H, W, 3] or [H, W].
        text: text chunks by keyword; see `encode_png`.

    Raises:
        UserError: the file exists, or its folder does not.
        CnppError: writing failed, for example because the disk is full.
    """
    data = encode_png(pixels, text)
    name = repr(os.fspath(path))
    try:
        file = Path(path).open("xb")  # noqa: SIM115
    except FileExistsError:
        raise UserError(f"{name} exists already and is not overwritten; choose another name") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{name} cannot be written: its folder does not exist; create it first") from None
    except OSError as error:
        raise _write_error(name, error) from None
    try:
        # Closing flushes, and may be the first to learn that the disk is full.
        with file:
            file.write(data)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(path).unlink()
        if isinstance(error, OSError):
            raise _write_error(name, error) from None
        raise


def new_folder(parent: str | os.PathLike[str], stem: str = "run") -> Path:
    """Create the next numbered folder, `<stem>-0001`, `<stem>-0002`, …, in `parent`, which is created if missing.

    `mkdir` is atomic, so two processes never get the same folder.

    Raises:
        CnppError: the folder cannot be created.
    """
    folder = existing_folder(Path(parent))
    try:
        taken = (entry.name.removeprefix(f"{stem}-") for entry in folder.glob(f"{stem}-*"))
        number = max((int(end) for end in taken if end.isascii() and end.isdigit()), default=0)
        while True:
            number += 1
            try:
                (new := folder / f"{stem}-{number:04d}").mkdir()
            except FileExistsError:
                continue
            return new
    except OSError as error:
        raise _write_error(repr(os.fspath(parent)), error) from None


def existing_folder(path: Path) -> Path:
    """The folder, which is created where it is missing.

    Raises:
        CnppError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{os.fspath(path)!r} is a file; give a folder") from None
    except OSError as error:
        raise _write_error(repr(os.fspath(path)), error) from None
    return path


def _write_error(name: str, error: OSError) -> CnppError:
    reason = error.strerror or str(error)
    what = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder and its permissions"
    return CnppError(f"{name} cannot be written ({reason}); {what}")
