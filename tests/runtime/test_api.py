"""The Python API: what it generates is what the command generates, in batches too, and it can be stopped and closed."""

import asyncio
import json
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cnpp_trt
import numpy as np
import pytest
from cnpp_trt import Cancelled, Control, Pipeline, Request, RuntimeOptions, UserError, read_image
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.miniature import EMBEDDED
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from requested import controls_of


@pytest.fixture
def requests(tiny: Any, control_image: Any) -> list[Request]:
    """Requests that differ in all that one launch list may have different, and some that need their own."""
    images = [control_image(*tiny.size, seed=i) for i in range(4)]
    base = Request("a house", "a tree", Control("seg", images[0]), 3, 5.0, "unipc", seed=1)
    return [
        base,
        replace(base, prompt="a much redder house", seed=77, guidance_scale=2.5),
        replace(base, controls=Control("seg", images[1], 0.4), negative_prompt=""),
        replace(base, controls=Control("seg", images[2], 1.7), guess_mode=True, seed=[8, 4], num_images_per_prompt=2),
        replace(base, num_inference_steps=2),
        replace(base, scheduler="lcm", guidance_scale=1.0),
        replace(base, controls=[Control("depth", images[3]), *controls_of(base)]),
        replace(base, init_image=images[3], strength=1.0, clip_skip=1),
    ]


def test_a_batch_is_its_requests_alone(tiny: Any, requests: list[Request]) -> None:
    alone = [tiny.pipeline(request) for request in requests]
    launched: list[tuple[int, int]] = []
    together = tiny.pipeline.batch(requests, on_progress=lambda done, total: launched.append((done, total)))
    assert len(together) == len(requests)
    for request, one, found in zip(requests, alone, together, strict=True):
        assert found.images.shape == one.images.shape
        assert np.abs(found.images.astype(int) - one.images).max() <= 1
        np.testing.assert_allclose(found.latents, one.latents, rtol=1e-4, atol=1e-4)
        assert found.request.prompt == request.prompt and found.request.seeds == one.request.seeds
        assert found.notes == one.notes
        for used, image in zip(found.control_images, one.control_images, strict=True):
            np.testing.assert_array_equal(used, image)
    # Those that differ in values alone ran together: three steps for five requests, not three for each.
    steps = 3 + 2 + 3 + 3
    assert launched == [(k, steps) for k in range(1, steps + 1)]
    pairs = [(a.images[0], b.images[0]) for i, a in enumerate(together) for b in together[:i]]
    assert all(not np.array_equal(a, b) for a, b in pairs)


def test_a_callback_sees_the_latents_of_a_whole_batch(tiny: Any, requests: list[Request]) -> None:
    seen: list[tuple[int, np.ndarray]] = []
    results = tiny.pipeline.batch(requests[:2], callback_on_step_end=lambda k, t, latents: seen.append((k, latents)))
    assert [k for k, _ in seen] == [0, 1, 2]
    last = seen[-1][1]
    np.testing.assert_array_equal(last, np.concatenate([result.latents for result in results]))


def test_a_batch_is_cut_to_a_number_of_images(tiny: Any, requests: list[Request]) -> None:
    launched: list[int] = []
    tiny.pipeline.batch(requests[:4], max_images=2, on_progress=lambda done, total: launched.append(total))
    assert set(launched) == {9}  # 1 + 1, 1, and the one of 2
    assert tiny.pipeline.batch([]) == []
    for wrong in (17, 0, "4", 2.5):
        with pytest.raises(UserError, match="max_images must be a whole number from 1 to 16"):
            tiny.pipeline.batch(requests, max_images=wrong)
    with pytest.raises(UserError, match="give a Request, or a prompt and its controls, not str"):
        tiny.pipeline.batch([requests[0], "a house"])


def test_a_batch_is_checked_before_anything_runs(tiny: Any, requests: list[Request]) -> None:
    launched: list[int] = []
    with pytest.raises(UserError, match="lcm takes at most"):
        tiny.pipeline.batch(
            [requests[0], replace(requests[0], num_inference_steps=1000, scheduler="lcm")],
            on_progress=lambda done, total: launched.append(done),
        )
    assert not launched


