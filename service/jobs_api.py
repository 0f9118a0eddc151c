"""Jobs: `/v1/jobs`, for clients that do not want to wait with an open connection."""

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..errors import CnppError
from .errors import Refusal
from .jobs import Job
from .openai_api import error_body
from .openai_fields import JobFields, asked_of, ignored_of, reply_of, size_of
from .reply import image_fields, images_reply, preview_of
from .schemas import json_body
from .service import Service
from .web import Call, answer


def jobs_routes(service: Service) -> APIRouter:
    """The routes of this interface."""
    router = APIRouter(tags=["Jobs"], prefix="/v1/jobs")

    @router.post("", status_code=202, openapi_extra=json_body("JobFields"))
    async def add(request: Request) -> Response:
        """Accepts a request, whose fields are those of `/v1/images/generations`."""
        call = Call(request, service, "jobs")
        fields = await call.json(JobFields)
        ignored, reply = ignored_of(fields), reply_of(fields)
        model = service.models.find(fields.model, size_of(fields.size))
        if service.log_prompts:
            call.log(prompt=fields.prompt)
        job = Job(
            await call.accept(model, partial(asked_of, fields, None, fields.preview), fields.timeout), model, reply
        )
        service.jobs.add(job)
        return answer(await _told(service, job), (*ignored, *(["stream"] if fields.stream else [])), 202)

    @router.get("/{id}")
    async def get(id: str) -> Response:
        """Where a job is: its place in the queue, its step, a preview, and in the end its images or its error."""
        return answer(await _told(service, service.jobs.get(id)))

    @router.delete("/{id}")
    async def delete(id: str) -> Response:
        """Cancels a job, at its next step where it runs, and forgets it."""
        job = service.jobs.remove(id)
        job.model.queue.wake()
        return answer({"id": id, "object": "job", "deleted": True, "status": job.task.state})

    return router


async def _told(service: Service, job: Job) -> dict[str, Any]:
    task, model = job.task, job.model
    state = task.state
    told: dict[str, Any] = {
        "id": task.id,
        "object": "job",
        "created": int(task.created),
        "model": model.id,
        "status": state,
        "queue_position": model.queue.position(task) if state == "queued" else None,
        "step": task.step,
        "steps": task.steps,
    }
    if state == "running" and task.order.preview:
        content = await service.in_thread(preview_of, model, task, 0, job.reply)
        told["preview"] = None if content is None else image_fields(content, job.reply)
    if state == "done":
        outcome = task.future.result()
        told["result"] = await service.in_thread(images_reply, model, outcome, job.reply, task.order.notes)
        job.fetched = True
    elif state in ("failed", "cancelled"):
        error = task.future.exception() or CnppError("the job failed")
        told["error"] = error_body(Refusal.of(error))["error"]
    return told
