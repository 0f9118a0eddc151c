"""What every interface does with a request of HTTP: reads it, waits for its task, and notices that the client left."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from ..messages import one_line
from ..schema import SchemaError, decode
from .errors import ServiceError
from .models import ServedModel
from .orders import Asked, make_order
from .service import Service
from .tasks import Outcome, Task

T = TypeVar("T")
MAX_PARTS = 64
"""Fields, and files, of a multipart form."""


class ClientGone(Exception):
    """Nobody reads the answer."""


@dataclass(frozen=True)
class Call:
    """A request of HTTP to an interface.

    Attributes:
        request: of Starlette's.
        service: that serves it.
        api: the interface: whose tasks its client may interrupt.
    """

    request: Request
    service: Service
    api: str

    @property
    def owner(self) -> tuple[str, str]:
        """The interface and the client's address."""
        client = self.request.client
        return self.api, client.host if client else ""

    def log(self, **fields: Any) -> None:
        """Adds to the line of the access log."""
        self.request.scope.setdefault("cnpp_trt.log", {}).update(fields)

    async def json(self, kind: type[T]) -> T:
        """The body as a record with closed keys.

        Raises:
            SchemaError: it is none.
            ServiceError: it is not declared as JSON: so no page of another origin can send it unasked.
        """
        declared = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await self.request.body()
        if declared != "application/json":
            raise ServiceError(
                415, "send the request as JSON, with `Content-Type: application/json`", code="unsupported_media_type"
            )
        return decode(body, kind)

    async def form(self) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
        """The fields of a multipart form, several values of one name as a list, and the bytes of its files.

        Raises:
            ServiceError: it is no form, or has too many parts.
        """
        declared = self.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared != "multipart/form-data":
            await self.request.body()
            raise ServiceError(415, "send the request as multipart/form-data", code="unsupported_media_type")
        fields: dict[str, Any] = {}
        files: dict[str, list[bytes]] = {}
        async with self.request.form(
            max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=self.service.limits.body_bytes
        ) as form:
            for key, value in form.multi_items():
                name, listed = key.removesuffix("[]"), key.endswith("[]")
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append(await value.read())
                elif name in fields:
                    before = fields[name]
                    fields[name] = [*(before if isinstance(before, list) else [before]), value]
                else:
                    fields[name] = [value] if listed else value
        return fields, files

    async def accept(self, model: ServedModel, read: Callable[[], Asked], timeout: float | None) -> Task:
        """Checks a request and gives it to the scheduler.

        Args:
            model: that draws it.
            read: what the client asks for, from its fields: decodes images, so it runs beside the event loop.
            timeout: see `Service.submit`.

        Raises:
            UserError, ServiceError: it is not accepted.
        """
        with self.service.place(model):
            order = await self.service.in_thread(lambda: make_order(model, read(), self.service.limits))
            task = self.service.submit(model, order, timeout, self.owner, placed=True)
        self.log(model=model.id, images=order.images, steps=order.steps)
        return task

    async def outcome(self, task: Task) -> Outcome:
        """Waits for a task.

        Raises:
            ClientGone: the client left; the task is cancelled.
            CnppError: the task failed.
        """
        waiting = asyncio.ensure_future(self.service.wait(task))
        gone = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ClientGone
            found = await waiting
        finally:
            gone.cancel()
            if not waiting.done():
                waiting.cancel()
        self.log(queue_seconds=round(found.waited, 4), batch=found.batch)
        return found

    async def _disconnected(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def from_form(fields: Mapping[str, Any], kind: type[T]) -> T:
    """A record of a form's fields, whose values are texts.

    Raises:
        SchemaError: a field is unknown, or its text is no value of its type.
    """
    try:
        return msgspec.convert(fields, kind, strict=False)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise SchemaError(one_line(e)) from None


def answer(content: Any, ignored: Sequence[str] = (), status: int = 200) -> Response:
    """JSON, with the fields that were understood and not used in a header."""
    return Response(msgspec.json.encode(content), status, ignored_header(ignored), "application/json")


def ignored_header(ignored: Sequence[str]) -> dict[str, str]:
    """The header that lists fields which change nothing; names may come from a client, headers are ASCII."""
    text = ", ".join(ignored).encode("ascii", "backslashreplace").decode("ascii")
    return {"X-Ignored-Fields": text} if text else {}
