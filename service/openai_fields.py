"""The fields of OpenAI's image interface, and ours beside them under diffusers' names."""

import re
from typing import Any

from ..errors import UserError
from ..messages import printable
from ..runtime.sampling.scheduler_names import read_scheduler
from ..schema import Record, SchemaError, decode
from .errors import ServiceError, refused_field
from .orders import Asked, AskedControl, image_bytes
from .reply import Reply

# OpenAI's fields that change nothing here, whatever their value.
IGNORED = ("complexity", "input_fidelity", "moderation", "quality", "safety_identifier", "style", "user")
_REFUSED = {
    "mask": "is not supported: nothing is painted in; give a control image and a condition",
    "markup": "is not supported: give a control image and a condition",
    "svg": "is not supported: images are png, jpeg or webp",
    "frame_count": "is not supported: there are no animations",
    "frame_duration_ms": "is not supported: there are no animations",
}


class ControlFields(Record):
    """One of `controls`; `image` is base64 of an image file, or a data URL."""

    condition: str
    image: str
    extract: bool = False
    resize_mode: str = "stretch"
    controlnet_conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0


class ImageFields(Record):
    """A request for images. What is null counts as left out; settings that are left out are the model's own.

    `condition` names what the control image shows; several go as lists of one length. `extract`: the images are photos.
    `score`: each image's condition is extracted again and compared. `return_conditions`: those come back too.
    """

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: int | None = None
    # Ours.
    negative_prompt: str | None = None
    condition: str | list[str] | None = None
    control_image: str | list[str] | None = None
    extract: bool | None = None
    resize_mode: str | None = None
    controlnet_conditioning_scale: float | list[float] | None = None
    control_guidance_start: float | list[float] | None = None
    control_guidance_end: float | list[float] | None = None
    controls: list[ControlFields] | str | None = None
    seed: int | list[int] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    init_image: str | None = None
    strength: float | None = None
    clip_skip: int | None = None
    clip_skip_negative: bool | None = None
    long_prompt: bool | None = None
    prompt_weights: bool | None = None
    guess_mode: bool | None = None
    timestep_spacing: str | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
    guidance_interval: int | None = None
    controlnet_interval: int | None = None
    cache_interval: int | None = None
    score: bool = False
    return_conditions: bool = False
    timeout: float | None = None
    # OpenAI's that mean nothing here, or that are refused.
    background: Any = None
    complexity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    input_fidelity: Any = None
    markup: Any = None
    mask: Any = None
    moderation: Any = None
    quality: Any = None
    safety_identifier: Any = None
    style: Any = None
    svg: Any = None
    user: Any = None


class JobFields(ImageFields):
    """A request whose images are fetched later; `preview`: what they look like after each step can be asked for."""

    preview: bool = False


def ignored_of(fields: ImageFields) -> tuple[str, ...]:
    """The fields that were sent and change nothing."""
    names = [name for name in IGNORED if getattr(fields, name) is not None]
    if fields.background is not None:
        names.append("background")
    return tuple(sorted(names))


def size_of(text: str | None) -> tuple[int, int] | None:
    """(width, height) of `512x512`; None of `auto`, which is the model's own.

    Raises:
        ServiceError: it is no size.
    """
    if text in (None, "auto"):
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text or "", re.ASCII)
    if not found:
        shown = printable(repr(text), 40)
        raise ServiceError(
            400, f"size {shown} cannot be read: give WIDTHxHEIGHT or auto", code="invalid_size", param="size"
        )
    return int(found[1]), int(found[2])


def reply_of(fields: ImageFields) -> Reply:
    """How the images are to be encoded.

    Raises:
        ServiceError: in a way that there is not.
    """
    for name, why in _REFUSED.items():
        if getattr(fields, name) is not None:
            raise refused_field(name, why)
    if fields.background not in (None, "auto", "opaque"):
        raise refused_field("background", "can be auto or opaque: images have no transparent pixels")
    if fields.response_format not in (None, "b64_json", "url"):
        raise refused_field("response_format", "must be b64_json or url (a data URL)")
    quality = 95 if fields.output_compression is None else fields.output_compression
    if not 0 <= quality <= 100:
        raise refused_field("output_compression", "must be from 0 to 100")
    if not 0 <= (fields.partial_images or 0) <= 3:
        raise refused_field("partial_images", "must be from 0 to 3")
    url = fields.response_format == "url"
    if fields.output_format in (None, "png"):
        return Reply("png", quality, url, fields.return_conditions)
    if fields.output_format == "jpeg":
        return Reply("jpeg", quality, url, fields.return_conditions)
    if fields.output_format == "webp":
        return Reply("webp", quality, url, fields.return_conditions)
    raise refused_field("output_format", "must be png, jpeg or webp")


