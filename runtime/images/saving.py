"""Writing what was drawn: no picture is lost where it was to go."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import CnppError
from ...messages import one_line, printable
from .image_files import Pixels, new_folder, save_png
from .metadata import CHUNK


@dataclass(frozen=True)
class Saved:
    """Attributes:
    folder: the run's new folder, or where the pictures went instead.
    images: the pictures' paths, image 0 first.
    notes: one line for each picture that is somewhere else or without its record.
    """

    folder: Path
    images: tuple[Path, ...]
    notes: tuple[str, ...]


def save_pictures(out: Path, pictures: Sequence[Pixels], texts: Sequence[Mapping[str, str]]) -> Saved:
    """Writes `image-0.png`, … into a new numbered folder under `out`; what cannot be written there goes into a new
    folder of the system's for temporary files.

    Args:
        texts: of each picture, its text chunks.
    Raises: CnppError naming what was kept, where a picture can be written to neither.
    """
    folder: Path | None = None
    fallback: Path | None = None
    paths: list[Path] = []
    notes: list[str] = []
    lost: list[str] = []
    for i, (pixels, text) in enumerate(zip(pictures, texts, strict=True)):
        name = f"image-{i}.png"
        if CHUNK not in text:
            notes.append(f"{name} cannot be repeated: its record is too large for a PNG's text")
        try:
            folder = folder or new_folder(out)
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
    if folder is not None and folder not in {path.parent for path in paths}:
        with suppress(OSError):
            folder.rmdir()
    return Saved(paths[0].parent, tuple(paths), tuple(notes))


def kept_note(images: Sequence[Path]) -> str:
    """What an error says of the pictures that there are already."""
    return f"kept: {', '.join(printable(path) for path in images)}" if images else "no image was kept"
