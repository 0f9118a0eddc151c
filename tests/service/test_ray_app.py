"""The server on Ray Serve: the same interfaces and pixels on replicas in other processes, and replicas that die."""

# Packages of extras that a checkout need not have.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.errors import CnppError, UserError
from PIL import Image

TOKEN = "a token"


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("ray") / "bundle"
    assemble("miniature-lcm", folder)
    with Pipeline.open(folder, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(lcm: Pipeline) -> Iterator[Any]:
    """Of two replicas on a Ray of this machine."""
    pytest.importorskip("ray")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")
    import httpx
    import ray
    from cnpp_trt.service.ray_app import app
    from cnpp_trt.service.server import bind
    from ray import serve

    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("CNPP_TRT_TOKEN", TOKEN)
        ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = {
                "bundle": str(lcm.bundle.folder),
                "replicas": "2",
                "backend": "onnxruntime-cpu",
                "threads": "1",
            }
            serve.run(app(arguments))
            headers = {"Authorization": f"Bearer {TOKEN}"}
            url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=url, timeout=120, trust_env=False, headers=headers) as opened:
                until = time.monotonic() + 60
                while opened.get("/readyz").status_code != 200 and time.monotonic() < until:
                    time.sleep(0.1)
                yield opened
        finally:
            serve.shutdown()
            ray.shutdown()


def seg_of(lcm: Pipeline) -> Path:
    return lcm.bundle.file(lcm.bundle.manifest.conditions["seg"].get("image", ""))


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def replicas() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:default:Drawer"):
                found.append(int(path.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestOnReplicas:
    def test_the_pipelines_pixels_and_scores(self, client: Any, lcm: Pipeline) -> None:
        seg = base64.b64encode(seg_of(lcm).read_bytes()).decode()
        body = {"prompt": "a red house", "seed": 7, "condition": "seg", "control_image": seg, "score": True, "n": 2}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        expected = lcm("a red house", Control("seg", seg_of(lcm)), seed=7, num_images_per_prompt=2)
        for entry, image in zip(answer.json()["data"], expected.images, strict=True):
            assert (pixels(entry["b64_json"]) == image).all()
            [score] = entry["scores"]
            assert score["value"] == pytest.approx(lcm.score("seg", seg_of(lcm), image).value)

    def test_a_photo(self, client: Any, lcm: Pipeline) -> None:
        buffer = io.BytesIO()
        photo = lcm("a house", seed=3).pil()[0]
        photo.save(buffer, "PNG")
        image = base64.b64encode(buffer.getvalue()).decode()
        body = {"prompt": "a house", "seed": 1, "condition": "canny", "control_image": image, "extract": True}
        answer = client.post("/v1/images/generations", json=body)
        control = Control("canny", lcm.extract("canny", photo))
        assert (pixels(answer.json()["data"][0]["b64_json"]) == lcm("a house", control, seed=1).images[0]).all()

    def test_the_other_interfaces(self, client: Any, lcm: Pipeline) -> None:
        expected = lcm("oak trees", seed=5).images[0]
        text = {"prompt": "oak trees", "seed": 5, "steps": 4, "cfg_scale": 1, "sampler_name": "LCM"}
        answer = client.post("/sdapi/v1/txt2img", json=text)
        assert answer.status_code == 200, answer.text
        assert (pixels(answer.json()["images"][0]) == expected).all()
        job = client.post("/v1/jobs", json={"prompt": "oak trees", "seed": 5}).json()
        until = time.monotonic() + 60
        while job.get("status") not in ("done", "failed") and time.monotonic() < until:
            job = client.get(f"/v1/jobs/{job['id']}").json()
        assert (pixels(job["result"]["data"][0]["b64_json"]) == expected).all()
        [model] = client.get("/v1/models").json()["data"]
        assert model["backends"] == ["onnxruntime-cpu", "onnxruntime-cpu"]
        assert "cnpp_trt" in client.get("/metrics").text
        assert "/v1/images/generations" in client.get("/openapi.json").json()["paths"]

    def test_events_with_previews(self, client: Any) -> None:
        body = {"prompt": "oak trees", "seed": 5, "stream": True, "partial_images": 2}
        with client.stream("POST", "/v1/images/generations", json=body) as answer:
            events = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
        assert events[-1].endswith("completed")
        assert any("partial" in event for event in events)

    def test_what_is_refused(self, client: Any) -> None:
        import httpx

        url = client.base_url
        assert (
            httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"}, trust_env=False).status_code == 401
        )
        answer = client.post(
            "/v1/images/generations", json={"prompt": "x", "condition": "pose", "control_image": "AAAA"}
        )
        assert answer.status_code == 400
        assert client.post("/v1/images/generations", json={"prompt": "x", "frobnicate": 1}).status_code == 400

    def test_nobody_waits_for_what_is_too_late(self, client: Any, lcm: Pipeline) -> None:
        """Replicas end it at their next step: 40 requests of 4 images and 50 steps would take minutes."""
        late = {"prompt": "a house", "num_inference_steps": 50, "n": 4, "timeout": 0.2}
        for _ in range(40):
            assert client.post("/v1/images/generations", json=late).status_code == 504
        answer = client.post("/v1/images/generations", json={"prompt": "a house", "seed": 3, "timeout": 60})
        assert (pixels(answer.json()["data"][0]["b64_json"]) == lcm("a house", seed=3).images[0]).all()

    def test_a_replica_dies(self, client: Any, lcm: Pipeline) -> None:
        """While both draw: every client gets its picture."""
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            answers[i] = client.post(
                "/v1/images/generations", json={"prompt": "a house", "seed": i, "num_inference_steps": 20 + i % 2}
            )

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        [first, *_] = replicas()
        os.kill(first, signal.SIGKILL)
        for thread in threads:
            thread.join()
        for i, answer in answers.items():
            assert answer.status_code == 200, answer.text
            alone = lcm("a house", seed=i, num_inference_steps=20 + i % 2).images[0]
            # Kernels of other batch sizes add in another order.
            assert np.abs(pixels(answer.json()["data"][0]["b64_json"]).astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give the folder of a bundle"),
        ({"bundle": "nowhere"}, "no bundle at nowhere"),
        ({"bundle": "BUNDLE", "replicas": "none"}, "replicas must be a whole number"),
        ({"bundle": "BUNDLE", "deadline": "soon"}, "deadline must be a whole number"),
        ({"bundle": "BUNDLE", "replica": "1"}, "there is no argument 'replica'"),
        ({"bundle": "BUNDLE", "backend": "cuda"}, "backend"),
    ],
)
def test_arguments(lcm: Pipeline, arguments: dict[str, str], said: str) -> None:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")
    from cnpp_trt.service.ray_app import app

    given = {name: value.replace("BUNDLE", str(lcm.bundle.folder)) for name, value in arguments.items()}
    with pytest.raises(CnppError, match=said) as caught:
        app(given)
    assert isinstance(caught.value, UserError)
