"""The demo's server in a thread, on the embedded models, and a headless Chromium that looks at it."""

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Pipeline
from cnpp_trt.bundles.embedded import assemble

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A picture that moves, as if a camera saw it, and nobody asks whether the page may look.
_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
_COPY = (
    "img => { const c = document.createElement('canvas'); c.width = img.naturalWidth; c.height = img.naturalHeight; "
)
_PIXELS = _COPY + (
    "const x = c.getContext('2d'); x.drawImage(img, 0, 0); "
    "return [c.width, c.height, Array.from(x.getImageData(0, 0, c.width, c.height).data)]; }"
)
_DROP = (
    "([bytes, name]) => { const data = new DataTransfer(); "
    "data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'})); "
    "document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); }"
)


@dataclass
class Demo:
    """A server that runs, with a pipeline of its own for each model to compare with."""

    service: Any
    port: int
    few: Pipeline
    many: Pipeline

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/demo/"


class Page:
    """A page of Playwright's, and what tests do with it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.wrong: list[str] = []
        page.on("request", lambda request: self.hosts.add(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda line: self.wrong.append(line.text) if line.type == "error" else None)
        page.goto(url)
        self.settled(at_least=2)  # the first message asks for the example

    def settled(self, at_least: int = 1) -> int:
        """Waits until the newest request's picture is on the screen. Returns: its number."""
        asked: int
        end = time.monotonic() + 60
        while time.monotonic() < end:
            asked, shown, under_way, failed = self.page.evaluate(
                "[+document.body.dataset.asked || 0, +document.body.dataset.shown || 0, demoState.asked,"
                " !document.getElementById('error').hidden]"
            )
            assert asked < at_least or not failed, self.page.locator("#error").text_content()
            if asked >= at_least and shown == asked and not under_way:
                return asked
            time.sleep(0.02)
        raise AssertionError("no picture came")

    @property
    def asked(self) -> int:
        return int(self.page.evaluate("+document.body.dataset.asked || 0"))

    def after(self, action: Any) -> int:
        """Does what draws, and waits for the picture."""
        before = self.asked
        action()
        return self.settled(at_least=before + 1)

    def generate(self) -> None:
        self.after(lambda: self.page.locator("#generate").click())

    def pictures(self) -> np.ndarray:
        """What is on the screen, uint8 [B,H,W,3]."""
        images = self.page.locator("#images img")
        return np.stack([self.pixels(images.nth(i)) for i in range(images.count())])

    def row(self, title: str) -> np.ndarray:
        images = self.page.locator("#rows section", has=self.page.locator("h2", has_text=title)).locator("img")
        return np.stack([self.pixels(images.nth(i)) for i in range(images.count())])

    def pixels(self, image: Any) -> np.ndarray:
        width, height, data = image.evaluate(_PIXELS)
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]

    def canvas(self) -> np.ndarray:
        """The painted canvas as the browser has it, uint8 [H,W,3]."""
        width, height, data = self.page.evaluate(
            "[painting.w, painting.h, Array.from(painting.context.getImageData(0, 0, painting.w, painting.h).data)]"
        )
        found = np.array(data, np.uint8).reshape(height, width, 4)
        assert (found[..., 3] == 255).all()
        return found[..., :3]

    def labels(self) -> np.ndarray:
        width, height, data = self.page.evaluate("[painting.w, painting.h, Array.from(painting.labels)]")
        return np.array(data, np.uint8).reshape(height, width)

    def brush(self, name: str) -> None:
        self.page.locator("#brushes button", has_text=name).click()

    def stroke(self, *points: tuple[float, float], steps: int = 4) -> None:
        """A stroke through points in shares of the canvas."""
        self.page.locator("#canvas").scroll_into_view_if_needed()
        self.stroke_in(self.page.locator("#canvas").bounding_box(), *points, steps=steps)

    def stroke_in(self, box: Any, *points: tuple[float, float], steps: int) -> None:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=steps)
        self.page.mouse.up()

    def save(self, number: int = 0) -> bytes:
        with self.page.expect_download() as found:
            self.page.locator("#rows a", has_text="Save").nth(number).click()
        return Path(found.value.path()).read_bytes()

    def drop(self, content: bytes, name: str = "dropped.png") -> None:
        self.page.evaluate(_DROP, [list(content), name])

    def error(self) -> str:
        self.page.wait_for_selector("#error:not([hidden])")
        return str(self.page.locator("#error").text_content())


@contextmanager
def listening(service: Any, **options: Any) -> Iterator[int]:
    """A server of a service, in a thread. Yields: its port."""
    from cnpp_trt.demo.routes import demo_routes
    from cnpp_trt.service.app import create_app
    from cnpp_trt.service.server import bind, make_server

    listener = bind("127.0.0.1", 0)
    app = create_app(service, access_log=False, more=[demo_routes(service)], **options)
    server = make_server(app, 5, service.limits.body_bytes)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(30)
    listener.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[demo]'")
    pytest.importorskip("websockets", reason="websockets is not installed: pip install 'cnpp-trt[demo]'")
    from cnpp_trt.service.limits import Limits
    from cnpp_trt.service.service import Service

    folder = tmp_path_factory.mktemp("bundles")
    names = ("miniature-lcm", "miniature")
    for name in names:
        assemble(name, folder / name)
    service = Service([(name, [Pipeline.open(folder / name)]) for name in names], Limits(images=4, steps=120))
    service.start()
    pipelines = [Pipeline.open(folder / name) for name in names]
    with listening(service, local=True) as port:
        yield Demo(service, port, *pipelines)
        service.stop()


@pytest.fixture
def protected(demo: Demo) -> Iterator[str]:
    """The page's address on a server that asks for the token `secret`."""
    with listening(demo.service, token="secret") as port:
        yield f"http://127.0.0.1:{port}/demo/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser. Until it is closed, Playwright's event loop runs in this thread: no test of another file meets it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *_CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def visit(demo: Demo, chromium: Any) -> Iterator[Any]:
    """`visit(width)`: opens the page. What it logs as an error fails the test."""
    opened: list[tuple[Any, Page]] = []

    def open_page(width: int = 1280, height: int = 900) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height})
        page = Page(context.new_page(), demo.url)
        opened.append((context, page))
        return page

    yield open_page
    wrong = [line for _, page in opened for line in page.wrong]
    for context, _ in opened:
        context.close()
    assert not wrong
