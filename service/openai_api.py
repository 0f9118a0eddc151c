"""OpenAI's image interface: `/v1/images/generations` and `/v1/images/edits`, also as a stream of events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .errors import Refusal, ServiceError, refused_field, unknown_field
from .models import ServedModel
from .openai_fields import ImageFields, asked_of, ignored_of, reply_of, size_of
from .reply import Reply, encode_images, image_fields, images_reply, preview_of, scores_of
from .schemas import form_body, json_body
from .service import Service
from .tasks import Task
from .web import Call, answer, from_form, ignored_header

_QUIET = 15.0
"""Seconds after which a stream that has nothing to tell says so, lest somebody in between closes it."""
_NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


def openai_routes(service: Service) -> APIRouter:
    """The routes of this interface."""
    router = APIRouter(tags=["OpenAI images"])

    @router.post("/v1/images/generations", openapi_extra=json_body("ImageFields"))
    async def generate(request: Request) -> Response:
        """Images of a prompt, and of control images in base64."""
        call = Call(request, service, "openai")
        return await _images(call, await call.json(ImageFields), None, "image_generation")

    @router.post("/v1/images/edits", openapi_extra=form_body("ImageForm"))
    async def edit(request: Request) -> Response:
        """Images of a control image (with `condition`), or that begin with an image, as a multipart form."""
        call = Call(request, service, "openai")
        fields, files = await call.form()
        images = files.pop("image", [])
        for name in files:
            if name not in ImageFields.__struct_fields__:
                raise unknown_field(name, "the form")
            if name not in ("mask", "markup"):
                raise refused_field(name, "is a text, not a file: images go as image, or in base64")
            fields[name] = "a file"  # is refused with the reason
        parsed = from_form(fields, ImageFields)
        if not images and parsed.controls is None and parsed.control_image is None and parsed.init_image is None:
            raise ServiceError(400, "image is missing: send it as a file", code="invalid_request", param="image")
        return await _images(call, parsed, images, "image_edit")

    return router


async def _images(call: Call, fields: ImageFields, files: list[bytes] | None, event: str) -> Response:
    service = call.service
    ignored = ignored_of(fields)
    reply = reply_of(fields)
    model = service.models.find(fields.model, size_of(fields.size))
    previews = fields.partial_images or 0 if fields.stream else 0
    if service.log_prompts:
        call.log(prompt=fields.prompt)
    task = await call.accept(model, partial(asked_of, fields, files, previews > 0), fields.timeout)
    if fields.stream:
        headers = {"Cache-Control": "no-store", **ignored_header(ignored)}
        stream = _events(call, model, task, reply, previews, event)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    outcome = await call.outcome(task)
    return answer(await service.in_thread(images_reply, model, outcome, reply, task.order.notes), ignored)


async def _events(
    call: Call, model: ServedModel, task: Task, reply: Reply, previews: int, event: str
) -> AsyncIterator[bytes]:
    """Pictures at so many steps on the way, then each image; an error as an event of its own."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def tell(_: Task) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    task.listen(tell)
    due = [round(task.steps * (i + 1) / (previews + 1)) for i in range(previews)]
    shown = 0
    common: dict[str, Any] = {
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": reply.format,
        "quality": "auto",
        "size": "{}x{}".format(*model.size),
    }
    try:
        while not task.ended:
            left = min(_QUIET, task.deadline - time.monotonic() + 0.01)
            try:
                async with asyncio.timeout(max(left, 0.01)):
                    await changed.wait()
            except TimeoutError:
                task.expire()
                yield b": waiting\n\n"
            changed.clear()
            while shown < len(due) and task.step >= due[shown] and not task.ended:
                content = await call.service.in_thread(preview_of, model, task, 0, reply)
                if content is not None:
                    fields = {**common, **image_fields(content, Reply(reply.format)), "partial_image_index": shown}
                    yield _event(f"{event}.partial_image", fields)
                shown += 1
        outcome = await call.service.wait(task)
        seeds = outcome.result.request.seeds
        for i, content in enumerate(await call.service.in_thread(encode_images, model, outcome, reply)):
            fields = {**common, **image_fields(content, Reply(reply.format)), "usage": _NO_USAGE, "seed": seeds[i]}
            if outcome.scores:
                fields["scores"] = scores_of(outcome, i, reply)
            yield _event(f"{event}.completed", fields)
    except Exception as e:
        yield _event("error", {"error": error_body(Refusal.of(e))["error"]})
    finally:
        with suppress(Exception):
            task.cancel("the client went away")


def error_body(refusal: Refusal) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    if refusal.status == 429:
        kind = "rate_limit_error"
    if refusal.status == 401:
        kind = "authentication_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
