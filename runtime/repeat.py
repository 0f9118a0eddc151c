"""Drawing a picture again from its own metadata, which may come from anywhere."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundles.bundle import Bundle, bundle_folder
from ..errors import UserError
from ..messages import printable
from .generate import Drawn, draw
from .images.image_files import read_image
from .images.metadata import BundleRecord, read_record, request_from_record
from .pipeline import OnProgress, Pipeline


@dataclass(frozen=True)
class Repeated:
    """`drawn` and whether the picture came out the same: `max_difference` is 0 then (of 255 levels)."""

    drawn: Drawn
    max_difference: int


def repeat(
    file: Path,
    out: Path,
    bundle: Path | None = None,
    backend: str = "auto",
    threads: int | None = None,
    openvino_precision: str | None = None,
    plans: Path | None = None,
    vram_budget: int | None = None,
    on_progress: OnProgress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Repeated:
    """Draws a picture again from the metadata that `draw` wrote into it.

    The whole request is repeated, all its images, because a picture may depend on the batch it was drawn in by the
    last bit. All of the record is checked before anything is drawn.

    Args:
        bundle: None finds the bundle by the model's name, precision and size.
        backend, threads, openvino_precision, plans, vram_budget: as in `Pipeline.open`.
        on_progress, report: as in `draw`.
    Raises: UserError where the file is no such picture or its bundle cannot be found.
    """
    record = read_record(file)
    before = read_image(file).pixels
    name, made_with = printable(file), record.bundle
    opened = Bundle.open(find_recorded(made_with, name) if bundle is None else bundle)
    m = opened.manifest
    for width, height, what in ((m.width, m.height, opened.folder), (before.shape[1], before.shape[0], name)):
        if (width, height) != (made_with.width, made_with.height):
            raise UserError(
                f"{name} was drawn at {made_with.width}x{made_with.height}, {what} has {width}x{height} pixels"
            )
    request = request_from_record(record)
    pipeline = Pipeline.open(
        opened, backend, threads, openvino_precision=openvino_precision, plans=plans, vram_budget=vram_budget
    )
    notes = []
    if opened.digest != made_with.digest:
        notes.append(f"{opened.folder} is not the bundle that drew {name}: the picture may differ")
    if pipeline.backend.name != record.backend:
        notes.append(f"{name} was drawn on {record.backend}, now on {pipeline.backend.name}")
    drawn = draw(pipeline, request, out, notes, on_progress=on_progress, report=report)
    after = read_image(drawn.images[record.image_index]).pixels
    return Repeated(drawn, int(np.abs(after.astype(int) - before.astype(int)).max()))


def find_recorded(made_with: BundleRecord, name: str) -> Path:
    """The folder of the bundle that a record names, looked up among the names that the store has, never as a path.

    Raises: UserError where there is none, with the command that makes it.
    """
    size = (made_with.width, made_with.height)
    wanted = f"{made_with.model}-{made_with.precision}-{size[0]}x{size[1]}"
    root = bundle_folder("miniature", made_with.precision, *size).parent
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name == wanted:
            return folder
    # What follows was written by whoever made the picture: it is quoted for the shell that it may be pasted into.
    model = shlex.quote(printable(made_with.model))
    command = f"cnpp-trt export --model {model} --precision {made_with.precision} --size {size[0]}x{size[1]} --cond all"
    raise UserError(
        f"no bundle {printable(repr(wanted))}, which drew {name}, under {root}: make one with `{command}`, "
        "or give another with --bundle"
    )
