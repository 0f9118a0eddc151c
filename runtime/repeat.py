"""Generating an image again from its own metadata, which may come from anywhere."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundles.bundle import Bundle, bundle_folder
from ..bundles.library import QUANTIZED
from ..errors import UserError
from ..messages import printable
from .generate import GenerateResult, generate
from .images.image_files import read_image
from .output.metadata import BundleRecord, read_record, request_from_record
from .pipeline import Pipeline
from .settings.options import RuntimeOptions
from .watching import OnProgress


@dataclass(frozen=True)
class Repeated:
    """What was generated, and how far the image is from the one in the file: of 255 levels, 0 where it is the same."""

    generated: GenerateResult
    max_difference: int


def repeat(
    file: Path,
    out: Path,
    bundle: Path | None = None,
    options: RuntimeOptions | None = None,
    on_progress: OnProgress | None = None,
) -> Repeated:
    """Generates an image again from the metadata in its file.

    The whole request is repeated, all its images, because an image may depend on its batch by the last bit. All of the
    record is checked before anything is generated.

    Args:
        file: a PNG that `cnpp-trt run` or `Result.save` wrote.
        out: the parent of the new folder.
        bundle: None finds the bundle by the model's name, precision and size.
        options, on_progress: as in `Pipeline`.

    Raises:
        UserError: the file is no such image, or its bundle cannot be found.
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
    pipeline = Pipeline.open(opened, options)
    notes = []
    if opened.digest != made_with.digest:
        notes.append(f"{opened.folder} is not the bundle that drew {name}: the picture may differ")
    if pipeline.backend.name != record.backend:
        notes.append(f"{name} was drawn on {record.backend}, now on {pipeline.backend.name}")
    generated = generate(pipeline, request, out, notes, on_progress=on_progress)
    after = read_image(generated.images[record.image_index]).pixels
    return Repeated(generated, int(np.abs(after.astype(int) - before.astype(int)).max()))


def find_recorded(made_with: BundleRecord, name: str) -> Path:
    """The folder of the bundle that a record names, looked up among the names that the store has, never as a path.

    Raises:
        UserError: there is none, with the command that makes it.
    """
    size = (made_with.width, made_with.height)
    wanted = f"{made_with.model}-{made_with.precision}-{size[0]}x{size[1]}"
    root = bundle_folder("miniature", made_with.precision, *size).parent
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name == wanted:
            return folder
    # What follows was written by whoever made the picture: it is quoted for the shell that it may be pasted into.
    model = shlex.quote(printable(made_with.model))
    if made_with.precision in QUANTIZED:
        raise UserError(
            f"no bundle {printable(repr(wanted))}, which drew {name}, under {root}: make one with "
            f"`cnpp-trt quantize --model {model} --precision {made_with.precision}`, or give another with --bundle"
        )
    command = f"cnpp-trt export --model {model} --precision {made_with.precision} --size {size[0]}x{size[1]} --cond all"
    raise UserError(
        f"no bundle {printable(repr(wanted))}, which drew {name}, under {root}: make one with `{command}`, "
        "or give another with --bundle"
    )
