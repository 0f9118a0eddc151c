"""Images on their way to a client: encoded, with the metadata that repeats them, and with their scores."""

import base64
import io
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from ..runtime.generate import picture_records
from ..runtime.images.image_files import Pixels
from ..runtime.images.png_files import encode_png
from ..runtime.output import metadata
from .tasks import Outcome, Task

if TYPE_CHECKING:
    from .models import ServedModel

Format: TypeAlias = Literal["png", "jpeg", "webp"]
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


@dataclass(frozen=True)
class Reply:
    """How a client wants its images.

    Attributes:
        format: of the files.
        quality: of `jpeg` and `webp`, 0 to 100.
        url: as data URLs instead of base64.
        conditions: whether the conditions that were extracted again come with their scores.
    """

    format: Format = "png"
    quality: int = 95
    url: bool = False
    conditions: bool = False


def encode_images(model: "ServedModel", outcome: Outcome, reply: Reply) -> list[bytes]:
    """The files of all images. Takes milliseconds for each: not in the event loop."""
    records = picture_records(model.pipelines[0], outcome.result)
    texts = [metadata.pack(record) for record in records]
    return [encode(image, reply, text) for image, text in zip(outcome.result.images, texts, strict=True)]


def encode(pixels: Pixels, reply: Reply, text: dict[str, str]) -> bytes:
    """A file of pixels uint8 [H,W,3]; as JPEG or WebP it has the settings alone, as the web UI writes them."""
    if reply.format == "png":
        return encode_png(pixels, text)
    exif = Image.Exif()
    settings = text.get(metadata.PARAMETERS, "")
    if settings and len(settings) < 30_000:  # a JPEG's segment has 64 KiB
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + settings.encode("utf-16-be")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, reply.format.upper(), quality=reply.quality, exif=exif)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    """Base64 without line ends."""
    return base64.b64encode(data).decode("ascii")


def image_fields(data: bytes, reply: Reply) -> dict[str, str]:
    """An image as OpenAI's interface holds it."""
    text = base64_of(data)
    return {"url": f"data:image/{reply.format};base64,{text}"} if reply.url else {"b64_json": text}


def scores_of(outcome: Outcome, image: int, reply: Reply) -> list[dict[str, Any]]:
    """How well an image follows each of its controls."""
    found = []
    for control in outcome.scores:
        score = control.scores[image]
        entry: dict[str, Any] = {
            "condition": control.condition,
            "metric": score.metric,
            "value": score.value if np.isfinite(score.value) else None,
            "higher_is_better": score.higher_is_better,
            "grade": score.grade or None,
        }
        if reply.conditions:
            entry["extracted"] = base64_of(encode_png(control.extracted[image]))
        found.append(entry)
    return found


def request_of(outcome: Outcome) -> dict[str, Any]:
    """The settings of a request as it was run; prompt and images are left out."""
    request = outcome.result.request
    return {
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "seed": list(request.seeds),
        "controls": [
            {
                "condition": control.condition,
                "controlnet_conditioning_scale": control.controlnet_conditioning_scale,
                "control_guidance_start": control.control_guidance_start,
                "control_guidance_end": control.control_guidance_end,
            }
            for control in request.controls
        ],
        **({"strength": request.strength} if request.init_image is not None else {}),
    }


def images_reply(model: "ServedModel", outcome: Outcome, reply: Reply, notes: tuple[str, ...]) -> dict[str, Any]:
    """An answer in the shape of OpenAI's interface, with what ours knows beside it."""
    seeds = outcome.result.request.seeds
    data = []
    for i, content in enumerate(encode_images(model, outcome, reply)):
        entry: dict[str, Any] = {**image_fields(content, reply), "seed": seeds[i]}
        if outcome.scores:
            entry["scores"] = scores_of(outcome, i, reply)
        data.append(entry)
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": reply.format,
        "size": "{}x{}".format(*model.size),
        "model": model.id,
        "request": request_of(outcome),
        "timings": {"queue": outcome.waited, **outcome.result.timings},
        "notes": list(dict.fromkeys((*notes, *outcome.result.notes))),
    }


def preview_of(model: "ServedModel", task: Task, image: int, reply: Reply) -> bytes | None:
    """What an image looks like at its last step, at its own size; None where that is not known yet."""
    latents = task.latents
    small = None if latents is None else model.previewer.picture(latents[image])
    if small is None:
        return None
    large = np.array(Image.fromarray(small).resize(model.size, Image.Resampling.BILINEAR))
    return encode(large, reply, {})
