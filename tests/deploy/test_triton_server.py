"""A real Triton server on a repository that the command wrote, asked over HTTP and gRPC by NVIDIA's own client."""

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Pipeline
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.developer.triton_server import NUMPY, REQUIREMENT, TritonServer, triton_server
from cnpp_trt.errors import CnppError
from PIL import Image
from wheels import Unavailable, fetch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "bundle"
    assemble("miniature-lcm", folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory, script: Any) -> Iterator[TritonServer]:
    pytest.importorskip("tritonclient")
    try:
        wheel, numpy = fetch(REQUIREMENT, download=False), fetch(NUMPY)
    except Unavailable as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp("server")
    repository = folder / "models"
    line = ("package", bundle, "--triton", repository, "--name", "mini", "--backend", "onnxruntime-cpu")
    ended = script(*line, "--threads", 1, "--batch-window", 0.3)
    assert ended.returncode == 0, ended.stderr
    (folder / "run").mkdir()
    try:
        with triton_server(wheel, numpy, repository, ["mini"], folder / "run") as running:
            yield running
    except CnppError as e:
        if "libpython" in str(e):
            pytest.skip(str(e))
        raise


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, "onnxruntime-cpu", threads=1) as opened:
        yield opened


@pytest.fixture(params=["http", "grpc"])
def ask(request: pytest.FixtureRequest, server: TritonServer) -> Callable[..., Arrays]:
    return asker(request.param, server)


TYPES = {"bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "uint64": "UINT64", "float32": "FP32", "object": "BYTES"}


def asker(protocol: str, server: TritonServer) -> Callable[..., Arrays]:
    """`ask(prompt=texts("a house"), outputs=("image",))`: the answer's tensors."""
    module: Any = import_module(f"tritonclient.{protocol}")
    patience = {"network_timeout": 120, "connection_timeout": 120} if protocol == "http" else {}
    client = module.InferenceServerClient(getattr(server, protocol), **patience)

    def call(outputs: tuple[str, ...] = ("image", "seed", "score", "notes"), **arrays: np.ndarray) -> Arrays:
        inputs = []
        for name, array in arrays.items():
            tensor = module.InferInput(name, list(array.shape), TYPES[array.dtype.name])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        answer = client.infer("mini", inputs, outputs=[module.InferRequestedOutput(name) for name in outputs])
        return {name: answer.as_numpy(name) for name in outputs}

    return call


def texts(*values: str) -> np.ndarray:
    return np.array([[value.encode()] for value in values], np.object_)


def example(pipeline: Pipeline, condition: str) -> np.ndarray:
    path = pipeline.bundle.file(pipeline.bundle.manifest.conditions[condition].get("image", ""))
    return np.asarray(Image.open(path).convert("RGB"))


def controls(pipeline: Pipeline, *conditions: str) -> Arrays:
    """Of one row."""
    names = np.array([[condition.encode() for condition in conditions]], np.object_)
    return {"condition": names, "control_image": np.stack([example(pipeline, c) for c in conditions])[None]}


def test_the_commands_pixels(
    ask: Callable[..., Arrays], bundle: Path, pipeline: Pipeline, tmp_path: Path, script: Any
) -> None:
    seg = bundle / pipeline.bundle.manifest.conditions["seg"].get("image", "")
    line = ("run", "--bundle", bundle, "--prompt", "a red house, ä", "--cond", "seg", "--image", seg, "--seed", 7)
    ended = script(*line, "--steps", 3, "--backend", "onnxruntime-cpu", "--threads", 1, "--out", tmp_path, "--json")
    assert ended.returncode == 0, ended.stderr
    [path] = tmp_path.rglob("image-0.png")
    found = ask(
        prompt=texts("a red house, ä"),
        seed=np.array([[7]], np.uint64),
        num_inference_steps=np.array([[3]], np.int32),
        **controls(pipeline, "seg"),
    )
    assert (found["image"][0] == np.asarray(Image.open(path))).all()
    assert found["seed"].tolist() == [[7]]
    score = pipeline.score("seg", seg, Image.open(path))
    assert found["score"].tolist() == [[pytest.approx(score.value, rel=1e-6)]]
    assert found["notes"].tolist() == [[b""]]


def test_rows_of_one_request(ask: Callable[..., Arrays], pipeline: Pipeline) -> None:
    """Drawn together, as `Pipeline.batch` draws them: the same bytes."""
    from cnpp_trt import Control, Request

    prompts, seeds = ["a house", "two trees", "a barn"], [2**64 - 1, 5, 6]
    one = controls(pipeline, "seg", "depth")
    found = ask(
        prompt=texts(*prompts),
        seed=np.array(seeds, np.uint64)[:, None],
        controlnet_conditioning_scale=np.array([[0.5, 1.0], [1.0, 0.25], [1.0, 1.0]], np.float32),
        **{name: np.repeat(array, 3, axis=0) for name, array in one.items()},
    )
    scales = [(0.5, 1.0), (1.0, 0.25), (1.0, 1.0)]
    results = pipeline.batch(
        [
            Request(
                prompt,
                controls=[Control(c, example(pipeline, c), s) for c, s in zip(("seg", "depth"), both, strict=True)],
                seed=seed,
            )
            for prompt, seed, both in zip(prompts, seeds, scales, strict=True)
        ],
        max_images=4,
    )
    assert (found["image"] == np.concatenate([result.images for result in results])).all()
    assert found["seed"].tolist() == [[seed] for seed in seeds]
    assert found["score"].shape == (3, 2)


def test_a_photo_and_no_control(ask: Callable[..., Arrays], pipeline: Pipeline) -> None:
    plain = ask(prompt=texts("oak trees"), seed=np.array([[3]], np.uint64), outputs=("image",))["image"]
    assert (plain == pipeline("oak trees", seed=3).images).all()
    photo = plain[:, None]  # [rows, controls, H, W, 3]
    arrays = {"condition": texts("canny"), "control_image": photo, "extract": np.array([[True]])}
    found = ask(prompt=texts("oak trees"), seed=np.array([[4]], np.uint64), outputs=("image",), **arrays)["image"]
    from cnpp_trt import Control

    control = Control("canny", pipeline.extract("canny", plain[0]))
    assert (found == pipeline("oak trees", control, seed=4).images).all()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"scheduler": texts("none")}, "unknown scheduler 'none'"),
        ({"condition": texts("seg")}, "a control needs condition and control_image"),
        ({"num_inference_steps": np.array([[0]], np.int32)}, "num_inference_steps must be a whole number"),
        ({"prompt": np.array([[b"\xff"]], np.object_)}, "is no UTF-8"),
    ],
)
def test_what_cannot_be_drawn(ask: Callable[..., Arrays], arrays: Arrays, said: str) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=said):
        ask(outputs=("image",), **{"prompt": texts("a house"), **arrays})


