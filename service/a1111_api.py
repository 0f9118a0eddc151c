"""AUTOMATIC1111's interface: `/sdapi/v1/…`."""

import io
import json
import time
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from ..errors import UserError
from ..runtime.generate import picture_records
from ..runtime.output import metadata
from ..runtime.sampling.scheduler_names import A1111
from ..runtime.sampling.schedulers import SCHEDULERS
from ..schema import Record
from ..versions import __version__
from .a1111_fields import ImageToImageFields, TextFields, ignored_of, scheduler_of, units_of
from .errors import Refusal, unknown_field
from .models import ServedModel
from .orders import Asked, decode, image_bytes
from .reply import Reply, base64_of, encode_images, preview_of, scores_of
from .schemas import json_body
from .service import Service
from .tasks import Outcome, Task
from .web import Call, answer

_API = "a1111"


class PngInfoFields(Record):
    """An image in base64."""

    image: str


class Settings:
    """The web UI's settings that mean something here; they are the same for all of its clients.

    Attributes:
        model: that requests use which name none.
        clip_skip: of the text encoder, 1 for its last layer.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.model = service.models.default
        self.clip_skip = 1

    def told(self) -> dict[str, Any]:
        """All of them, and what else clients look for, with the only value that it can have."""
        return {
            "sd_model_checkpoint": self.model.id,
            "sd_checkpoint_hash": self.model.digest,
            "CLIP_stop_at_last_layers": self.clip_skip,
            "samples_format": "png",
            "control_net_no_detectmap": True,
        }

    def changed(self, changes: dict[str, Any], where: str) -> tuple[ServedModel, int]:
        """The model and clip skip after changes.

        Raises:
            UserError, ServiceError: a setting is unknown, or its value cannot be had.
        """
        model, clip_skip = self.model, self.clip_skip
        for name, value in changes.items():
            if name == "sd_model_checkpoint":
                if value not in (None, ""):
                    model = self._service.models.find(str(value).partition(" [")[0])
            elif name == "CLIP_stop_at_last_layers":
                if not isinstance(value, int) or not 1 <= value <= 12:
                    raise UserError("CLIP_stop_at_last_layers must be a whole number from 1 to 12")
                clip_skip = value
            elif name not in self.told():
                raise unknown_field(name, where)
            elif name in ("samples_format", "control_net_no_detectmap") and value != self.told()[name]:
                raise UserError(f"{name} can only be {self.told()[name]}")
        return model, clip_skip


def a1111_routes(service: Service) -> APIRouter:
    """The routes of this interface."""
    router = APIRouter(tags=["AUTOMATIC1111"], prefix="/sdapi/v1")
    settings = Settings(service)

    @router.post("/txt2img", openapi_extra=json_body("TextFields"))
    async def txt2img(request: Request) -> Response:
        """Images of a prompt, and of the units of the ControlNet extension."""
        call = Call(request, service, _API)
        return await _images(call, settings, await call.json(TextFields))

    @router.post("/img2img", openapi_extra=json_body("ImageToImageFields"))
    async def img2img(request: Request) -> Response:
        """Images that begin with an image."""
        call = Call(request, service, _API)
        return await _images(call, settings, await call.json(ImageToImageFields))

    @router.get("/options")
    async def options() -> Response:
        """The settings that mean something here."""
        return answer(settings.told())

    @router.post("/options", openapi_extra=json_body("OptionFields"))
    async def set_options(request: Request) -> Response:
        """Changes settings, for every client of this interface."""
        call = Call(request, service, _API)
        settings.model, settings.clip_skip = settings.changed(await call.json(dict[str, Any]), "the options")
        return answer(None)

    @router.get("/sd-models")
    async def sd_models() -> Response:
        """The models that are served."""
        return answer([_listed(model) for model in service.models.all])

    @router.get("/samplers")
    async def samplers() -> Response:
        """The samplers, by their names in the web UI."""
        titles = dict.fromkeys(A1111[name][0] for name in SCHEDULERS)
        return answer([{"name": title, "aliases": [title.lower()], "options": {}} for title in titles])

    @router.get("/schedulers")
    async def schedulers() -> Response:
        """The schedule types."""
        types = [("automatic", "Automatic"), ("uniform", "Uniform"), ("karras", "Karras")]
        empty = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return answer([{"name": name, "label": label, **empty} for name, label in types])

    @router.get("/scripts")
    async def scripts() -> Response:
        """The scripts. `controlnet m2m` is how clients recognize the extension; as `script_name` it is refused."""
        return answer({"txt2img": ["controlnet", "controlnet m2m"], "img2img": ["controlnet", "controlnet m2m"]})

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> Response:
        """How far the oldest request of this interface is."""
        return answer(await _progress(service, not skip_current_image))

    @router.post("/interrupt")
    async def interrupt(request: Request) -> Response:
        """Ends what this client's address has running or waiting."""
        owner = Call(request, service, _API).owner
        for task in service.active:
            if task.owner == owner:
                task.cancel("the request was interrupted")
        for model in service.models.all:
            model.queue.wake()
        return answer({})

    @router.post("/png-info", openapi_extra=json_body("PngInfoFields"))
    async def png_info(request: Request) -> Response:
        """What a picture says of itself."""
        call = Call(request, service, _API)
        fields = await call.json(PngInfoFields)
        return answer(await service.in_thread(_png_info, service, fields.image))

    return router