@pytest.mark.slow
@pytest.mark.parametrize("model", EMBEDDED)
def test_api_and_command_give_the_same_bytes(model: str, command: Any, tmp_path: Path) -> None:
    """Whatever the model's own settings are: neither is told any."""
    folder = tmp_path / "bundle"
    assemble(model, folder)
    pipeline = Pipeline.open(folder, RuntimeOptions("onnxruntime-cpu"))
    defaults: dict[str, Any] = {**pipeline.bundle.manifest.defaults}
    examples: dict[str, dict[str, Any]] = {c: {**record} for c, record in pipeline.bundle.manifest.conditions.items()}
    for condition, example in examples.items():
        result = pipeline(example["prompt"], Control(condition, folder / example["image"]), seed=example["seed"])
        line = ("run", "--bundle", folder, "--cond", condition, "--backend", "onnxruntime-cpu", "--out", tmp_path)
        outcome = command(*line, "--json")
        assert outcome.status == 0, outcome.err
        written = read_image(json.loads(outcome.out)["images"][0]).pixels
        np.testing.assert_array_equal(result.images[0], written)
        assert result.request.guidance_scale == defaults["guidance_scale"] != 7.5
        assert result.request.num_inference_steps == defaults["num_inference_steps"]


def test_a_prompt_in_place_of_a_request(tiny: Any, control_image: Any) -> None:
    control = Control("seg", control_image(*tiny.size))
    request = Request("a house", controls=control, num_inference_steps=2, seed=4)
    found = tiny.pipeline("a house", control, num_inference_steps=2, seed=4)
    np.testing.assert_array_equal(found.images, tiny.pipeline(request).images)
    with pytest.raises(UserError, match=r"no such field .*steps"):
        tiny.pipeline("a house", control, steps=2)
    with pytest.raises(UserError, match="controls must be Control objects"):
        tiny.pipeline("a house", control.image)
    with pytest.raises(UserError, match="a Request has its own controls"):
        tiny.pipeline(request, control)
    with pytest.raises(UserError, match="give a Request, or a prompt and its controls, not dict"):
        tiny.pipeline({"prompt": "a house"})


def test_a_request_is_cancelled_from_another_thread(tiny: Any, requests: list[Request]) -> None:
    expected = tiny.pipeline(requests[0])
    cancel, started = threading.Event(), threading.Event()
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done)
        started.set()
        assert cancel.wait(60)  # the other thread has had its turn

    def other() -> None:
        assert started.wait(60)
        cancel.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(Cancelled, match="cancelled"):
        tiny.pipeline(requests[0], on_progress=progress, cancel=cancel)
    thread.join()
    assert steps == [1]
    with pytest.raises(Cancelled):
        tiny.pipeline.batch(requests, cancel=cancel)
    np.testing.assert_array_equal(tiny.pipeline(requests[0]).images, expected.images)


