"""`/demo/`: the page, its files and its WebSocket, as routes of the service's application."""

from pathlib import Path
from typing import TYPE_CHECKING

import websockets  # noqa: F401  # uvicorn imports it late: what is missing is to be told before
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.websockets import WebSocket

from .visitor import Visitor

if TYPE_CHECKING:
    from ..service.service import Service

PATH = "/demo/"
MAX_PAGES = 256
"""That are open at a time."""
_PAGE = Path(__file__).parent / "page"
_KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # The browser itself refuses whatever would come from elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def demo_routes(service: "Service") -> APIRouter:
    """The routes of the demo."""
    router = APIRouter(include_in_schema=False)
    open_pages = 0
    files = {file.name: file for file in _PAGE.iterdir() if file.suffix in _KINDS}

    @router.get("/")
    async def root(request: Request) -> Response:
        return RedirectResponse(PATH.removeprefix("/"))  # relative, so that it also holds behind a proxy's prefix

    @router.get(PATH)
    async def page() -> Response:
        return _file(files["index.html"])

    @router.get(PATH + "{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _file(files[name])

    @router.websocket(PATH + "ws")
    async def socket(socket: WebSocket) -> None:
        nonlocal open_pages
        if open_pages >= MAX_PAGES:
            await socket.accept()
            await socket.close(1013)  # the page tries again later
            return
        open_pages += 1
        try:
            await Visitor(socket, service).run()
        finally:
            open_pages -= 1

    return router


def _file(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=_KINDS[path.suffix], headers=_HEADERS)
