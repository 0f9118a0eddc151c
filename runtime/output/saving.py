"""Writing generated images: where one cannot be written, it goes into a temporary folder instead of being lost."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import CnppError, UserError
from ...messages import one_line, printable
from ..images.image_files import Pixels
from ..images.png_files import existing_folder, new_folder, save_png
from .metadata import CHUNK


@dataclass(frozen=True)
class Saved:
    """The files of a request's images.

    Attributes:
        folder: where the images are.
        images: their paths, image 0 first.
        notes: one line for each image that is somewhere else or without its record.
    """

    folder: Path
    images: tuple[Path, ...]
    notes: tuple[str, ...]


def save_images(
    out: Path, images: Sequence[Pixels], texts: Sequence[Mapping[str, str]], *, numbered: bool = True
) -> Saved:
    """Writes `image-0.png`, …; what cannot be written there goes into a new folder for temporary files.

    Args:
        out: the folder, or with `numbered` the parent of a new one.
        images: uint8 [H,W,3] each.
        texts: the text chunks of each image.
        numbered: whether the images go into a new numbered folder.

    Raises:
        UserError: without `numbered`, where a file exists already.
        CnppError: an image can be written to neither; the message names what was kept.
    """
    if not numbered:
        for i in range(len(images)):
            if (out / f"image-{i}.png").exists():
                raise UserError(f"{printable(out / f'image-{i}.png')} exists already: choose another folder")
    folder: Path | None = None
    fallback: Path | None = None
    paths: list[Path] = []
    notes: list[str] = []
    lost: list[str] = []
    for i, (pixels, text) in enumerate(zip(images, texts, strict=True)):
        name = f"image-{i}.png"
        if CHUNK not in text:
            notes.append(f"{name} cannot be repeated: its record is too large for a PNG's text")
        try:
            folder = folder or (new_folder(out) if numbered else existing_folder(out))
            save_png(folder / name, pixels, text)
            paths.append(folder / name)
            continue
        except CnppError as e:
            reason = e
        try:
            fallback = fallback or Path(tempfile.mkdtemp(prefix="cnpp-trt-"))
            save_png(fallback / name, pixels, text)
            paths.append(fallback / name)
            notes.append(f"{one_line(reason)}: it is in {fallback / name}")
        except (CnppError, OSError) as e:
            lost.append(f"{one_line(reason)}, nor elsewhere ({one_line(e)})")
    if lost:
        raise CnppError(f"{lost[0]}; {kept_note(paths)}")
    if numbered and folder is not None and folder not in {path.parent for path in paths}:
        with suppress(OSError):
            folder.rmdir()
    return Saved(paths[0].parent, tuple(paths), tuple(notes))


def kept_note(images: Sequence[Path]) -> str:
    """What an error says of the images that were written already."""
    return f"kept: {', '.join(printable(path) for path in images)}" if images else "no image was kept"