def test_clients_are_drawn_together(server: TritonServer, pipeline: Pipeline) -> None:
    """Also where their numbers of controls differ, and one of them cannot be drawn."""
    before = executions(server)
    answers: dict[int, Any] = {}

    def work(i: int) -> None:
        arrays = controls(pipeline, *(("seg",) if i % 2 else ("seg", "depth")))
        arrays |= {"prompt": texts(f"house {i}"), "seed": np.array([[i]], np.uint64)}
        if i == 3:
            arrays["condition"] = texts("pose")
        try:
            answers[i] = asker("http", server)(outputs=("image",), **arrays)["image"][0]
        except Exception as e:
            answers[i] = str(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "unknown condition 'pose'" in answers.pop(3)
    from cnpp_trt import Control

    for i, image in answers.items():
        both = ("seg",) if i % 2 else ("seg", "depth")
        alone = pipeline(f"house {i}", [Control(c, example(pipeline, c)) for c in both], seed=i).images[0]
        # Kernels of other batch sizes add in another order.
        assert np.abs(image.astype(int) - alone).max() <= 1
    asked, executed = (after - one for after, one in zip(executions(server), before, strict=True))
    assert asked == 8
    assert executed < 8


def executions(server: TritonServer) -> tuple[int, int]:
    """Requests, and the batches in which they ran."""
    with urllib.request.urlopen(f"http://{server.http}/v2/models/mini/stats") as answer:
        [stats] = json.load(answer)["model_stats"]
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as answer:
        assert b'nv_inference_count{model="mini"' in answer.read()
    return stats["inference_count"], stats["execution_count"]