def test_a_callback_cancels(tiny: Any, requests: list[Request]) -> None:
    def stop(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        tiny.pipeline(requests[0], on_progress=stop)


def test_requests_are_submitted(tiny: Any, requests: list[Request]) -> None:
    submitted = [tiny.pipeline.submit(request) for request in requests[:2]]
    for submission, request in zip(submitted, requests, strict=False):
        np.testing.assert_array_equal(submission.result(60).images, tiny.pipeline(request).images)
        assert not submission.cancel()

    async def awaited() -> Any:
        return await asyncio.wrap_future(tiny.pipeline.submit(requests[0]))

    np.testing.assert_array_equal(asyncio.run(awaited()).images, submitted[0].result().images)


def test_what_was_submitted_is_cancelled(tiny: Any, requests: list[Request]) -> None:
    """The one that runs after its step, the one that waits at once; the next is drawn."""
    endless = replace(requests[0], num_inference_steps=500)
    first, second, third = (tiny.pipeline.submit(r) for r in (endless, endless, requests[1]))
    while not first.running():
        time.sleep(0.001)
    assert second.cancel() and second.cancelled()
    assert first.cancel()
    with pytest.raises(Cancelled):
        first.result(60)
    np.testing.assert_array_equal(third.result(60).images, tiny.pipeline(requests[1]).images)


def test_what_cannot_be_drawn_fails_when_its_result_is_taken(tiny: Any) -> None:
    with pytest.raises(UserError, match="canny"):
        tiny.pipeline.submit(Request("a", controls=Control("canny", np.zeros((64, 64, 3), np.uint8)))).result(60)
    closed = Pipeline.open(tiny.bundle, threads=1)
    closed.close()
    with pytest.raises(UserError, match="the pipeline is closed"):
        closed.submit(Request("a"))


def test_a_pipeline_is_closed_at_the_end(tiny: Any, requests: list[Request], control_image: Any) -> None:
    with Pipeline.open(tiny.bundle, RuntimeOptions("onnxruntime-cpu", threads=1)) as pipeline:
        result = pipeline(requests[0])
        assert repr(pipeline).startswith("<Pipeline: tiny") and "onnxruntime-cpu" in repr(pipeline)
    with pytest.raises(UserError, match="the pipeline is closed"):
        pipeline(requests[0])
    with pytest.raises(UserError, match="the pipeline is closed"):
        pipeline.batch(requests)
    with pytest.raises(UserError, match="the pipeline is closed"):
        pipeline.extract("seg", control_image(*tiny.size))
    assert result.images.any()


def test_a_result_is_saved(miniature: Any, command: Any, tmp_path: Path) -> None:
    """Into the folder itself, and the command repeats what was saved."""
    example = miniature.pipeline.bundle.manifest.conditions["seg"]
    control = Control("seg", miniature.bundle / example["image"])
    result = miniature.pipeline("a house", control, seed=[6, 3], num_images_per_prompt=2, num_inference_steps=2)
    saved = result.save(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["image-0.png", "image-1.png", "sheet.png"]
    for path, image, picture in zip(saved.images, result.images, result.pil(), strict=True):
        np.testing.assert_array_equal(read_image(path).pixels, image)
        np.testing.assert_array_equal(np.asarray(picture), image)
    [(condition, scores)] = saved.scores
    assert condition == "seg"
    assert scores[1] == miniature.pipeline.score("seg", control.image, result.images[1])
    with pytest.raises(UserError, match=r"image-0\.png exists already"):
        result.save(tmp_path / "mine")
    repeated = command("run", "--repeat", saved.images[1], "--bundle", miniature.bundle, "--out", tmp_path, "--json")
    assert json.loads(repeated.out)["max_difference"] == 0, repeated.err
    with Image.open(saved.images[1]) as picture:
        assert isinstance(picture, PngImageFile)
        assert "Seed: 3, " in picture.text["parameters"]


def test_a_result_travels_without_its_pipeline(tiny: Any, requests: list[Request], tmp_path: Path) -> None:
    result = pickle.loads(pickle.dumps(tiny.pipeline(requests[0])))
    assert result.images.any() and len(repr(result)) < 80
    with pytest.raises(UserError, match="has no pipeline"):
        result.save(tmp_path)


def test_scores_are_those_of_the_extracted_condition(miniature: Any) -> None:
    example = read_image(miniature.bundle / miniature.pipeline.bundle.manifest.conditions["seg"]["image"]).pixels
    assert miniature.pipeline.score("seg", example, np.zeros_like(example)).value < 60
    picture = miniature.pipeline("a house", Control("seg", example), seed=1)
    found = miniature.pipeline.score("seg", Image.fromarray(example), picture.pil()[0])
    assert found.metric == "mIoU" and found.value > 60 and found.grade


def test_public_names_are_listed_and_documented() -> None:
    assert dir(cnpp_trt) == sorted(cnpp_trt.__all__)
    for name in cnpp_trt.__all__:
        value = getattr(cnpp_trt, name)
        if isinstance(value, type):
            assert value.__doc__, name
            for attribute, member in vars(value).items():
                if callable(member) and not attribute.startswith("_"):
                    assert member.__doc__, f"{name}.{attribute}"


def test_options_over_options(tiny: Any) -> None:
    options = RuntimeOptions("onnxruntime-cpu", threads=1)
    assert Pipeline.open(tiny.bundle, options).reason == "asked for"
    for given in (("onnxruntime-cpu",), (options,), ()):
        assert Pipeline.open(tiny.bundle, *given, backend="onnxruntime-cpu").backend.name == "onnxruntime-cpu"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "tensort"}, "unknown backend 'tensort': did you mean 'tensorrt'"),
        ({"backend": 3}, "unknown backend '3'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"precision": "bf16"}, "bf16 is a precision of the backend openvino"),
        ({"threads": 0}, "threads must be a whole number from 1 to 1024, not 0"),
        ({"threads": True}, "threads must be"),
        ({"device": -1}, "device must be the index of a GPU"),
        ({"vram_budget": 0}, "a vram budget must be"),
        ({"vram_budget": 5, "backend": "openvino"}, "openvino runs on the CPU and cannot keep a vram budget"),
    ],
)
def test_options_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RuntimeOptions(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)
