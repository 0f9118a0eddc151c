"""The interface of the ControlNet extension for AUTOMATIC1111's web UI: `/controlnet/…`."""

from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..conditions import CONDITIONS
from ..errors import UserError
from ..runtime.control.extraction import can_extract
from ..runtime.images.image_files import WHITE
from ..runtime.images.png_files import encode_png
from ..schema import Record
from .a1111_fields import condition_of
from .models import ServedModel
from .orders import decode, image_bytes
from .reply import base64_of
from .schemas import json_body
from .service import Service
from .web import Call, answer

_VERSION = 3
"""Of the extension's interface."""


class DetectFields(Record):
    """Photos from which a condition is extracted; masks and thresholds change nothing."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str] | None = None
    controlnet_images: list[str] | None = None
    controlnet_masks: Any = None
    controlnet_processor_res: Any = None
    controlnet_threshold_a: Any = None
    controlnet_threshold_b: Any = None
    low_vram: Any = None


def controlnet_routes(service: Service) -> APIRouter:
    """The routes of this interface."""
    router = APIRouter(tags=["ControlNet extension"], prefix="/controlnet")
    # An extraction waits in a thread until the pipeline is between two batches: they must not take all threads.
    few = CapacityLimiter(2)

    def models() -> list[str]:
        there = {c for model in service.models.all for c in model.bundle.manifest.conditions}
        return [c for c in CONDITIONS if c in there]

    def modules() -> list[str]:
        return ["none", *(c for c in models() if any(can_extract(m.bundle, c) for m in service.models.all))]

    @router.get("/version")
    async def version() -> Response:
        """Of the extension's interface."""
        return answer({"version": _VERSION})

    @router.get("/model_list")
    async def model_list(update: bool = True) -> Response:
        """The conditions, by which a unit's `model` names its ControlNet."""
        return answer({"model_list": models()})

    @router.get("/module_list")
    async def module_list(alias_names: bool = False) -> Response:
        """The conditions that can be extracted, by which a unit's `module` names the extractor."""
        return answer({"module_list": modules(), "module_detail": {}})

    @router.get("/control_types")
    async def control_types() -> Response:
        """For each condition, its module and its model."""
        types: dict[str, Any] = {
            "All": {
                "module_list": modules(),
                "model_list": ["None", *models()],
                "default_option": "none",
                "default_model": "None",
            }
        }
        for condition in models():
            module = condition if condition in modules() else "none"
            types[CONDITIONS[condition].title] = {
                "module_list": list(dict.fromkeys(["none", module])),
                "model_list": ["None", condition],
                "default_option": module,
                "default_model": condition,
            }
        return answer({"control_types": types})

    @router.get("/settings")
    async def settings() -> Response:
        """How many units a request may have."""
        return answer({"control_net_unit_count": 3})

    @router.post("/detect", openapi_extra=json_body("DetectFields"))
    async def detect(request: Request) -> Response:
        """Control images of photos."""
        call = Call(request, service, "a1111")
        fields = await call.json(DetectFields)
        images = fields.controlnet_input_images or fields.controlnet_images or []
        if not 1 <= len(images) <= service.limits.images:
            raise UserError(f"controlnet_input_images must hold 1 to {service.limits.images} images in base64")
        condition = condition_of(fields.controlnet_module, "controlnet_module")
        model = next((m for m in service.models.all if can_extract(m.bundle, condition)), None)
        if model is None or condition not in models():
            raise UserError(f"controlnet_module: no model that is served extracts {condition!r}")
        service.require_room(model)
        names = ("controlnet_masks", "controlnet_processor_res", "controlnet_threshold_a", "controlnet_threshold_b")
        ignored = tuple(n for n in (*names, "low_vram") if getattr(fields, n) is not None)
        work = [partial(_extract, service, model, condition, image) for image in images]
        found = [await to_thread.run_sync(each, limiter=few) for each in work]
        return answer({"images": found, "info": "Success"}, ignored)

    return router


def _extract(service: Service, model: ServedModel, condition: str, text: str) -> str:
    pixels, _ = decode(image_bytes(text, "controlnet_input_images"), "controlnet_input_images", service.limits, WHITE)
    return base64_of(encode_png(model.pipelines[0].extract(condition, pixels)))
