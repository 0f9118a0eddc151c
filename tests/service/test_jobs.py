"""Jobs: accepted at once, asked about, fetched, cancelled."""

import time
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Control, Pipeline

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")
BODY = {"prompt": "a house", "num_inference_steps": 4, "seed": 1}


def add(server: Any, **fields: Any) -> Any:
    answer = server.client.post("/v1/jobs", json={**BODY, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


def told(server: Any, job: Any) -> Any:
    return server.client.get(f"/v1/jobs/{job['id']}").json()


def test_a_job_from_the_queue_to_its_images(
    serving: Any, held: Any, mini: Pipeline, mask: Path, pixels: Any, eventually: Any
) -> None:
    from base64 import b64encode

    server = serving(held)
    first = add(server)
    held.wait_until_running()
    control = b64encode(mask.read_bytes()).decode()
    jobs = [add(server, num_inference_steps=5, condition="seg", control_image=control, score=True), add(server)]
    assert [job["status"] for job in jobs] == ["queued", "queued"]
    assert [told(server, job)["queue_position"] for job in jobs] == [0, 1]
    running = told(server, first)
    assert (running["status"], running["steps"]) == ("running", 4)
    held.go_on.set()
    done = eventually(lambda: (t := told(server, jobs[0]))["status"] == "done" and t, "the job is done")
    expected = mini("a house", [Control("seg", mask)], seed=1, num_inference_steps=5).images[0]
    [data] = done["result"]["data"]
    assert (pixels(data["b64_json"]) == expected).all()
    assert data["scores"][0]["value"] == pytest.approx(mini.score("seg", mask, expected).value)
    assert done["step"] == 5


def test_a_preview(serving: Any, held: Any, mini: Pipeline, pixels: Any, eventually: Any) -> None:
    server = serving(held)
    held.go_on.set()
    first = add(server)
    eventually(lambda: told(server, first)["status"] == "done", "the job is done")
    held.go_on.clear()
    while held.entered.acquire(blocking=False):
        pass
    job = add(server, preview=True)
    held.wait_until_running()
    assert pixels(told(server, job)["preview"]["b64_json"]).shape == (128, 128, 3)


def test_a_job_is_cancelled_and_forgotten(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    running = add(server, num_inference_steps=50)
    held.wait_until_running()
    queued = add(server)
    for job in (queued, running):
        answer = server.client.delete(f"/v1/jobs/{job['id']}")
        assert answer.json()["deleted"] is True and answer.json()["status"] == "cancelled"
        assert server.client.get(f"/v1/jobs/{job['id']}").status_code == 404
    held.go_on.set()
    eventually(lambda: not server.service.models.default.workers[0].running, "nothing runs")
    assert held.steps == 1
    assert server.client.delete("/v1/jobs/none").status_code == 404


def test_errors_of_jobs(serving: Any, held: Any) -> None:
    server = serving(held)
    answer = server.client.post("/v1/jobs", json={**BODY, "frobnicate": 1})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "frobnicate"
    job = add(server, timeout=0.01, num_inference_steps=50)
    held.wait_until_running() if told(server, job)["status"] == "running" else None
    time.sleep(0.02)
    failed = told(server, job)
    assert failed["status"] == "failed" and failed["error"]["code"] == "deadline_exceeded"


def test_so_many_finished_jobs_are_kept(serving: Any, mini: Pipeline, eventually: Any) -> None:
    server = serving(mini, jobs=2)
    jobs = []
    for _ in range(4):
        jobs.append(add(server, num_inference_steps=1))
        eventually(lambda: told(server, jobs[-1])["status"] == "done", "the job is done")
    found = [server.client.get(f"/v1/jobs/{job['id']}").status_code for job in jobs]
    assert found == [404, 404, 200, 200]