def error_body(refusal: Refusal) -> dict[str, Any]:
    """An error in the web UI's shape."""
    return {"error": refusal.code, "detail": refusal.message, "body": "", "errors": refusal.message}


async def _images(call: Call, settings: Settings, fields: TextFields) -> Response:
    image_to_image = isinstance(fields, ImageToImageFields)
    ignored = ignored_of(fields, ("denoising_strength", "resize_mode") if image_to_image else ())
    if fields.sampler_name is None and fields.sampler_index is not None:
        ignored.remove("sampler_index")
    model, clip_skip = settings.changed(fields.override_settings or {}, "override_settings")
    size = (fields.width or model.size[0], fields.height or model.size[1])
    model = call.service.models.find(model.id if model.size == size else model.bundle.manifest.model, size)
    if call.service.log_prompts:
        call.log(prompt=fields.prompt)

    def read() -> Asked:
        asked, more = _asked(fields, clip_skip)
        ignored.extend(more)
        return asked

    task = await call.accept(model, read, fields.timeout)
    outcome = await call.outcome(task)
    content = await call.service.in_thread(_reply, model, fields, task, outcome)
    return answer(content, tuple(sorted(ignored)))


def _asked(fields: TextFields, clip_skip: int) -> tuple[Asked, list[str]]:
    """The request as the web UI understands it: emphasis, long prompts, and layers skipped for both prompts."""
    if fields.batch_size < 1 or fields.n_iter < 1:
        raise UserError("batch_size and n_iter must be whole numbers above 0")
    images = (fields.init_images or []) if isinstance(fields, ImageToImageFields) else []
    controls, guess, ignored = units_of(fields.alwayson_scripts or {}, images[0] if images else None)
    given: dict[str, Any] = {
        "prompt": fields.prompt,
        "negative_prompt": fields.negative_prompt,
        "num_images_per_prompt": fields.batch_size * fields.n_iter,
        "num_inference_steps": fields.steps,
        "guidance_scale": fields.cfg_scale,
        "scheduler": scheduler_of(fields.sampler_name or fields.sampler_index, fields.scheduler),
        "prompt_weights": True,
        "long_prompt": True,
        "clip_skip": clip_skip - 1,
        "clip_skip_negative": clip_skip > 1,
        "guess_mode": guess,
        "seed": None if fields.seed in (None, -1) else fields.seed,
    }
    begin, mode = None, "stretch"
    if isinstance(fields, ImageToImageFields):
        if len(images) != 1:
            raise UserError("init_images must hold one image in base64")
        begin = image_bytes(images[0], "init_images")
        modes = ("stretch", "crop", "pad")
        if fields.resize_mode not in (None, 0, 1, 2):
            raise UserError("resize_mode must be 0 (just resize), 1 (crop and resize) or 2 (resize and fill)")
        mode = modes[fields.resize_mode or 0]
        strength = fields.denoising_strength
        if strength is not None:
            given["strength"] = strength
    return Asked(controls, begin, mode, given, fields.score, preview=True), ignored  # for /progress


