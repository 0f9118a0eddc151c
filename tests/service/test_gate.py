"""Who may call, how much a client may send, and what the access log tells."""

import base64
import io
import json
import logging
import socket
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Pipeline
from PIL import Image

pytestmark = pytest.mark.slow

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")
DRAW = {"prompt": "a house", "num_inference_steps": 1}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("Basic " + base64.b64encode(b"anyone:secret").decode(), 200),
        ("Bearer secre", 401),
        ("Bearer secrets", 401),
        ("Bearer", 401),
        ("Basic " + base64.b64encode(b"secret").decode(), 401),
        ("Basic %%%", 401),
        ("secret", 401),
        ("", 401),
        (None, 401),
    ],
)
def test_a_token(serving: Any, mini: Pipeline, header: str | None, status: int) -> None:
    server = serving(mini, app={"token": "secret"})
    headers = {} if header is None else {"authorization": header}
    answer = server.client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["type"] == "authentication_error"
        assert "Bearer" in answer.headers["www-authenticate"]
        theirs = server.client.post("/sdapi/v1/txt2img", json={}, headers=headers)
        assert theirs.status_code == 401 and "token" in theirs.json()["detail"]
    assert server.client.get("/docs", headers=headers).status_code == status
    # Whoever watches over the process has no token.
    assert server.client.get("/healthz").status_code == 200


def test_tokens_are_compared_in_constant_time(serving: Any, mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append((len(a), len(b))), real(a, b))[1])
    server = serving(mini, app={"token": "secret"})
    for token in ("s", "secret", "x" * 1000):
        server.client.get("/v1/models", headers={"authorization": f"Bearer {token}"})
    assert set(compared) == {(32, 32)}


def test_a_body_that_is_too_large(serving: Any, mini: Pipeline) -> None:
    server = serving(mini, body_bytes=10_000)
    answer = server.client.post("/v1/images/generations", json={**DRAW, "negative_prompt": "x" * 20_000})
    assert answer.status_code == 413 and "10,000 bytes" in answer.json()["error"]["message"]

    def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(1000):
            yield b"x" * 1000

    for path, kind in (
        ("/v1/images/generations", "application/json"),
        ("/v1/images/edits", "multipart/form-data; boundary=x"),
    ):
        answer = server.client.post(path, content=chunks(), headers={"content-type": kind})
        assert answer.status_code == 413
    answer = server.client.post("/v1/images/edits", data=DRAW, files={"image": ("a.png", b"x" * 20_000)})
    assert answer.status_code == 413
    assert server.client.post("/v1/images/generations", json=DRAW).status_code == 200


