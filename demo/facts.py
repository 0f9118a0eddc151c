"""What the page is told of the models, and of pictures that are read."""

import io
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable
from ..runtime.control.palette import labels_from_colors
from ..runtime.images.fitting import fit
from ..runtime.images.image_files import Pixels
from ..runtime.images.png_files import encode_png
from ..runtime.output import metadata
from ..runtime.sampling.scheduler_names import A1111
from ..runtime.sampling.schedulers import SCHEDULERS
from ..service.orders import decode
from ..versions import __version__
from .classes import brushes_of
from .messages import Answer, Kept

if TYPE_CHECKING:
    from ..runtime.output.metadata import PictureRecord
    from ..service.limits import Limits
    from ..service.models import ServedModel
    from ..service.service import Service


def greeting(service: "Service") -> Answer:
    """What the page shows its choices from."""
    return Answer(
        "hello",
        version=__version__,
        models=[_model(model) for model in service.models.all],
        conditions={name: row.title for name, row in CONDITIONS.items()},
        schedulers={name: " ".join(filter(None, A1111[name])) for name in SCHEDULERS},
        limits={"images": service.limits.images, "steps": service.limits.steps, "bytes": service.limits.body_bytes},
    )


def example_of(model: "ServedModel", condition: str, id: int) -> Answer:
    """The example that a bundle ships for a condition.

    Raises:
        UserError: there is none.
    """
    model.bundle.require_condition(condition)
    found = model.bundle.manifest.conditions[condition]
    if "image" not in found:
        raise UserError(f"{model.id} ships no example for {condition!r}: upload an image of your own")
    content = model.bundle.file(found["image"]).read_bytes()
    answer = Answer("example", id=id, condition=condition, prompt=found.get("prompt", ""))
    answer.fields["seed"] = str(found.get("seed", 0))
    answer.fields["image"] = answer.part(content)
    pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    answer.fields["labels"] = _labels(answer, model, condition, pixels)
    return answer


def content_of(model: "ServedModel", data: bytes, condition: str, id: int, service: "Service") -> Answer:
    """What an image file holds: the settings that drew it, or else only pixels.

    Raises:
        UserError: it is no image, or its record is damaged.
    """
    pixels, _ = decode(data, "the image", service.limits)
    text = _record_text(data)
    answer = Answer("content", id=id, condition=condition, settings=None, labels=None)
    if text is None:
        answer.fields["labels"] = _labels(answer, model, condition, pixels)
        return answer
    record = metadata.parse_record(text, "the image")
    found, note = _model_of(service, record)
    answer.fields["settings"] = _settings(record, found or model)
    answer.fields["controls"] = [
        _control(answer, found or model, control, service.limits) for control in record.request.controls
    ]
    begun = record.request.init_image
    answer.fields["init_image"] = None if begun is None else answer.part(encode_png(_pixels(begun, service.limits)))
    notes = [note] if note else []
    known = (found or model).bundle.manifest.conditions
    notes += [
        f"{control.condition} is left out: {(found or model).id} does not have it"
        for control in record.request.controls
        if control.condition not in known
    ]
    answer.fields["notes"] = notes
    return answer


def _model(model: "ServedModel") -> dict[str, Any]:
    told, manifest = model.describe(), model.bundle.manifest
    width, height = model.size
    names = ("id", "conditions", "extractors", "defaults", "backends", "precision")
    return {
        **{name: told[name] for name in names},
        "width": width,
        "height": height,
        "examples": [c for c in told["conditions"] if "image" in manifest.conditions[c]],
        "brushes": brushes_of(model),
    }


def _labels(answer: Answer, model: "ServedModel", condition: str, pixels: Pixels) -> int | None:
    """The part with the labels of a segmentation at the model's size; None where a color is none of the palette's."""
    if condition != "seg" or not brushes_of(model):
        return None
    labels, inexact = labels_from_colors(fit(pixels, *model.size, "stretch", "nearest"))
    return answer.part(labels.tobytes()) if not inexact else None


def _control(answer: Answer, model: "ServedModel", record: Any, limits: "Limits") -> dict[str, Any]:
    pixels = _pixels(record.image, limits)
    return {
        "condition": record.condition,
        "scale": record.controlnet_conditioning_scale,
        "start": record.control_guidance_start,
        "end": record.control_guidance_end,
        "image": answer.part(encode_png(pixels)),
        "labels": _labels(answer, model, record.condition, pixels),
    }


def _pixels(text: str, limits: "Limits") -> Pixels:
    pixels = metadata.image_from_base64(text)
    if pixels.shape[0] * pixels.shape[1] > limits.pixels:
        raise UserError("an image in the picture's record is larger than this server takes")
    return pixels


def _settings(record: "PictureRecord", model: "ServedModel") -> dict[str, Any]:
    """A record in the page's words. Seeds that do not follow each other leave the picture's own, for one image."""
    request = record.request
    seeds = [request.seed_of(i) for i in range(request.num_images_per_prompt)]
    follow = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    kept = {name: getattr(request, name) for name in Kept.__struct_fields__}
    return {
        "model": model.id,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "scheduler": request.scheduler,
        "strength": None if request.init_image is None else request.strength,
        "seed": str(seeds[0] if follow else seeds[record.image_index]),
        "images": len(seeds) if follow else 1,
        "kept": {name: value for name, value in kept.items() if value},
    }


def _model_of(service: "Service", record: "PictureRecord") -> tuple["ServedModel | None", str | None]:
    """The served model that drew a picture, or one like it, and what is to be said of the difference."""
    made = record.bundle
    for model in service.models.all:
        if model.bundle.digest == made.digest:
            return model, None
    shown = f"{printable(made.model, 80)} at {made.width}x{made.height}"
    for model in service.models.all:
        if model.bundle.manifest.model == made.model and model.size == (made.width, made.height):
            return model, f"it was drawn by another build of {shown}: the picture may differ"
    return None, f"it was drawn by {shown}, which is not served here: the picture will differ"


def _record_text(data: bytes) -> str | None:
    """The record in a PNG's texts; Pillow bounds them."""
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        image.load()
        found = image.info.get(metadata.CHUNK)
        return found if isinstance(found, str) else None
    return None
