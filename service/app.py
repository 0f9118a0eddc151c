"""The application: every interface of the server on one scheduler."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from ..errors import CnppError
from ..messages import one_line, printable
from ..schema import Record, SchemaError
from ..versions import __version__
from . import a1111_api, openai_api
from .a1111_fields import ImageToImageFields, TextFields
from .controlnet_api import DetectFields, controlnet_routes
from .docs_page import docs_page
from .errors import Refusal
from .gate import Gate
from .jobs_api import jobs_routes
from .openai_fields import ImageFields, JobFields
from .schemas import components
from .service import Service
from .status_api import status_routes
from .web import ClientGone

logger = logging.getLogger(__name__)


class OptionFields(Record):
    """Settings of the web UI that mean something here. Unknown ones are refused by name."""

    sd_model_checkpoint: str | None = None
    CLIP_stop_at_last_layers: int | None = None
    sd_checkpoint_hash: str | None = None
    samples_format: str | None = None
    control_net_no_detectmap: bool | None = None


_BODIES = (ImageFields, JobFields, TextFields, ImageToImageFields, a1111_api.PngInfoFields, DetectFields, OptionFields)


def create_app(
    service: Service,
    *,
    token: str | None = None,
    origins: Sequence[str] = (),
    local: bool = False,
    access_log: bool = True,
    more: Sequence[APIRouter] = (),
) -> ASGIApp:
    """The application of a service, whose workers the caller starts and stops.

    Args:
        service: that draws.
        token, origins, local, access_log: as `Gate` takes them.
        more: routes of pages that stand on the service.
    """
    app = FastAPI(title="cnpp-trt", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    for routes in (
        openai_api.openai_routes(service),
        jobs_routes(service),
        a1111_api.a1111_routes(service),
        controlnet_routes(service),
        status_routes(service),
        *more,
    ):
        app.include_router(routes)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(document(app))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(document(app)))

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGone | ClientDisconnect):
            return Response(status_code=499)
        refusal = _refusal_of(error)
        if refusal.status == 500:
            trace = None if isinstance(error, CnppError) else error
            logger.error("%s failed: %s", request.url.path, one_line(error), exc_info=trace)
        body, headers = shape(request.url.path, refusal)
        return Response(body, refusal.status, headers)

    for kind in (CnppError, SchemaError, HTTPException, ClientGone, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Ignored-Fields", "Retry-After"],
        )
    return Gate(app, service, shape, token, origins, local, access_log)


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of all bodies."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title,
            version=app.version,
            routes=app.routes,
            description="Images that follow a condition: OpenAI's and AUTOMATIC1111's interfaces, and jobs.",
        )
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(components(_BODIES, {"ImageForm": (ImageFields, "image")}))
        app.openapi_schema = made
    return app.openapi_schema


def shape(path: str, refusal: Refusal) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an error, in the shape of the interface that the path belongs to."""
    theirs = path.startswith(("/sdapi/", "/controlnet/"))
    body = a1111_api.error_body(refusal) if theirs else openai_api.error_body(refusal)
    headers = {"content-type": "application/json"}
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["www-authenticate"] = (
            'Basic realm="cnpp-trt", Bearer realm="cnpp-trt"'  # browsers ask for the first one
        )
    if refusal.status == 504:
        headers["x-should-retry"] = "false"  # OpenAI's client would wait as long once more
    if refusal.status in (408, 413):
        headers["connection"] = "close"
    return json.dumps(body).encode(), headers


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, HTTPException):
        words = {404: "there is no such path: see /docs", 405: "the method is not allowed here: see /docs"}
        message = words.get(error.status_code) or printable(error.detail, 400)
        return Refusal(error.status_code, message, "not_found" if error.status_code == 404 else "invalid_request")
    return Refusal.of(error)
