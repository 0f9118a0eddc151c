"""From a row to a request: the fields of the Python API, checked, with its images as files.

A row is checked without anything being drawn: its images are decoded, its settings are those of a `Request`, and its
prompt is read by the tokenizer. What a row is then lies in a `Job`, small enough to be kept for every row and to be
sent to another process: images are named by path and digest.
"""

import base64
import binascii
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..bundles.bundle import Bundle
from ..bundles.defaults import SamplingDefaults
from ..errors import UserError
from ..messages import did_you_mean, one_line, printable
from ..runtime.control.extraction import can_extract
from ..runtime.images.image_files import WHITE, Pixels, read_image
from ..runtime.planning import open_tokenizer, plan_request
from ..runtime.settings import preset
from ..runtime.settings.request import MAX_CONTROLS, Control, Request
from ..schema import Record

KEY_LENGTH = 32
"""Characters of a request's key, of the 64 of its SHA-256: what its files are called."""
_SETTINGS = tuple(f.name for f in fields(Request) if f.name not in ("controls", "init_image"))
_OF_CONTROL = (
    "condition",
    "image",
    "extract",
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)
_KNOWN = (*_SETTINGS, "controls", "init_image", "id", *_OF_CONTROL)
_BLACK = (0, 0, 0)
_BLANK = np.zeros((16, 16, 3), np.uint8)
_REMEMBERED = 10_000  # digests of image files, of 100 bytes each


class ImageOfJob(Record):
    """An image file with the digest of its pixels."""

    path: str
    sha256: str


class ControlOfJob(Record):
    """A control; with `extract` its image is a photo.

    Attributes:
        settings: further fields of `Control`.
    """

    condition: str
    image: ImageOfJob
    extract: bool
    settings: dict[str, Any]


class Job(Record):
    """A request that can be drawn, without its pixels.

    Attributes:
        key: digest of all that decides its images, the bundle included.
        group: digest of what decides its list of launches: jobs that share it can run together.
        settings: fields of `Request` by name, all decided, the seed too.
    """

    key: str
    group: str
    images: int
    settings: dict[str, Any]
    controls: list[ControlOfJob]
    init_image: ImageOfJob | None


@dataclass(frozen=True)
class _Digest:
    """Of an image file, as it was when it was read."""

    status: tuple[int, int, int]
    sha256: str


class RowReader:
    """Turns rows into jobs for one bundle. Needs no backend.

    Args:
        bundle: that will draw them.
        keep: stores the bytes of an image that a row holds itself, and returns the path of its file.
        presets: of conditions that are drawn faster than exactly.

    Raises:
        UserError: a preset is of another bundle.
    """

    def __init__(self, bundle: Bundle, keep: Callable[[bytes], Path], presets: Sequence[preset.Preset] = ()) -> None:
        self._presets = preset.by_condition(presets, bundle)
        self._bundle = bundle
        self._keep = keep
        self._tokenizer = open_tokenizer(bundle)
        self._defaults = SamplingDefaults.of(bundle.manifest)
        self._digests: OrderedDict[tuple[str, bool], _Digest] = OrderedDict()

    def read(self, row: Mapping[str, Any], folder: Path) -> Job:
        """The job of a row.

        Args:
            row: its fields.
            folder: that relative paths begin from.

        Raises:
            UserError: the row cannot be drawn; the message says what is wrong with it.
        """
        _require_known(row, _KNOWN, "a row")
        if not isinstance(row.get("id", ""), str | int):
            raise UserError("id must be a text or a whole number")
        controls = [self._control(value, folder) for value in _controls(row)]
        begin = None
        if row.get("init_image") is not None:
            begin = self._image(row["init_image"], folder, "init_image", photo=True)
        settings = {name: row[name] for name in _SETTINGS if row.get(name) is not None}
        request = _request(settings, controls, begin, lambda control: _BLANK, lambda image: _BLANK)
        unseeded = request.seed is None
        resolved = preset.resolve(request, self._presets, self._defaults)
        controls = [
            msgspec.structs.replace(c, settings=_settings_of(decided))
            for c, decided in zip(controls, resolved.controls, strict=True)
        ]
        plan = plan_request(self._bundle, self._tokenizer, resolved)
        decided = {name: getattr(resolved, name) for name in _SETTINGS}
        if unseeded:
            # Not random: the job of the same row must be the same job the next time.
            decided["seed"] = int(self._key({**decided, "seed": None}, controls, begin)[:8], 16)
        key = self._key(decided, controls, begin)
        group = hashlib.sha256(repr(plan.key).encode()).hexdigest()[:KEY_LENGTH]
        return Job(key, group, resolved.num_images_per_prompt, decided, controls, begin)

    def _key(self, settings: Mapping[str, Any], controls: list[ControlOfJob], begin: ImageOfJob | None) -> str:
        content = {
            "bundle": self._bundle.digest,
            "settings": dict(settings),
            "controls": [
                {**c.settings, "condition": c.condition, "image": c.image.sha256, "extract": c.extract}
                for c in controls
            ],
            "init_image": begin and begin.sha256,
        }
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_LENGTH]

    def _control(self, value: Any, folder: Path) -> ControlOfJob:
        if not isinstance(value, Mapping):
            raise UserError('a control must be an object, as in {"condition": "seg", "image": "map.png"}')
        _require_known(value, _OF_CONTROL, "a control")
        condition, extract = value.get("condition"), value.get("extract", False)
        if not isinstance(condition, str):
            raise UserError('a control needs a condition, as in {"condition": "seg", "image": "map.png"}')
        self._bundle.require_condition(condition)
        if not isinstance(extract, bool):
            raise UserError(f"extract must be true or false, not {printable(repr(extract), 40)}")
        if extract:
            self._require_extractor(condition)
        if value.get("image") is None:
            raise UserError(f"the control {condition} needs an image: the path of a file, or its bytes")
        given = {name: value[name] for name in _OF_CONTROL[3:] if value.get(name) is not None}
        checked = Control(condition, _BLANK, **given)  # before an image is read
        return ControlOfJob(
            condition,
            self._image(value["image"], folder, f"the {condition} image", photo=extract),
            extract,
            _settings_of(checked),
        )

    def _require_extractor(self, condition: str) -> None:
        if not can_extract(self._bundle, condition):
            raise UserError(f"the bundle has no extractor for {condition!r}: give the control image itself")

    def _image(self, value: Any, folder: Path, what: str, *, photo: bool) -> ImageOfJob:
        path = self._path(value, folder, what)
        return ImageOfJob(str(path), self._digest(path, photo))

    def _path(self, value: Any, folder: Path, what: str) -> Path:
        """The file of an image: given by its path, or by its bytes, which are stored."""
        if isinstance(value, Mapping):  # as `datasets` has it in Parquet; JSON has no bytes, and so base64
            _require_known(value, ("bytes", "path"), what)
            content = value.get("bytes")
            value = value.get("path") if content is None else _from_base64(content, what)
        if isinstance(value, bytes):
            return self._keep(value)
        if not isinstance(value, str) or not value:
            raise UserError(f'{what} must be the path of a file or {{"bytes": "…base64…"}}')
        # `..` is resolved as text: a shell's habit, and no link is followed.
        return Path(os.path.abspath(folder / value))  # noqa: PTH100

    def _digest(self, path: Path, photo: bool) -> str:
        """Of the pixels, which are decoded: so a file that is no image is known before anything is drawn."""
        try:
            found = path.stat()
            status = (found.st_mtime_ns, found.st_size, found.st_ino)
        except (OSError, ValueError):
            status = (0, 0, 0)  # `read_image` says what is wrong
        known = self._digests.get((str(path), photo))
        if known is None or known.status != status:
            known = _Digest(status, pixels_digest(_read(path, photo)))
            self._digests[str(path), photo] = known
        self._digests.move_to_end((str(path), photo))
        if len(self._digests) > _REMEMBERED:
            self._digests.popitem(last=False)
        return known.sha256


