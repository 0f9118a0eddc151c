"""Scheduling: what runs together and in which order, limits of the queue, deadlines, clients that leave, draining."""

import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import CnppError, Control, Pipeline, Request

pytestmark = pytest.mark.slow

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'cnpp-trt[service]'")

BODY = {"prompt": "a house", "num_inference_steps": 3, "seed": 1}


def post(server: Any, **fields: Any) -> Any:
    return server.client.post("/v1/images/generations", json={**BODY, **fields})


def later(pool: ThreadPoolExecutor, server: Any, **fields: Any) -> Any:
    return pool.submit(post, server, **fields)


def waiting(server: Any, count: int) -> Any:
    return lambda: len(server.service.models.default.queue) == count


def image(answer: Any, pixels: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    found: np.ndarray = pixels(answer.json()["data"][0]["b64_json"])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_what_draws_gives_way_to_what_answers(serving: Any, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, priorities = held.batch, []

    def batch(*arguments: Any, **options: Any) -> Any:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return own(*arguments, **options)

    monkeypatch.setattr(held, "batch", batch)
    held.go_on.set()
    assert post(serving(held)).status_code == 200
    assert priorities == [min(19, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + 5)]


def test_requests_of_one_structure_run_together_and_are_what_they_are_alone(
    serving: Any, held: Any, mini: Pipeline, pixels: Any, eventually: Any
) -> None:
    server = serving(held, batch=4)
    seasons = ("spring", "summer", "autumn", "winter")
    with ThreadPoolExecutor(8) as pool:
        first = later(pool, server)
        held.wait_until_running()
        rest = [
            later(pool, server, prompt=f"a house in {s}", seed=i, guidance_scale=2 + i) for i, s in enumerate(seasons)
        ]
        other = later(pool, server, num_inference_steps=4)
        eventually(waiting(server, 5), "five requests wait")
        held.go_on.set()
        answers = [future.result() for future in rest]
        assert image(first.result(), pixels).shape == (128, 128, 3)
        image(other.result(), pixels)
    assert [len(batch) for batch in held.batches] == [1, 4, 1]
    for i, (season, answer) in enumerate(zip(seasons, answers, strict=True)):
        alone = mini(f"a house in {season}", seed=i, guidance_scale=2 + i, num_inference_steps=3).images[0]
        assert np.abs(image(answer, pixels).astype(int) - alone).max() <= 1
    assert answers[0].json()["timings"]["queue"] > 0


def test_a_request_alone_is_exactly_the_pipelines(serving: Any, mini: Pipeline, pixels: Any) -> None:
    server = serving(mini)
    for seed in (1, 2):
        expected = mini("a house", seed=seed, num_inference_steps=3).images[0]
        assert (image(post(server, seed=seed), pixels) == expected).all()


def test_the_oldest_goes_first_whatever_fits_together(serving: Any, held: Any, eventually: Any) -> None:
    """A request of another structure is not overtaken by those that came after it, but for its own batch."""
    server = serving(held, batch=16)
    with ThreadPoolExecutor(8) as pool:
        futures = [later(pool, server)]
        held.wait_until_running()
        for count, steps in enumerate((4, 5, 4, 5, 6), 1):
            futures.append(later(pool, server, num_inference_steps=steps, seed=count))
            eventually(waiting(server, count), "the request waits")
        held.go_on.set()
        assert all(future.result().status_code == 200 for future in futures)
    found = [[request.num_inference_steps for request in batch] for batch in held.batches]
    assert found == [[3], [4, 4], [5, 5], [6]]


def test_a_batch_has_at_most_so_many_images(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held, batch=3)
    with ThreadPoolExecutor(8) as pool:
        futures = [later(pool, server)]
        held.wait_until_running()
        for count, n in enumerate((2, 2, 1, 5), 1):
            futures.append(later(pool, server, n=n))
            eventually(waiting(server, count), "the request waits")
        held.go_on.set()
        answers = [future.result() for future in futures]
    assert [len(answer.json()["data"]) for answer in answers] == [1, 2, 2, 1, 5]
    assert [[r.num_images_per_prompt for r in batch] for batch in held.batches] == [[1], [2, 1], [2], [5]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held, queue=2)
    with ThreadPoolExecutor(8) as pool:
        futures = [later(pool, server)]
        held.wait_until_running()
        futures += [later(pool, server), later(pool, server)]
        eventually(waiting(server, 2), "two requests wait")
        refused = post(server)
        theirs = server.client.post("/sdapi/v1/txt2img", json={"prompt": "x"})
        held.go_on.set()
        assert all(future.result().status_code == 200 for future in futures)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert theirs.status_code == 429 and "2 requests wait" in theirs.json()["detail"]
    assert 'cnpp_trt_rejected_total{reason="queue_full"} 2.0' in server.client.get("/metrics").text


def test_the_last_place_is_kept_while_images_are_decoded(
    serving: Any, held: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes meanwhile is refused at once, and not when its own images are decoded; a bad request leaves it."""
    from cnpp_trt.service import orders, web

    decode, begun, go_on = orders.make_order, threading.Event(), threading.Event()

    def slow(model: Any, asked: Any, limits: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return decode(model, asked, limits)

    server = serving(held, queue=1)
    with ThreadPoolExecutor(8) as pool:
        first = later(pool, server)
        held.wait_until_running()
        for fields, status in (({"num_inference_steps": 0}, 400), ({}, 200)):
            begun.clear()
            go_on.clear()
            monkeypatch.setattr(web, "make_order", slow)
            second = later(pool, server, **fields)
            assert begun.wait(60)
            assert post(server).status_code == 429 and not second.done()
            monkeypatch.setattr(web, "make_order", decode)
            go_on.set()
            if status == 200:
                eventually(waiting(server, 1), "it waits")
                held.go_on.set()
            assert second.result().status_code == status
        assert first.result().status_code == 200
    assert 'cnpp_trt_rejected_total{reason="queue_full"} 2.0' in server.client.get("/metrics").text


def leave(server: Any, body: bytes) -> socket.socket:
    """A client that has sent its request and can go away at any moment."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_ends_its_request_at_the_next_step(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    connection = leave(server, b'{"prompt": "a house", "num_inference_steps": 50}')
    held.wait_until_running()
    [task] = server.service.active
    connection.close()
    eventually(lambda: task.ended, "the server notices")
    assert task.state == "cancelled"
    held.go_on.set()
    answer = post(server)
    assert answer.status_code == 200
    # Of the fifty steps the first was counted, of the next request all three.
    assert held.steps == 1 + 3
    assert 'status="499"' in server.client.get("/metrics").text


def test_a_client_that_leaves_the_queue_is_never_drawn(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    with ThreadPoolExecutor(2) as pool:
        first = later(pool, server)
        held.wait_until_running()
        connection = leave(server, b'{"prompt": "never", "num_inference_steps": 7}')
        eventually(waiting(server, 1), "the request waits")
        connection.close()
        eventually(waiting(server, 0), "the request has left")
        held.go_on.set()
        assert first.result().status_code == 200
    assert post(server).status_code == 200
    assert [request.prompt for batch in held.batches for request in batch] == ["a house", "a house"]


def test_who_leaves_a_batch_does_not_end_the_others(
    serving: Any, held: Any, mini: Pipeline, pixels: Any, eventually: Any
) -> None:
    server = serving(held)
    with ThreadPoolExecutor(4) as pool:
        first = later(pool, server)
        held.wait_until_running()
        connection = leave(server, b'{"prompt": "leaves", "num_inference_steps": 3, "seed": 3}')
        stays = later(pool, server, seed=4)
        eventually(waiting(server, 2), "two requests wait")
        held.go_on.clear()
        threading.Timer(0, held.go_on.set).start()
        held.wait_until_running()
        connection.close()
        assert first.result().status_code == 200
        expected = mini("a house", seed=4, num_inference_steps=3).images[0]
        assert np.abs(image(stays.result(), pixels).astype(int) - expected).max() <= 1


def test_a_stream_whose_reader_leaves_is_cancelled(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    connection = leave(server, b'{"prompt": "a house", "num_inference_steps": 50, "stream": true}')
    held.wait_until_running()
    [task] = server.service.active
    assert b"text/event-stream" in connection.recv(4096)
    connection.close()
    eventually(lambda: task.ended, "the server notices")
    assert task.state == "cancelled"


def test_after_many_that_left_the_next_one_is_served(serving: Any, mini: Pipeline, eventually: Any) -> None:
    server = serving(mini, queue=1000)
    for _ in range(100):
        leave(server, b'{"prompt": "a house", "num_inference_steps": 20}').close()
    assert post(server).status_code == 200
    eventually(lambda: server.service.idle, "everything has ended")


def test_a_deadline_passes_in_the_queue_and_while_drawing(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    with ThreadPoolExecutor(4) as pool:
        running = later(pool, server, timeout=0.5, num_inference_steps=50)
        held.wait_until_running()
        queued = later(pool, server, timeout=0.05)
        for future in (queued, running):  # answered although the pipeline stands still
            answer = future.result()
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "deadline_exceeded"
            assert answer.headers["x-should-retry"] == "false"
    held.go_on.set()
    assert post(server).status_code == 200
    assert held.steps == 1 + 3


def test_the_servers_deadline_is_the_longest(serving: Any, held: Any) -> None:
    server = serving(held, deadline=0.2)
    assert post(server, timeout=1000).status_code == 504


class Failing:
    """A pipeline that fails where several requests come together, or one says so."""

    def __init__(self, pipeline: Pipeline, together: bool = False) -> None:
        self.pipeline = pipeline
        self.together = together
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def batch(self, requests: Any, **options: Any) -> Any:
        self.batches.append(len(requests))
        if (self.together and len(requests) > 1) or any(r.prompt == "fails" for r in requests):
            raise CnppError("no plan takes so many images")
        if any(r.prompt == "breaks" for r in requests):
            raise RuntimeError("secret of the server")
        return self.pipeline.batch(requests, **options)


def made(pipeline: Any, prompts: Any, model_class: Any, limits: Any) -> Any:
    from cnpp_trt.service.orders import Asked, make_order
    from cnpp_trt.service.tasks import Task

    model = model_class("m", [pipeline], limits)
    tasks = []
    for prompt in prompts:
        order = make_order(model, Asked(fields={"prompt": prompt, "num_inference_steps": 2}), limits)
        tasks.append(Task(order, time.monotonic() + 100))
        model.queue.put(tasks[-1])
    return model, tasks


def test_one_that_fails_does_not_fail_the_others(mini: Pipeline) -> None:
    """Without HTTP: tasks in a queue, taken by a worker that starts afterwards."""
    from cnpp_trt.service.limits import Limits
    from cnpp_trt.service.models import ServedModel

    pipeline = Failing(mini)
    model, tasks = made(pipeline, ("a", "fails", "c"), ServedModel, Limits(batch=4))
    model.workers[0].start()
    assert tasks[0].future.result(60).batch == 1
    with pytest.raises(CnppError, match="no plan"):
        tasks[1].future.result(60)
    assert tasks[2].future.result(60)
    assert pipeline.batches == [3, 1, 1, 1]
    model.queue.close()
    assert model.workers[0].stop(30)


def test_too_many_together_are_fewer_from_then_on(mini: Pipeline) -> None:
    from cnpp_trt.service.limits import Limits
    from cnpp_trt.service.models import ServedModel

    pipeline = Failing(mini, together=True)
    model, tasks = made(pipeline, ("a", "b", "c", "d", "e", "f"), ServedModel, Limits(batch=3))
    model.workers[0].start()
    assert all(task.future.result(60) for task in tasks)
    assert pipeline.batches == [3, 1, 1, 1, 1, 1, 1]
    model.queue.close()
    assert model.workers[0].stop(30)


def test_a_worker_survives_what_it_did_not_expect(serving: Any, mini: Pipeline) -> None:
    server = serving(Failing(mini))
    broken = post(server, prompt="breaks")
    assert broken.status_code == 500 and "secret" not in broken.text
    assert post(server).status_code == 200


def test_two_pipelines_of_a_model_share_its_queue(serving: Any, mini: Pipeline, pixels: Any) -> None:
    first, second = (Pipeline.open(mini.bundle, threads=1) for _ in range(2))

    class Counting:
        def __init__(self, pipeline: Pipeline, barrier: threading.Barrier) -> None:
            self.pipeline, self.barrier, self.count = pipeline, barrier, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipeline, name)

        def batch(self, requests: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == 1:
                self.barrier.wait(60)  # both draw at the same time, else this breaks
            return self.pipeline.batch(requests, **options)

    barrier = threading.Barrier(2)
    pair = [Counting(first, barrier), Counting(second, barrier)]
    server = serving(("miniature", pair), batch=1)
    with ThreadPoolExecutor(2) as pool:
        answers = [f.result() for f in [later(pool, server, seed=i) for i in range(2)]]
    expected = [mini("a house", seed=i, num_inference_steps=3).images[0] for i in range(2)]
    for answer, each in zip(answers, expected, strict=True):
        assert np.abs(image(answer, pixels).astype(int) - each).max() <= 1


def test_several_models_by_name_and_conditions_without_reloading(
    serving: Any, mini: Pipeline, mask: Path, pixels: Any, sessions: list[str]
) -> None:
    from base64 import b64encode

    other = Pipeline.open(mini.bundle)
    server = serving(("first", [mini]), ("second", [other]))
    assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["first", "second"]
    text = b64encode(mask.read_bytes()).decode()
    for condition in ("seg", "canny", "seg", "canny"):
        answer = post(server, model="second", condition=condition, control_image=text)
        expected = mini(Request("a house", controls=Control(condition, mask), num_inference_steps=3, seed=1)).images[0]
        assert (image(answer, pixels) == expected).all()
        assert answer.json()["model"] == "second"
    assert sessions.count("unet") <= 2  # once for each pipeline, whatever the condition


def test_draining_finishes_what_was_accepted_and_refuses_what_is_new(serving: Any, held: Any, eventually: Any) -> None:
    server = serving(held)
    with ThreadPoolExecutor(4) as pool:
        futures = [later(pool, server)]
        held.wait_until_running()
        futures.append(later(pool, server))
        eventually(waiting(server, 1), "a request waits")
        assert server.client.get("/readyz").status_code == 200
        server.service.drain()
        refused = post(server)
        assert server.client.get("/readyz").json() == {"status": "draining"}
        held.go_on.set()
        assert [future.result().status_code for future in futures] == [200, 200]
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "stopping"


def test_ready_after_the_warm_up(serving: Any, mini: Pipeline, eventually: Any) -> None:
    class Slow:
        gate = threading.Event()

        def __getattr__(self, name: str) -> Any:
            return getattr(mini, name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            assert self.gate.wait(60)
            return mini(*arguments, **options)

    server = serving(Slow(), warm=True)
    assert server.client.get("/healthz").status_code == 200
    answer = server.client.get("/readyz")
    assert answer.status_code == 503 and answer.json() == {"status": "warming up"}
    Slow.gate.set()
    eventually(lambda: server.client.get("/readyz").status_code == 200, "the server is ready")


def test_figures(serving: Any, mini: Pipeline, mask: Path) -> None:
    from base64 import b64encode

    server = serving(mini)
    text = b64encode(mask.read_bytes()).decode()
    assert post(server, condition="seg", control_image=text, score=True, n=2).status_code == 200
    lines = server.client.get("/metrics").text.splitlines()
    assert 'cnpp_trt_images_total{model="miniature"} 2.0' in lines
    assert 'cnpp_trt_batch_images_bucket{le="1.0",model="miniature"} 0.0' in lines
    assert 'cnpp_trt_batch_images_bucket{le="2.0",model="miniature"} 1.0' in lines
    assert 'cnpp_trt_queue_depth{model="miniature"} 0.0' in lines
    assert 'cnpp_trt_consistency_count{condition="seg",metric="mIoU",model="miniature"} 2.0' in lines
    assert any(line.startswith('cnpp_trt_stage_seconds_sum{model="miniature",stage="unet"}') for line in lines)
    assert 'cnpp_trt_requests_total{route="/v1/images/generations",status="200"} 1.0' in lines


def test_what_waits_takes_no_more_memory_than_what_is_drawn(
    serving: Any, held: Any, mini: Pipeline, mask: Path, pixels: Any, eventually: Any
) -> None:
    """Images are brought to the model's size before they wait, as the pipeline does it."""
    import base64
    import io

    from PIL import Image

    large = Image.open(mask).convert("RGB").resize((700, 500), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    server = serving(held)
    fields = {"control_image": text, "condition": ["depth", "seg"], "extract": True, "init_image": text}
    with ThreadPoolExecutor(2) as pool:
        first = later(pool, server)
        held.wait_until_running()
        second = later(pool, server, **fields, num_inference_steps=4)
        eventually(waiting(server, 1), "the request waits")
        [task] = [task for task in server.service.active if task.state == "queued"]
        request = task.order.request
        assert [c.pixels.shape for c in request.controls] == [(128, 128, 3)] * 2
        assert request.init_image.shape == (128, 128, 3)
        held.go_on.set()
        assert first.result().status_code == 200
        controls = [Control(c, mini.extract(c, large)) for c in ("depth", "seg")]
        expected = mini("a house", controls, init_image=large, num_inference_steps=4, seed=1).images[0]
        assert (image(second.result(), pixels) == expected).all()


def test_nothing_is_kept_of_what_has_ended(serving: Any, mini: Pipeline) -> None:
    import gc

    from cnpp_trt.service.tasks import Task

    server = serving(mini)
    for _ in range(3):
        assert post(server, prompt="is it kept?").status_code == 200
    gc.collect()
    tasks = [each for each in gc.get_objects() if isinstance(each, Task)]
    kept = [task for task in tasks if task.order.request.prompt == "is it kept?"]
    assert len(kept) <= 1