def _reply(model: ServedModel, fields: TextFields, task: Task, outcome: Outcome) -> dict[str, Any]:
    images = encode_images(model, outcome, Reply()) if fields.send_images else []
    left_out = ("alwayson_scripts", "init_images", "mask", "latent_mask")
    parameters = {name: getattr(fields, name) for name in fields.__struct_fields__ if name not in left_out}
    if isinstance(fields, ImageToImageFields) and fields.include_init_images:
        parameters["init_images"] = fields.init_images
    info = json.dumps(_info(model, fields, task, outcome))
    return {"images": [base64_of(image) for image in images], "parameters": parameters, "info": info}


def _info(model: ServedModel, fields: TextFields, task: Task, outcome: Outcome) -> dict[str, Any]:
    """As the web UI's `Processed.js`, with the scores and notes beside it."""
    request, n = outcome.result.request, len(outcome.result.images)
    texts = [metadata.a1111_parameters(record) for record in picture_records(model.pipelines[0], outcome.result)]
    width, height = model.size
    own: dict[str, Any] = {"notes": list(dict.fromkeys((*task.order.notes, *outcome.result.notes)))}
    if outcome.scores:
        own["scores"] = [scores_of(outcome, i, Reply()) for i in range(n)]
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * n,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * n,
        "seed": request.seeds[0],
        "all_seeds": list(request.seeds),
        "subseed": -1,
        "all_subseeds": [-1] * n,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": A1111[request.scheduler][0],
        "cfg_scale": request.guidance_scale,
        "steps": request.num_inference_steps,
        "batch_size": fields.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.id,
        "sd_model_hash": model.digest[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.init_image is not None else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(task.created)),
        "clip_skip": request.clip_skip + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"cnpp-trt {__version__}",
        **own,
    }


async def _progress(service: Service, picture: bool) -> dict[str, Any]:
    tasks = [task for task in service.active if task.owner[0] == _API]
    running = next((task for task in tasks if task.state == "running"), None)
    image = None
    if running is not None and picture and running.latents is not None:
        content = await service.in_thread(preview_of, service.models.find(running.model), running, 0, Reply())
        image = None if content is None else base64_of(content)
    done = running.step / running.steps if running is not None else 0.0
    spent = time.monotonic() - running.accepted if running is not None else 0.0
    return {
        "progress": done,
        "eta_relative": spent * (1 - done) / done if done else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": service.draining,
            "job": running.id if running is not None else "",
            "job_count": len(tasks),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(running.created)) if running else "0",
            "job_no": 0,
            "sampling_step": running.step if running is not None else 0,
            "sampling_steps": running.steps if running is not None else 0,
        },
        "current_image": image,
        "textinfo": None,
    }


def _listed(model: ServedModel) -> dict[str, Any]:
    digest = model.digest
    return {
        "title": model.id,
        "model_name": model.id,
        "hash": digest[:10],
        "sha256": digest,
        "filename": model.id,
        "config": None,
    }


def _png_info(service: Service, text: str) -> dict[str, Any]:
    data = image_bytes(text, "image")
    decode(data, "image", service.limits)  # bounded and whole, before Pillow reads its texts
    found: dict[str, str] = {}
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        image.load()
        found = {k: v for k, v in image.info.items() if isinstance(k, str) and isinstance(v, str)}
    parameters = found.pop(metadata.PARAMETERS, "")
    return {"info": parameters, "items": {metadata.PARAMETERS: parameters, **found}, "parameters": {}}
