"""The process of `cnpp-trt serve`: uvicorn with bounds on what a client may keep open, and an orderly end."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import APIRouter
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UserError
from ..interrupts import handled_by
from .app import create_app
from .service import Service

logger = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.001
"""After which a thread must let others run Python; by default 5 ms, and an answer takes several turns."""
_HEADER_SECONDS = 20.0
"""That a client may take for the head of a request."""


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and who may call.

    Attributes:
        host, port: of the socket; port 0 takes a free one.
        token: see `Gate`.
        origins: see `Gate`.
        drain: seconds that accepted requests may take after SIGTERM.
        access_log: whether each request is logged.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    origins: Sequence[str] = ()
    drain: float = 30.0
    access_log: bool = True

    @property
    def local(self) -> bool:
        """Whether it can be reached from this machine alone."""
        return self.host in ("127.0.0.1", "::1", "localhost")


class _Protocol(H11Protocol):
    """Closes a connection whose client does not finish the head of a request."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)
        elif not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.transport.get_protocol() is not self:  # it has become a WebSocket
            return
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to us: it would close its doors at once, while jobs are still to be fetched."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, listener: socket.socket, options: ServerOptions, more: Sequence[APIRouter] = ()) -> None:
    """Serves on a socket, which `bind` made, until SIGTERM or SIGINT, then finishes what was accepted.

    Args:
        service: that draws.
        listener: the socket.
        options: who may call.
        more: routes of pages that stand on the service; they may open WebSockets.
    """
    app = create_app(
        service,
        token=options.token,
        origins=options.origins,
        local=options.local and options.token is None,
        access_log=options.access_log,
        more=more,
    )
    server = make_server(app, options.drain, service.limits.body_bytes if more else None)
    # It would tell on stderr what is wrong with each form, beside the answer to its client.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    # While another thread computes in Python, the event loop waits that long each time before it can go on.
    sys.setswitchinterval(_SWITCH_SECONDS)
    # A handler may come in the middle of anything: it only notes the signal, the event loop does the rest.
    signals: list[int] = []
    with handled_by(signals.append):
        service.start()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(model.id for model in service.models.all)
        logger.info("serving %s at http://%s:%d (its interfaces: /docs)", names, shown, port)
        try:
            asyncio.run(_run(server, listener, service, signals, options.drain))
        finally:
            ended = service.stop()
    logger.info("stopped")
    if not ended:
        os._exit(1)  # a thread in native code would keep the process


def make_server(app: ASGIApp, drain: float, frame_bytes: int | None = None) -> uvicorn.Server:
    """uvicorn's server of an application, which takes no signals.

    Args:
        app: that `create_app` made.
        drain: seconds that open requests may take once it is told to stop.
        frame_bytes: of a WebSocket's message, at most; None: there are no WebSockets.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        loop="asyncio",
        ws="none" if frame_bytes is None else "websockets-sansio",
        ws_max_size=frame_bytes or 0,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(drain)),
    )
    return _Server(config)


async def _run(
    server: uvicorn.Server, listener: socket.socket, service: Service, signals: list[int], drain: float
) -> None:
    running = asyncio.ensure_future(server.serve([listener]))
    while not signals and not running.done():
        await asyncio.sleep(0.05)
    service.drain()
    logger.info("stopping: %d requests are finished first, %g s at most", len(service.active), drain)
    # Native code may hold a worker for longer than that; the process ends all the same.
    last = threading.Timer(drain + 10, os._exit, (1,))
    last.daemon = True
    last.start()
    until = time.monotonic() + drain
    # Doors stay open while there is something to fetch; whoever comes with something new is told to go elsewhere.
    while not running.done() and len(signals) < 2 and time.monotonic() < until:
        if service.idle and not service.jobs.unfetched:
            break
        await asyncio.sleep(0.05)
    for task in service.active:
        task.cancel("the server was stopped: its time to finish is over")
    server.should_exit = True
    while not running.done():
        server.force_exit = server.force_exit or len(signals) > 1
        await asyncio.sleep(0.02)
    await running
    last.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Only where the protocol is named does asyncio send small packets at once: else an answer waits for 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as e:
        reason = e.strerror or str(e)
        raise UserError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from None
    listener.setblocking(False)
    return listener
