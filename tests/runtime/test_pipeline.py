"""Requests on a bundle: what is refused, what is reported, and that requests do not disturb one another."""

import hashlib
import math
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.errors import BackendError, BundleError, DeviceMemoryError, UserError
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.encoding_cache import MAX_ENCODINGS
from cnpp_trt.runtime.program_cache import MAX_PROGRAMS
from manifests import edit
from requested import controls_of


@pytest.fixture
def request_(tiny: Any, control_image: Callable[..., np.ndarray]) -> Request:
    return Request("a house", "", [Control("seg", control_image(*tiny.size))], 3, seed=11)


def test_a_result_says_everything(model, control_image):
    control = control_image(*model.size, seed=99)
    result = model.pipeline(
        # Nor so many steps: what depends on them alone is kept for later requests.
        Request("a prompt that no other test has", "", [Control("seg", control)], 17, seed=3, num_images_per_prompt=2)
    )
    width, height = model.size
    assert result.images.shape == (2, height, width, 3)
    assert result.images.dtype == np.uint8
    assert result.latents.shape == (2, 4, height // 8, width // 8)
    assert result.latents.dtype == np.float32
    assert result.seed == 3
    assert result.notes == ()
    np.testing.assert_array_equal(result.control_images[0], control)
    once = {"text_encoder", "text_kv", "time_embeds", "hint"}
    stages = {"load", "fill", *once, "controlnet", "unet", "update", "vae_decoder"}
    assert set(result.timings) == stages | {"total"}
    assert all(seconds >= 0 for seconds in result.timings.values())
    assert math.isclose(sum(result.timings[s] for s in stages), result.timings["total"], rel_tol=0.2, abs_tol=0.05)


def test_prompts_and_conditions_are_encoded_once(tiny, request_):
    pipeline = Pipeline.open(tiny.bundle, threads=1)
    other = replace(request_, prompt="a tree")
    steps = replace(request_, num_inference_steps=2)
    first = pipeline(request_)
    assert {"text_encoder", "text_kv", "time_embeds", "hint"} <= first.timings.keys()
    again = pipeline(request_)
    assert not {"text_encoder", "text_kv", "time_embeds", "hint"} & again.timings.keys()
    # Another schedule, the same encodings.
    assert {"text_encoder", "text_kv", "time_embeds", "hint"} & pipeline(steps).timings.keys() == {"time_embeds"}
    changed = pipeline(other)
    assert {"text_encoder", "text_kv"} <= changed.timings.keys()
    assert "hint" not in changed.timings
    assert not np.array_equal(changed.latents, first.latents)
    np.testing.assert_array_equal(pipeline(request_).latents, first.latents)
    np.testing.assert_array_equal(again.latents, first.latents)
    for n in range(MAX_ENCODINGS):
        pipeline(replace(steps, prompt=f"prompt {n}"))
    forgotten = pipeline(request_)
    assert "text_encoder" in forgotten.timings  # not the hint: every one of those prompts used it
    np.testing.assert_array_equal(forgotten.latents, first.latents)


def test_results_are_copies(tiny, request_):
    first = tiny.pipeline(request_)
    images, latents = first.images.copy(), first.latents.copy()
    tiny.pipeline(replace(request_, seed=12))
    np.testing.assert_array_equal(first.images, images)
    np.testing.assert_array_equal(first.latents, latents)


def test_a_random_seed_is_reported_and_repeats(tiny, request_):
    unseeded = replace(request_, seed=None)
    drawn = [tiny.pipeline(unseeded) for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed  # by chance once in four thousand million
    again = tiny.pipeline(replace(request_, seed=drawn[0].seed))
    np.testing.assert_array_equal(again.latents, drawn[0].latents)


def test_without_controls(tiny, request_):
    plain = tiny.pipeline(replace(request_, controls=()))
    assert "controlnet" not in plain.timings
    # A control of scale 0 adds zeros: the same as none.
    silent = replace(request_.controls[0], controlnet_conditioning_scale=0.0)
    silenced = tiny.pipeline(replace(request_, controls=[silent]))
    np.testing.assert_allclose(plain.latents, silenced.latents, rtol=1e-5, atol=1e-5)
    with_control = tiny.pipeline(request_)
    assert not np.allclose(plain.latents, with_control.latents, rtol=1e-3)


def test_a_condition_that_the_bundle_lacks(tiny, request_):
    canny = Control("canny", request_.controls[0].image)
    with pytest.raises(UserError, match=r"has no condition 'canny', only seg, depth: add it with `cnpp-trt export"):
        tiny.pipeline(replace(request_, controls=[canny]))
    with pytest.raises(UserError, match="has no condition 'hed'"):
        tiny.pipeline.extract("hed", canny.image)
    with pytest.raises(UserError, match="unknown condition 'pose'"):
        tiny.pipeline.extract("pose", canny.image)


def test_a_condition_without_an_extractor(tiny, request_):
    with pytest.raises(UserError, match="has no extractor for 'seg'"):
        tiny.pipeline.extract("seg", request_.controls[0].image)


def test_a_scheduler_that_cannot_take_so_many_steps(tiny, request_):
    with pytest.raises(UserError, match="original_inference_steps"):
        tiny.pipeline(replace(request_, scheduler="lcm", num_inference_steps=51))


@pytest.mark.parametrize("backend", ["", "cuda", "ONNXRuntime-cpu"])
def test_unknown_backends(tiny, backend):
    with pytest.raises(UserError, match=r"unknown backend .*: .*choose from auto, tensorrt, "):
        Pipeline.open(tiny.bundle, backend)


def test_a_bundle_may_be_given_opened_or_as_a_string(tiny, request_):
    expected = tiny.pipeline(request_).latents
    for bundle in (Bundle.open(tiny.bundle), str(tiny.bundle)):
        np.testing.assert_array_equal(Pipeline.open(bundle, threads=1)(request_).latents, expected)


def test_only_so_many_programs_are_kept(tiny, request_):
    pipeline = Pipeline.open(tiny.bundle, threads=1)

    def of(n: int) -> Request:
        return replace(request_, num_inference_steps=1, num_images_per_prompt=n)

    expected = {n: pipeline(of(n)).latents for n in range(1, 4)}
    for n in (1, *range(4, MAX_PROGRAMS + 2), 1, MAX_PROGRAMS + 2):
        pipeline(of(n))
    assert len(pipeline._preparation.programs.programs) == MAX_PROGRAMS
    # The least recently used went: 1 was used again and again, 2 and 3 were not.
    assert [s.images for s in pipeline._preparation.programs.programs] == [
        *range(4, MAX_PROGRAMS + 2),
        1,
        MAX_PROGRAMS + 2,
    ]
    for n, latents in expected.items():
        np.testing.assert_array_equal(pipeline(of(n)).latents, latents)


def test_programs_that_were_used_longest_ago_make_room_for_a_new_one(tiny, request_):
    class Small(OnnxRuntimeCpu):
        """Has room for the buffers of two loop shapes."""

        def reserve(self, graphs: Any, nbytes: int) -> None:
            if len(pipeline._preparation.programs.programs) >= room:
                raise DeviceMemoryError("full")

    room = 2
    pipeline = Pipeline(tiny.pipeline.bundle, Small(tiny.pipeline.bundle, threads=1))
    for n in (1, 2, 3, 2, 1):
        wanted = replace(request_, num_inference_steps=1, num_images_per_prompt=n)
        np.testing.assert_array_equal(pipeline(wanted).latents, tiny.pipeline(wanted).latents)
    assert [s.images for s in pipeline._preparation.programs.programs] == [2, 1]
    room = 0
    with pytest.raises(DeviceMemoryError, match="full"):
        pipeline(replace(request_, num_images_per_prompt=4))


def test_values_do_not_make_new_programs(tiny, request_):
    pipeline = Pipeline.open(tiny.bundle, threads=1)
    for fields in (
        {"seed": 2},
        {"prompt": "a tree"},
        {"negative_prompt": "rain"},
        {"guidance_scale": 3.0},
        {"controls": [replace(request_.controls[0], controlnet_conditioning_scale=0.2)]},
        {"num_inference_steps": 5},
        {"scheduler": "lcm"},
        {"num_inference_steps": 2},
    ):
        pipeline(replace(request_, **fields))
    assert len(pipeline._preparation.programs.programs) == 1
    pipeline(replace(request_, guidance_scale=1.0))
    assert len(pipeline._preparation.programs.programs) == 2


def test_threads_get_their_own_images(tiny, request_):
    requests = [replace(request_, seed=i, num_inference_steps=1 + i % 3, prompt=f"house {i}") for i in range(12)]
    expected = [tiny.pipeline(r).images for r in requests]
    start = threading.Barrier(6)

    def call(i: int) -> np.ndarray:
        if i < 6:
            start.wait(timeout=60)
        return tiny.pipeline(requests[i]).images

    with ThreadPoolExecutor(6) as pool:
        for found, want in zip(pool.map(call, range(12)), expected, strict=True):
            np.testing.assert_array_equal(found, want)


def test_the_callback_sees_every_step_and_cannot_disturb_the_next(tiny, request_):
    expected = tiny.pipeline(request_)
    seen: list[tuple[int, float]] = []

    def callback(k: int, timestep: float, latents: np.ndarray) -> None:
        seen.append((k, timestep))
        latents[...] = np.nan

    found = tiny.pipeline(request_, callback_on_step_end=callback)
    assert [k for k, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == sorted((t for _, t in seen), reverse=True)
    np.testing.assert_array_equal(found.latents, expected.latents)


def test_a_callback_cannot_draw(tiny, request_):
    """Drawing within a drawing would write over its buffers; waiting for itself would hang."""
    with pytest.raises(UserError, match="cannot be called from its own callback"):
        tiny.pipeline(request_, callback_on_step_end=lambda k, t, latents: tiny.pipeline(request_) and None)
    assert len(tiny.pipeline(request_).images) == request_.num_images_per_prompt


def test_a_callback_that_raises_leaves_the_pipeline_usable(tiny, request_):
    expected = tiny.pipeline(request_).latents

    def callback(k: int, timestep: float, latents: np.ndarray) -> None:
        if k == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.pipeline(request_, callback_on_step_end=callback)
    np.testing.assert_array_equal(tiny.pipeline(request_).latents, expected)


@pytest.mark.parametrize("graph", ["unet", "controlnet_seg", "vae_decoder"])
def test_a_file_that_is_no_graph(bundle_copy, request_, graph):
    file = bundle_copy / f"{graph}.onnx"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(BundleError, match=rf"is damaged: {graph}\.onnx changed since the export"):
        Pipeline.open(bundle_copy)(request_)
    _accept(bundle_copy, file.name)
    with pytest.raises(BundleError, match=rf"cannot load .*{graph}\.onnx.*cnpp-trt verify") as error:
        Pipeline.open(bundle_copy)(request_)
    assert "\n" not in str(error.value)


def test_a_graph_that_fails_while_running(tiny, bundle_copy, request_):
    """The update graph is replaced by one that reshapes its input to a size that it has not."""
    path = bundle_copy / "update.onnx"
    graph = onnx.load(path)
    guidance = next(i for i in graph.graph.input if i.name == "guidance")
    shape = onnx.helper.make_tensor("impossible", onnx.TensorProto.INT64, [2], [12345, 1])
    graph.graph.initializer.append(shape)
    graph.graph.node.insert(0, onnx.helper.make_node("Reshape", ["guidance", "impossible"], ["broken"]))
    for node in graph.graph.node[1:]:
        node.input[:] = ["broken" if name == guidance.name else name for name in node.input]
    onnx.save(graph, path)
    _accept(bundle_copy, "update.onnx")
    pipeline = Pipeline.open(bundle_copy)
    for _ in range(2):
        with pytest.raises(BackendError, match="ONNX Runtime failed in update: ") as error:
            pipeline(request_)
        assert "\n" not in str(error.value)


def test_a_bundle_without_a_tokenizer(bundle_copy):
    shutil.rmtree(bundle_copy / "tokenizer")
    with pytest.raises(BundleError, match=r"tokenizer/.* is missing"):
        Pipeline.open(bundle_copy)


def test_a_bundle_without_a_graph(bundle_copy, request_):
    edit(bundle_copy, lambda m: m["graphs"].pop("hint_seg"))
    with pytest.raises(BundleError, match="has no graph 'hint_seg'"):
        Pipeline.open(bundle_copy)(request_)


def _accept(bundle: Path, *files: str) -> None:
    """Has the manifest say what the files are now."""

    def change(manifest: dict[str, Any]) -> None:
        for file in files:
            content = (bundle / file).read_bytes()
            manifest["files"][file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit(bundle, change)


@pytest.mark.parametrize("resized", [False, True])
def test_a_result_shares_no_memory(tiny, control_image, resized):
    """Neither with what the caller gave nor with what the next request writes over."""
    width, height = (40, 24) if resized else tiny.size
    frame, photo = control_image(width, height), control_image(width, height, seed=1)
    request = Request("a house", "", [Control("seg", frame)], 2, seed=3, init_image=photo)
    first = tiny.pipeline(request)
    kept = [array.copy() for array in (first.images, first.latents, *first.control_images)]
    frame[:] = photo[:] = 7
    tiny.pipeline(replace(request, controls=[Control("seg", frame)], init_image=photo, seed=4))
    again = tiny.pipeline(request)
    for array, was, repeated in zip(
        (first.images, first.latents, *first.control_images),
        kept,
        (again.images, again.latents, *again.control_images),
        strict=True,
    ):
        np.testing.assert_array_equal(array, was)
        np.testing.assert_array_equal(repeated, was)
        assert array.flags.writeable
        for other in (frame, photo, controls_of(request)[0].image, request.init_image, repeated):
            assert not np.shares_memory(array, other)


def test_images_on_the_device_are_for_a_gpu(tiny, request_):
    with pytest.raises(UserError, match="onnxruntime-cpu runs on the CPU: call the pipeline for images on the host"):
        tiny.pipeline.on_device(request_)