def _settings_of(control: Control) -> dict[str, Any]:
    return {name: getattr(control, name) for name in _OF_CONTROL[3:]}


def pixels_digest(pixels: Pixels) -> str:
    """SHA-256 of an image's size and RGB bytes, in hex."""
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def request_of(job: Job, extract: Callable[[str, Pixels], Pixels]) -> Request:
    """The request of a job, with its pixels.

    Args:
        job: as a `RowReader` made it.
        extract: makes the control image of a condition from a photo.

    Raises:
        UserError: an image cannot be read, or is another than it was.
    """

    def image_of(image: ImageOfJob, photo: bool) -> Pixels:
        pixels = _read(Path(image.path), photo)
        if pixels_digest(pixels) != image.sha256:
            raise UserError(f"{printable(image.path)} changed while the job ran: start it again")
        return pixels

    def control_image(control: ControlOfJob) -> Pixels:
        pixels = image_of(control.image, control.extract)
        return extract(control.condition, pixels) if control.extract else pixels

    return _request(job.settings, job.controls, job.init_image, control_image, lambda image: image_of(image, True))


def _request(
    settings: Mapping[str, Any],
    controls: list[ControlOfJob],
    begin: ImageOfJob | None,
    control_image: Callable[[ControlOfJob], Pixels],
    first_image: Callable[[ImageOfJob], Pixels],
) -> Request:
    try:
        return Request(
            **settings,
            controls=[Control(c.condition, control_image(c), **c.settings) for c in controls],
            init_image=None if begin is None else first_image(begin),
        )
    except (TypeError, OverflowError) as e:  # a value that no check expected
        raise UserError(f"it is no request: {one_line(e)}") from None


def _controls(row: Mapping[str, Any]) -> list[Any]:
    """The controls of a row: its list, or the one whose fields stand in the row itself, as a CSV has it."""
    flat = {name: row[name] for name in _OF_CONTROL if row.get(name) is not None}
    listed = row.get("controls")
    if listed is None:
        return [flat] if flat else []
    if flat:
        raise UserError(f"it has controls and {printable(next(iter(flat)))} beside them: put that into the control")
    if isinstance(listed, Mapping):
        listed = [listed]
    if not isinstance(listed, list) or len(listed) > MAX_CONTROLS:
        raise UserError(f"controls must be a list of at most {MAX_CONTROLS} objects")
    return listed


def _require_known(given: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in known:
            hint = did_you_mean(str(name), known).strip() or f"its fields are {', '.join(known)}"
            raise UserError(f"{what} has no field {printable(repr(name), 60)}: {hint}")


def _from_base64(content: Any, what: str) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise UserError(f"the bytes of {what} are not base64") from None


def _read(path: Path, photo: bool) -> Pixels:
    # As `cnpp-trt run` reads them: what is transparent in a control image is "nothing here".
    return read_image(path, background=WHITE if photo else _BLACK).pixels