def asked_of(fields: ImageFields, files: list[bytes] | None = None, preview: bool = False) -> Asked:
    """The request that the fields describe.

    Args:
        files: of a form: control images where there is a `condition`, else the image to begin with.
        preview: as in `Order`.

    Raises:
        UserError, ServiceError: it contradicts itself.
    """
    files = files or []
    begin = None if fields.init_image is None else image_bytes(fields.init_image, "init_image")
    if files and fields.condition is None and fields.controls is None:
        if len(files) > 1:
            raise UserError("condition is missing: name what each of the images shows, as in condition=seg")
        begin, files = files[0], []
    if fields.strength is not None and begin is None:
        raise UserError("strength says how much of an initial image is drawn anew: give one as init_image")
    score = fields.score or fields.return_conditions
    controls = [*_own_controls(fields, files), *_listed_controls(fields)]
    return Asked(controls, begin, fields.resize_mode or "stretch", _settings(fields), score, preview)


def _settings(fields: ImageFields) -> dict[str, Any]:
    names = (
        "negative_prompt", "num_inference_steps", "guidance_scale", "strength", "clip_skip", "clip_skip_negative",
        "long_prompt", "prompt_weights", "guess_mode", "timestep_spacing", "guidance_start", "guidance_end",
        "guidance_interval", "controlnet_interval", "cache_interval",
    )  # fmt: skip
    given = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    given["prompt"] = fields.prompt
    given["num_images_per_prompt"] = 1 if fields.n is None else fields.n
    given["scheduler"] = None if fields.scheduler is None else read_scheduler(fields.scheduler)
    if fields.seed is not None and fields.seed != -1:
        given["seed"] = fields.seed
    return given


def _own_controls(fields: ImageFields, files: list[bytes]) -> list[AskedControl]:
    """Those of `condition`, with the images of the form or of `control_image`."""
    texts = _listed(fields.control_image)
    images = [*files, *(image_bytes(text, "control_image") for text in texts)]
    conditions = _listed(fields.condition)
    if not conditions:
        if images and not (files and fields.controls is not None):
            raise UserError("condition is missing: name what the control image shows, as in condition=seg")
        if images:
            raise UserError("controls have images of their own: leave the other image out, or send it as init_image")
        return []
    if fields.extract and len(images) == 1:
        images = images * len(conditions)  # several conditions of one photo
    if len(images) != len(conditions):
        raise UserError(f"condition: {len(conditions)} conditions and {len(images)} images: give one image for each")
    n, mode = len(conditions), fields.resize_mode or "stretch"
    scales = _each("controlnet_conditioning_scale", fields.controlnet_conditioning_scale, 1.0, n)
    starts = _each("control_guidance_start", fields.control_guidance_start, 0.0, n)
    ends = _each("control_guidance_end", fields.control_guidance_end, 1.0, n)
    return [
        AskedControl(conditions[i], images[i], bool(fields.extract), mode, scales[i], starts[i], ends[i])
        for i in range(n)
    ]


def _listed_controls(fields: ImageFields) -> list[AskedControl]:
    controls = fields.controls
    if isinstance(controls, str):  # of a form, as JSON
        try:
            controls = decode(controls, list[ControlFields])
        except SchemaError as e:
            raise SchemaError(f"controls: {e}") from None
    return [
        AskedControl(
            c.condition,
            image_bytes(c.image, f"controls[{i}].image"),
            c.extract,
            c.resize_mode,
            c.controlnet_conditioning_scale,
            c.control_guidance_start,
            c.control_guidance_end,
            name=f"controls[{i}].image",
        )
        for i, c in enumerate(controls or ())
    ]


def _listed(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _each(name: str, value: float | list[float] | None, default: float, n: int) -> list[float]:
    values: list[float] = [default] if value is None else value if isinstance(value, list) else [value]
    if len(values) not in (1, n):
        raise UserError(f"{name}: {len(values)} values for {n} conditions: give one, or one each")
    return values * n if len(values) == 1 else values
