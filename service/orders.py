"""From what a client sent to an order: images are decoded and brought to size, everything is checked."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable, unknown_choice
from ..runtime.control.extraction import can_extract, fit_photo
from ..runtime.control.plausibility import control_image_note
from ..runtime.images.file_kinds import lossy
from ..runtime.images.fitting import RESIZE_MODES, ResizeMode, aspect_note, fit
from ..runtime.images.image_files import WHITE, Color, ImageFile, Pixels, decode_image
from ..runtime.init_image import fit_init_image
from ..runtime.preparing import fit_control
from ..runtime.settings.request import MAX_CONTROLS, Control, Request
from .errors import ServiceError
from .limits import Limits
from .tasks import Order

if TYPE_CHECKING:
    from .models import ServedModel


@dataclass(frozen=True)
class AskedControl:
    """A control as a client sent it.

    Attributes:
        condition: of this name.
        image: the bytes of an image file.
        photo: whether the condition is to be extracted from it.
        resize_mode: how an image of another shape than the model's is brought to it.
        scale, start, end: as in `Control`.
        name: what messages call the image.
    """

    condition: str
    image: bytes
    photo: bool = False
    resize_mode: str = "stretch"
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    name: str = "image"


@dataclass(frozen=True)
class Asked:
    """A request as a client sent it.

    Attributes:
        controls: any number.
        init_image: the bytes of the image to begin with.
        resize_mode: how that is brought to the model's shape.
        fields: further fields of `Request`.
        score, preview: as in `Order`.
    """

    controls: Sequence[AskedControl] = ()
    init_image: bytes | None = None
    resize_mode: str = "stretch"
    fields: Mapping[str, Any] = field(default_factory=dict)
    score: bool = False
    preview: bool = False


def make_order(model: "ServedModel", asked: Asked, limits: Limits) -> Order:
    """Checks a request, as the pipeline will, and decides everything that it leaves open. Images are brought to size.

    Raises:
        UserError, ServiceError: it cannot be served.
    """
    if len(asked.controls) > MAX_CONTROLS:
        raise UserError(f"controls: {len(asked.controls)} are too many: give at most {MAX_CONTROLS}")
    images = asked.fields.get("num_images_per_prompt", 1)
    if not 1 <= images <= limits.images:
        text = f"n, the images of a request, must be from 1 to {limits.images}, not {images}"
        raise ServiceError(400, text, code="over_limit", param="n")
    notes: list[str] = []
    controls = [_control(model, control, limits, notes) for control in asked.controls]
    begin = None
    if asked.init_image is not None:
        begin = _photo(model, asked.init_image, "init_image", asked.resize_mode, limits, notes)
        begin, more = fit_init_image(model.bundle, begin)
        notes += more
    request = Request(controls=controls, init_image=begin, **asked.fields)
    steps = request.num_inference_steps or 0
    if steps > limits.steps:
        text = f"num_inference_steps must be at most {limits.steps} here, not {steps}"
        raise ServiceError(400, text, code="over_limit", param="num_inference_steps")
    plan = model.plan(request)
    if plan.prompts.chunks > limits.prompt_chunks:
        text = f"prompt takes {plan.prompts.chunks} chunks of 77 tokens, more than {limits.prompt_chunks}: shorten it"
        raise ServiceError(400, text, code="over_limit", param="prompt")
    photos = tuple(control.photo for control in asked.controls)
    unique = tuple(dict.fromkeys(notes))
    return Order(plan.request, plan.key, plan.schedule.steps, photos, asked.score, asked.preview, unique)


def image_bytes(text: str, name: str) -> bytes:
    """The bytes of an image in base64, with or without the head of a data URL.

    Raises:
        ServiceError: it is something else; paths and addresses are neither opened nor fetched.
    """
    head, comma, _ = text[:200].partition(",")
    if head.startswith("data:"):
        if not comma or not head.endswith(";base64"):
            raise _no_image(name, "is no data URL in base64")
        text = text[len(head) + 1 :]
    elif "://" in head:
        raise _no_image(name, "is an address: nothing is fetched")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise _no_image(name, "is not base64") from None


def decode(data: bytes, name: str, limits: Limits, background: Color = (0, 0, 0)) -> tuple[Pixels, str]:
    """Pixels uint8 [H,W,3] of an image's bytes, under the runtime's limits and the server's, and its format.

    Raises:
        UserError: see `decode_image`.
    """
    return decode_image(data, name, background=background, max_pixels=limits.pixels)


def _control(model: "ServedModel", asked: AskedControl, limits: Limits, notes: list[str]) -> Control:
    if asked.condition not in CONDITIONS:
        raise unknown_choice("condition", asked.condition, CONDITIONS)
    bundle, condition = model.bundle, asked.condition
    bundle.require_condition(condition)
    extractable = can_extract(bundle, condition)
    if asked.photo:
        if not extractable:
            raise UserError(f"extract: {model.id} has no extractor for {condition!r}: give the control image itself")
        pixels = fit_photo(_photo(model, asked.image, asked.name, asked.resize_mode, limits, notes), *model.size)
    else:
        pixels, kind = decode(asked.image, asked.name, limits)
        file = ImageFile(pixels, kind, Path(asked.name), lossy(asked.image, kind))
        ade20k = "palette" not in bundle.manifest.conditions[condition]
        if found := control_image_note(condition, file, ade20k=ade20k, extractable=extractable):
            notes.append(_in_fields(found))
        mode = _mode(asked.resize_mode)
        if mode == "stretch":
            _note_shape(model, pixels, asked.name, notes)
        else:
            pixels = fit(pixels, *model.size, mode, CONDITIONS[condition].resample)
    control = Control(condition, pixels, asked.scale, asked.start, asked.end)
    # As the pipeline would do it: what waits in the queue takes no more memory than what is drawn.
    fitted, more = fit_control(bundle, control)
    notes += more
    return replace(control, image=fitted) if more else control


def _photo(model: "ServedModel", data: bytes, name: str, resize_mode: str, limits: Limits, notes: list[str]) -> Pixels:
    pixels, _ = decode(data, name, limits, WHITE)
    mode = _mode(resize_mode)
    if mode != "stretch":
        return fit(pixels, *model.size, mode, "lanczos", fill="edge")
    _note_shape(model, pixels, name, notes)
    return pixels


def _note_shape(model: "ServedModel", pixels: Pixels, name: str, notes: list[str]) -> None:
    if note := aspect_note(name, pixels, *model.size):
        notes.append(_in_fields(note))


def _mode(text: str) -> ResizeMode:
    match text:
        case "stretch" | "crop" | "pad":
            return text
    raise unknown_choice("resize_mode", text, RESIZE_MODES)


def _in_fields(note: str) -> str:
    """A note of the command's in the words of the interfaces."""
    return note.replace("--resize-mode", "resize_mode").replace("--extract", "extract=true")


def _no_image(name: str, what: str) -> ServiceError:
    return ServiceError(
        400,
        f"{printable(name, 40)} {what}: send the bytes of an image file in base64",
        code="invalid_image",
        param=name,
    )
