"""A real server on loopback, in a thread, on the embedded miniature; and a pipeline that waits for the test."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline
from PIL import Image


class Held:
    """A pipeline whose requests stop at their first step until the test lets them go on."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.go_on = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[Any]] = []
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.pipeline(*arguments, **options)

    def batch(self, requests: Any, *, on_progress: Any, **options: Any) -> Any:
        self.batches.append(list(requests))

        def progress(done: int, total: int) -> None:
            if done == 1:
                self.entered.release()
                assert self.go_on.wait(120)
            self.steps += 1
            on_progress(done, total)

        return self.pipeline.batch(requests, on_progress=progress, **options)

    def wait_until_running(self) -> None:
        assert self.entered.acquire(timeout=60)


@dataclass
class Server:
    """A server that runs."""

    service: Any
    port: int
    client: Any
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Waits for what another thread does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    return until


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    """`serving(pipeline, …)`: a server of these pipelines, which stops with the test."""
    httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'cnpp-trt[test]'")
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")
    from cnpp_trt.service.app import create_app
    from cnpp_trt.service.limits import Limits
    from cnpp_trt.service.server import bind, make_server
    from cnpp_trt.service.service import Service

    running: list[tuple[Any, Any, threading.Thread, Any, Any]] = []

    def start(*pipelines: Any, warm: bool = False, app: dict[str, Any] | None = None, **limits: Any) -> Server:
        models = [p if isinstance(p, tuple) else (p.bundle.manifest.model, [p]) for p in pipelines]
        service = Service(models, Limits(**limits))
        options = {"access_log": False, **(app or {})}
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        server = make_server(create_app(service, **options), 5)
        service.start(warm=warm)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        until(lambda: server.started, "the server starts")
        running.append((service, server, thread, client, listener))
        return Server(service, port, client)

    yield start
    for service, server, thread, client, listener in running:
        client.close()
        service.stop()
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture
def mini(miniature: Any) -> Pipeline:
    pipeline: Pipeline = miniature.pipeline
    return pipeline


@pytest.fixture
def server(serving: Callable[..., Server], mini: Pipeline) -> Server:
    return serving(mini)


@pytest.fixture
def held(mini: Pipeline) -> Iterator[Held]:
    made = Held(mini)
    yield made
    made.go_on.set()


@pytest.fixture
def mask(mini: Pipeline) -> Path:
    """The label map of the miniature's example."""
    return mini.bundle.file(mini.bundle.manifest.conditions["seg"].get("image", ""))


def pixels_of(data: str | bytes) -> np.ndarray:
    """Of an image file's bytes, or their base64."""
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


@pytest.fixture(scope="session")
def pixels() -> Callable[[str | bytes], np.ndarray]:
    return pixels_of


@pytest.fixture
def drawn(mini: Pipeline, mask: Path) -> Callable[..., np.ndarray]:
    """`drawn(prompt, …)`: what the pipeline draws of the label map when it is called directly."""

    def draw(prompt: str, condition: str | None = "seg", **fields: Any) -> np.ndarray:
        controls = [] if condition is None else [Control(condition, mask)]
        return mini(prompt, controls, **fields).images

    return draw