def test_a_declared_gigabyte_is_refused_before_it_is_sent(serving: Any, mini: Pipeline) -> None:
    server = serving(mini)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n{"
        )
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come(serving: Any, mini: Pipeline) -> None:
    server = serving(mini, body_seconds=0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
    assert server.client.post("/v1/images/generations", json=DRAW).status_code == 200


def test_a_head_that_does_not_come(serving: Any, mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnpp_trt.service import server as module

    monkeypatch.setattr(module, "_HEADER_SECONDS", 0.2)
    server = serving(mini)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: ")
        slow.settimeout(30)
        assert server.client.post("/v1/images/generations", json=DRAW).status_code == 200
        assert slow.recv(100) == b""  # closed
    # A request that takes longer than a head may is left alone.
    assert server.client.post("/v1/images/generations", json={**DRAW, "num_inference_steps": 20}).status_code == 200


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares more pixels than it has bytes for."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_images_with_too_many_pixels(serving: Any, mini: Pipeline) -> None:
    server = serving(mini, pixels=100 * 100)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(buffer, "PNG")
    for data, words in ((buffer.getvalue(), "more than 10,000"), (bomb(30_000, 30_000), "decompression bomb")):
        body = {**DRAW, "condition": "seg", "control_image": base64.b64encode(data).decode()}
        answer = server.client.post("/v1/images/generations", json=body)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        answer = server.client.post("/sdapi/v1/png-info", json={"image": body["control_image"]})
        assert answer.status_code == 400 and words in answer.json()["detail"]


def test_pages_of_other_origins(serving: Any, mini: Pipeline) -> None:
    server = serving(mini)
    answer = server.client.post("/v1/images/generations", json=DRAW, headers={"origin": "https://evil.example"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    answer = server.client.get("/healthz", headers={"origin": server.url})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
    allowed = serving(mini, app={"origins": ["https://mine.example"], "token": "t"})
    origin = {"origin": "https://mine.example"}
    preflight = allowed.client.options(
        "/v1/images/generations", headers={**origin, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://mine.example"
    answer = allowed.client.get("/v1/models", headers={**origin, "authorization": "Bearer t"})
    assert answer.headers["access-control-allow-origin"] == "https://mine.example"
    assert allowed.client.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
    ],
)
def test_names_of_other_machines(serving: Any, mini: Pipeline, host: str, status: int) -> None:
    """A page can have its own name resolve to 127.0.0.1; a server for this machine alone answers no such name."""
    server = serving(mini, app={"local": True})
    assert server.client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize("prompts", [False, True])
def test_the_access_log(serving: Any, mini: Pipeline, caplog: pytest.LogCaptureFixture, prompts: bool) -> None:
    caplog.set_level(logging.INFO, "cnpp_trt.service")
    server = serving(mini, app={"access_log": True})
    server.service.log_prompts = prompts
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img"):
        steps = "num_inference_steps" if path.startswith("/v1") else "steps"
        server.client.post(path, json={"prompt": "my secret house", steps: 1})
    server.client.get("/healthz")
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "cnpp_trt.service.gate"]
    assert [line["path"] for line in lines] == ["/v1/images/generations", "/sdapi/v1/txt2img"]
    assert all(line["status"] == 200 and line["model"] == "miniature" and line["steps"] == 1 for line in lines)
    assert ("my secret house" in caplog.text) == prompts


def test_requests_at_random_are_never_an_error_of_the_server(server: Any) -> None:
    """Bytes changed, cut and doubled in bodies that are right."""
    random = Random(0)
    image = base64.b64encode(bomb(20, 20)).decode()
    unit = {"model": "seg", "image": image}
    right: list[tuple[str, dict[str, Any]]] = [
        ("/v1/images/generations", {**DRAW, "condition": "seg", "control_image": image, "seed": 3, "n": 1}),
        ("/v1/jobs", {**DRAW, "preview": True, "controls": [{"condition": "canny", "image": image}]}),
        ("/sdapi/v1/txt2img", {"prompt": "x", "steps": 1, "alwayson_scripts": {"controlnet": {"args": [unit]}}}),
        ("/sdapi/v1/img2img", {"prompt": "x", "steps": 1, "init_images": [image], "denoising_strength": 0.5}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "miniature", "CLIP_stop_at_last_layers": 1}),
        ("/sdapi/v1/png-info", {"image": image}),
        ("/controlnet/detect", {"controlnet_module": "canny", "controlnet_input_images": [image]}),
    ]
    odd: list[Any] = [None, True, -1, 2**70, 1e308, "", "x", [], {}, [[]], "\0", "\ud800", {"a": 1}]
    statuses = []
    for _ in range(100):
        path, body = random.choice(right)
        changed = dict(body)
        key = random.choice(list(changed))
        changed[key] = random.choice(odd)
        content = bytearray(json.dumps(changed).encode())
        if random.random() < 0.5:
            at = random.randrange(len(content))
            content[at : at + random.randrange(4)] = random.randbytes(random.randrange(4))
        answer = server.client.post(path, content=bytes(content), headers={"content-type": "application/json"})
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (path, bytes(content), answer.text)
    assert statuses.count(200) < len(statuses)
