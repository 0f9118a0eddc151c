"""The page's WebSocket and its files, without a browser: what is refused, and that a page leaves nothing behind."""

import asyncio
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cnpp_trt.demo import messages
from cnpp_trt.demo.messages import Draw, pack, read_message, unpack
from cnpp_trt.errors import CnppError
from cnpp_trt.schema import SchemaError

pytestmark = pytest.mark.slow

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[demo]'")
PAGE = Path(messages.__file__).parent / "page"
sync = pytest.importorskip("websockets.sync.client", reason="websockets is not installed: pip install 'cnpp-trt[demo]'")

from cnpp_trt.demo.visitor import Visitor, asked_of  # noqa: E402  # needs fastapi
from cnpp_trt.service.errors import Refusal  # noqa: E402
from cnpp_trt.service.orders import make_order  # noqa: E402


@pytest.fixture
def connect(demo: Any) -> Callable[..., Any]:
    return lambda **options: sync.connect(demo.url.replace("http", "ws") + "ws", max_size=None, **options)


def told(socket: Any) -> tuple[dict[str, Any], list[bytes]]:
    parts = unpack(socket.recv(timeout=60))
    return json.loads(parts[0]), parts


def ask(socket: Any, record: Any, *parts: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The answer that is no progress."""
    socket.send(pack([json.dumps(record).encode(), *parts]))
    while (answer := told(socket))[0]["type"] == "progress":
        pass
    return answer


def drawing(**fields: Any) -> dict[str, Any]:
    control = {"condition": "seg", "labels": 1}
    return {"type": "draw", "id": 1, "model": "miniature-lcm", "controls": [control], **fields}


def test_frames_are_read_back_and_damaged_ones_refused() -> None:
    parts = [b'{"type":"stop"}', b"", b"\0" * 1000]
    frame = pack(parts)
    assert unpack(frame) == parts
    assert frame[:4] == struct.pack("<I", 15)
    for wrong in (b"", b"\1", b"\1\0\0\0", frame[:-1], pack([b""] * 33), pack([b"[]"]), pack([b'{"type":"x"}'])):
        with pytest.raises(SchemaError):
            read_message(wrong)


def test_damaged_frames_are_refused_in_one_line(demo: Any) -> None:
    rng = random.Random(3)
    model, refused = demo.service.models.default, 0
    whole = pack([json.dumps(drawing(steps=4, kept={"clip_skip": 1})).encode(), b"\2" * 128 * 128])
    for _ in range(2000):
        frame = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(frame), 260))
            frame[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        try:
            message, parts = read_message(bytes(frame))
            if isinstance(message, Draw):
                make_order(model, asked_of(model, message, parts), demo.service.limits)
        except (CnppError, SchemaError) as e:
            refused += 1
            assert "\n" not in Refusal.of(e).message
    assert 1000 < refused < 2000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"controls": [{"condition": "seg", "labels": 2}]}, "part of the message is missing"),
        ({"controls": [{"condition": "seg"}]}, "seg has no image"),
        ({"controls": [{"condition": "cany", "image": 1}]}, "cany"),
        ({"controls": [{"condition": "seg", "image": 1}]}, "image of seg"),
        ({"model": "sd15"}, "no model 'sd15'"),
        ({"seed": "-1"}, "seed must be"),
        ({"seed": "9" * 20}, "seed must be"),
        ({"init_image": 2}, "part of the message is missing"),
        ({"strength": 0.5}, "give an image to begin with"),
        ({"compare": "sd15"}, "no model 'sd15'"),
        ({"steps": 2.5}, "num_inference_steps must be"),
        ({"images": 5}, "must be from 1 to 4"),
        ({"steps": 121, "scheduler": "ddim"}, "at most 120"),
        ({"scheduler": "x"}, "scheduler"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(connect: Any, fields: dict[str, Any], words: str) -> None:
    with connect() as socket:
        assert told(socket)[0]["type"] == "hello"
        answer, _ = ask(socket, drawing(**fields), b"\2" * 128 * 128)
        assert answer["type"] == "error"
        assert answer["id"] == 1
        assert words in answer["message"]
        assert "\n" not in answer["message"]
        assert ask(socket, drawing(id=2), b"\2" * 128 * 128)[0]["type"] == "done"


@pytest.mark.parametrize("labels", [b"\2" * 100, b"\xfe" * 128 * 128])
def test_labels_of_another_size_or_of_no_class_are_refused(connect: Any, labels: bytes) -> None:
    with connect() as socket:
        told(socket)
        assert ask(socket, drawing(), labels)[0]["type"] == "error"


@pytest.mark.parametrize("frame", [b"", b"\xff" * 10, pack([b"{}"]), pack([b'{"type":"draw","id":1}']), "text"])
def test_a_frame_that_cannot_be_read_is_answered_or_ends_its_own_connection(connect: Any, frame: Any) -> None:
    with connect() as socket:
        told(socket)
        socket.send(frame)
        if isinstance(frame, bytes):
            assert told(socket)[0]["type"] == "error"
    with connect() as socket:
        assert told(socket)[0]["type"] == "hello"


def test_a_new_request_takes_the_place_of_the_one_under_way(demo: Any, connect: Any) -> None:
    with connect() as socket:
        told(socket)
        slow = drawing(model="miniature", steps=100, images=4, scheduler="ddim")
        for i in range(10):
            socket.send(pack([json.dumps({**slow, "id": i}).encode(), b"\2" * 128 * 128]))
        answer, _ = ask(socket, drawing(id=99), b"\2" * 128 * 128)
        assert (answer["type"], answer["id"]) == ("done", 99)
    assert demo.service.idle


@pytest.mark.parametrize("turns", range(4))
def test_a_picture_is_given_up_even_as_it_makes_a_step(turns: int) -> None:
    """The step is told so many turns of the event loop before the next request comes."""
    listeners: list[Any] = []
    task: Any = SimpleNamespace(ended=False, state="running", step=1, steps=9, order=SimpleNamespace(preview=False))
    task.listen, task.expire = listeners.append, lambda: None
    socket: Any = SimpleNamespace(client=None, send_bytes=lambda frame: asyncio.sleep(0))

    any_: Any = None

    async def given_up() -> bool:
        following = asyncio.create_task(Visitor(socket, any_)._follow(1, any_, task))
        await asyncio.sleep(0.05)
        listeners[0](task)
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait([following], timeout=1)
        task.ended = True
        return following.cancelled()

    assert asyncio.run(given_up())


def test_a_page_that_is_closed_leaves_nothing_running(demo: Any, connect: Any) -> None:
    with connect() as socket:
        told(socket)
        record = drawing(model="miniature", steps=120, images=4, scheduler="ddim")
        socket.send(pack([json.dumps(record).encode(), b"\2" * 128 * 128]))
        assert told(socket)[0]["type"] == "progress"
    end = time.monotonic() + 20
    while not demo.service.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert demo.service.idle


def test_more_pages_than_there_may_be_are_told_to_come_later(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnpp_trt.demo import routes
    from websockets.exceptions import ConnectionClosed

    monkeypatch.setattr(routes, "MAX_PAGES", 1)
    with connect() as first:
        told(first)
        with connect() as second, pytest.raises(ConnectionClosed) as closed:
            told(second)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013


def test_pages_of_other_origins_are_refused(demo: Any, connect: Any) -> None:
    from websockets.exceptions import InvalidStatus

    own = f"http://127.0.0.1:{demo.port}"
    with connect(origin=own) as socket:
        assert told(socket)[0]["type"] == "hello"
    for options in ({"origin": "http://example.org"}, {"additional_headers": {"Host": "example.org"}}):
        with pytest.raises((InvalidStatus, ValueError)):
            connect(**options)


def test_a_compared_model_draws_the_same_request_with_its_own_steps(demo: Any, connect: Any) -> None:
    import io

    from cnpp_trt import Control
    from cnpp_trt.runtime.control.palette import colors_from_labels
    from PIL import Image

    labels = np.full((128, 128), 2, np.uint8)
    labels[64:] = 9
    control = Control("seg", colors_from_labels(labels))
    with connect() as socket:
        told(socket)
        asked = drawing(compare="miniature", steps=3, prompt="a meadow", seed="5", images=2)
        answer, parts = ask(socket, asked, labels.tobytes())
    compared = answer["compared"]
    assert (answer["model"], compared["model"]) == ("miniature-lcm", "miniature")
    few = demo.few("a meadow", control, seed=5, num_inference_steps=3, num_images_per_prompt=2)
    many = demo.many("a meadow", control, seed=5, num_images_per_prompt=2)
    for expected, numbers in ((few, answer["images"]), (many, compared["images"])):
        drawn = [np.asarray(Image.open(io.BytesIO(parts[number]))) for number in numbers]
        assert (np.stack(drawn) == expected.images).all()
    scores = [str(demo.many.score("seg", control.image, image)) for image in many.images]
    assert [score["text"] for score in compared["controls"][0]["scores"]] == scores


def test_nothing_but_the_page_s_own_files_is_sent(demo: Any) -> None:
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    with httpx.Client(base_url=f"http://127.0.0.1:{demo.port}", trust_env=False) as client:
        root = client.get("/", follow_redirects=True)
        assert root.url.path == "/demo/"
        assert "default-src 'none'" in root.headers["content-security-policy"]
        assert client.get("/demo/main.js").headers["content-type"].startswith("text/javascript")
        for path in ("/demo/x", "/demo/..%2froutes.py", "/demo/%2e%2e/routes.py", "/demo/page"):
            assert client.get(path).status_code == 404
        for name in [file.name for file in PAGE.iterdir() if file.suffix != ".svg"]:
            assert "://" not in client.get(f"/demo/{name}").text.replace("http://www.w3.org/2000/svg", "")


def test_a_token_is_asked_for(demo: Any) -> None:
    """By the page's files and by its WebSocket alike."""
    testclient = pytest.importorskip("starlette.testclient", reason="starlette is not installed")
    from cnpp_trt.demo.routes import demo_routes
    from cnpp_trt.service.app import create_app
    from starlette.websockets import WebSocketDisconnect

    app = create_app(demo.service, token="secret", more=[demo_routes(demo.service)], access_log=False)
    client = testclient.TestClient(app)
    assert client.get("/demo/").status_code == 401
    assert client.get("/demo/", auth=("anyone", "secret")).status_code == 200
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/demo/ws"):
        pass
    allowed = {"Authorization": "Bearer secret"}
    with client.websocket_connect("/demo/ws", headers=allowed) as socket:
        assert json.loads(unpack(socket.receive_bytes())[0])["type"] == "hello"
