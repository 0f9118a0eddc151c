"""`cnpp-trt serve` as a process: it starts, says where, and ends in order."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hints import hint

httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install 'cnpp-trt[test]'")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")


class Process:
    """`cnpp-trt serve --port 0 …`."""

    def __init__(self, *arguments: Any, **env: str) -> None:
        line = [sys.executable, "-m", "cnpp_trt", "serve", "--port", "0", "--threads", "1", *map(str, arguments)]
        self.process = subprocess.Popen(
            line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **env}
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        end = time.monotonic() + 120
        while not (found := re.search(r"at (http://\S+)", self.text)):
            assert self.process.poll() is None and time.monotonic() < end, self.text
            time.sleep(0.02)
        self.client = httpx.Client(base_url=found[1], timeout=120, trust_env=False)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_ready(self) -> None:
        end = time.monotonic() + 120
        while self.client.get("/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)

    def ended(self, seconds: float = 60) -> int:
        status = self.process.wait(seconds)
        self._thread.join(10)
        return status


@pytest.fixture
def start(miniature: Any) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def call(*arguments: Any, **env: str) -> Process:
        made.append(Process("--bundle", miniature.bundle, *arguments, **env))
        return made[-1]

    yield call
    for each in made:
        each.client.close()
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait(30)


def draw(process: Process, steps: int, **fields: Any) -> Any:
    body = {"prompt": "a house", "num_inference_steps": steps, "seed": 1, **fields}
    return process.client.post("/v1/images/generations", json=body)


def metric(process: Process, name: str) -> float:
    text = process.client.get("/metrics").text
    return float(re.search(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing_that_was_accepted(start: Any, pixels: Any, drawn: Any) -> None:
    process = start("--max-batch", 2)
    process.wait_ready()
    job = process.client.post("/v1/jobs", json={"prompt": "a house", "num_inference_steps": 20, "seed": 1}).json()
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(draw, process, 20) for _ in range(5)]
        end = time.monotonic() + 60
        while metric(process, "cnpp_trt_queue_depth") + metric(process, "cnpp_trt_running") < 6:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while process.client.get("/readyz").status_code == 200:
            assert time.monotonic() < end
        assert draw(process, 1).status_code == 503
        answers = [future.result() for future in futures]
    assert [answer.status_code for answer in answers] == [200] * 5
    expected = drawn("a house", None, seed=1, num_inference_steps=20)[0].astype(int)
    for answer in answers:
        assert abs(pixels(answer.json()["data"][0]["b64_json"]) - expected).max() <= 1
    # A job that is done can still be fetched: the server waits for that.
    end = time.monotonic() + 60
    while (told := process.client.get(f"/v1/jobs/{job['id']}").json())["status"] != "done":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert abs(pixels(told["result"]["data"][0]["b64_json"]) - expected).max() <= 1
    assert process.ended() == 0
    assert process.lines[-1] == "stopped\n"


@pytest.mark.slow
def test_the_end_comes_within_its_bound(start: Any) -> None:
    process = start("--drain", 0.5)
    process.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(draw, process, 150, n=10)
        end = time.monotonic() + 60
        while metric(process, "cnpp_trt_running") < 1:
            assert time.monotonic() < end
        process.process.send_signal(signal.SIGTERM)
        answer = future.result()
    assert answer.status_code == 409 and "stopped" in answer.text
    assert process.ended(30) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_kill_leaves_nothing_behind(start: Any) -> None:
    process = start()
    process.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(draw, process, 150, n=10)
        end = time.monotonic() + 60
        while metric(process, "cnpp_trt_running") < 1:
            assert time.monotonic() < end
        for _ in range(2):
            process.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.ended(30) in (0, 1)
        assert future.exception() is not None or future.result().status_code == 409
    killed = start()
    killed.process.kill()
    killed.ended()
    again = start()
    again.wait_ready()
    assert draw(again, 1).status_code == 200
    again.process.send_signal(signal.SIGTERM)
    assert again.ended(30) == 0


@pytest.mark.slow
def test_tokens_of_the_command(start: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\nsecond line\n")
    process = start("--token-file", tmp_path / "token", "--no-access-log")
    assert process.client.get("/v1/models").status_code == 401
    assert process.client.get("/v1/models", headers={"authorization": "Bearer from-file"}).status_code == 200
    process.process.send_signal(signal.SIGTERM)
    assert process.ended() == 0
    assert "from-file" not in process.text and "/v1/models" not in process.text
    process = start(CNPP_TRT_TOKEN="from-environment")
    assert process.client.get("/v1/models", headers={"authorization": "Bearer from-environment"}).status_code == 200
    process.process.send_signal(signal.SIGTERM)
    assert process.ended() == 0
    assert [json.loads(line)["path"] for line in process.lines if line.startswith("{")] == ["/v1/models"]


def test_what_the_command_refuses(refused: Any, miniature: Any, tmp_path: Path) -> None:
    bundle = ("--bundle", miniature.bundle)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --host or --port" in refused("serve", *bundle, "--port", taken.getsockname()[1])
    assert "give each bundle once" in refused("serve", *bundle, *bundle)
    assert "give each once" in refused("serve", *bundle, "--device", 0, "--device", 0)
    assert "cannot read --token-file" in refused("serve", *bundle, "--token-file", tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    assert "put a token there" in refused("serve", *bundle, "--token-file", tmp_path / "empty")
    assert "cannot read 'much'" in refused("serve", *bundle, "--max-body", "much")
    assert "--host or --port" in refused("serve", *bundle, "--host", "256.1.1.1")


def test_without_the_packages_a_line_says_what_to_install() -> None:
    program = Path(__file__).parent.parent / "programs" / "without_packages.py"
    line = [sys.executable, str(program), "fastapi,uvicorn,prometheus_client", "command_says_its_status", "serve"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert re.search(hint("service"), ended.stderr)
    assert ended.stdout.split() == ["2"]


def test_help_imports_nothing_of_the_server() -> None:
    program = "import sys; from cnpp_trt.commands.app import app; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert not {"fastapi", "uvicorn", "starlette", "pydantic", "numpy"} & set(ended.stdout.split())
