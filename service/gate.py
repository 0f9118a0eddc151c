"""What stands before every interface: who may call, how much and how long a client may send, and the access log."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Refusal, ServiceError
from .limits import Limits
from .service import Service

logger = logging.getLogger(__name__)

_OPEN = ("/healthz", "/readyz")
"""Answered without a token: who watches over the process has none."""


_BODIES = 32
"""Of the largest size, that are held at a time."""


class Gate:
    """The outermost layer of the application.

    Args:
        app: what it protects.
        service: whose limits hold.
        shape: the body and the headers of an error, for a path.
        token: that clients must send as `Bearer`, or as the password of Basic; None: everybody may call.
        origins: of pages, besides its own, that may call; `*` is all of them.
        local: whether the server listens on this machine alone: then only names of this machine are taken, so that
            no page reaches it by a name of its own.
        access_log: whether each request is logged, as one line of JSON.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        shape: Callable[[str, Refusal], tuple[bytes, dict[str, str]]],
        token: str | None = None,
        origins: Sequence[str] = (),
        local: bool = False,
        access_log: bool = True,
    ) -> None:
        self._app = app
        self._service = service
        self._shape = shape
        self._token = None if token is None else _digest(token)
        self._origins = tuple(origins)
        self._local = local
        self._access_log = access_log
        self._held = _Held(self._service.limits.body_bytes * _BODIES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began, answered = time.monotonic(), _Answer(send)
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in reversed(scope["headers"])}
        if scope["type"] == "websocket":
            try:
                self._require_allowed({**scope, "method": "GET"}, headers)
            except ServiceError:
                await send({"type": "websocket.close", "code": 1008})  # before it is accepted: a 403
                return
            await self._app(scope, receive, send)
            return
        try:
            try:
                self._require_allowed(scope, headers)
                body = _Body(receive, self._service.limits, headers, self._held)
            except ServiceError as e:
                await self._refuse(scope, answered, e)
                return
            try:
                await self._app(scope, body, answered)
            except Exception:  # it was logged where it was told to the client
                if not answered.status:
                    raise
            finally:
                body.forget()
        finally:
            self._tell(scope, answered, time.monotonic() - began)

    def _require_allowed(self, scope: Scope, headers: dict[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and not _is_here(host):
            raise ServiceError(
                403, "this server listens on its own machine alone: call it by 127.0.0.1 or localhost", code="forbidden"
            )
        if origin is not None and "*" not in self._origins and origin not in self._origins:
            own = origin.partition("://")[2]
            if own.lower() != host.lower():
                raise ServiceError(403, "pages of this origin may not call: see --cors-origin", code="forbidden")
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if self._token is None or scope["path"] in _OPEN or preflight:
            return
        if not hmac.compare_digest(_digest(_credential(headers.get("authorization", ""))), self._token):
            raise ServiceError(401, "the token is missing or wrong: send it as a bearer token", code="unauthorized")

    async def _refuse(self, scope: Scope, answered: "_Answer", error: ServiceError) -> None:
        body, headers = self._shape(scope["path"], Refusal.of(error))
        headers["connection"] = "close"  # what it still sends is not read
        raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await answered({"type": "http.response.start", "status": error.status, "headers": raw})
        await answered({"type": "http.response.body", "body": body})

    def _tell(self, scope: Scope, answered: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = answered.status or 499  # nobody waited for the answer
        self._service.metrics.request(route, status, seconds)
        if not self._access_log or scope["path"] in (*_OPEN, "/metrics"):
            return
        client = scope.get("client")
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
            **scope.get("cnpp_trt.log", {}),
        }
        logger.info("%s", json.dumps(line))


@dataclass
class _Held:
    """Bytes of the bodies of all requests that have not ended, and how many there may be."""

    limit: int
    nbytes: int = 0


class _Answer:
    """Passes an answer on, and remembers its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class _Body:
    """Passes a body on, up to a size and for so many seconds.

    Raises:
        ServiceError: it is declared to be larger (413).
    """

    def __init__(self, receive: Receive, limits: Limits, headers: dict[str, str], held: "_Held") -> None:
        self._receive: Callable[[], Awaitable[Message]] = receive
        self._limit = self._left = limits.body_bytes
        self._until = time.monotonic() + limits.body_seconds
        self._held = held
        self._whole = False
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self._limit:
            raise self._too_large()

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(self._until - time.monotonic(), 0.001)):
                message = await self._receive()
        except TimeoutError:
            raise ServiceError(408, "the request did not come whole in time", code="timeout") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._left -= size
            self._held.nbytes += size
            if self._left < 0:
                raise self._too_large()
            if self._held.nbytes > self._held.limit:
                raise ServiceError(503, "too much is being sent at once: try again later", code="busy", retry_after=2)
            self._whole = not message.get("more_body", False)
        return message

    def forget(self) -> None:
        """The request has ended, and with it what was kept of its body."""
        self._held.nbytes -= self._limit - self._left
        self._left = self._limit

    def _too_large(self) -> ServiceError:
        return ServiceError(413, f"the request has more than {self._limit:,} bytes: send less", code="too_large")


def _digest(token: str) -> bytes:
    """Of one length for every token, so that comparing two tells nothing of theirs."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _credential(header: str) -> str:
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _is_here(host: str) -> bool:
    """Whether a `Host` header names this machine: an address, or `localhost`."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() in ("localhost", ""):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower().endswith(".localhost")
    return True
