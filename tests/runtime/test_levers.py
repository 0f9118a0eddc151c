"""What a request may leave out of the exact loop, against diffusers' own pipeline with the same left out by hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.benchmarks.pytorch import PyTorch, ReferenceOutput
from cnpp_trt.bundles.manifest import GraphOptions
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.runtime.loop import Program
from cnpp_trt.runtime.settings.request import ResolvedRequest
from fixture_cache import exported

STEPS = 5
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def reference(tiny: Any) -> PyTorch:
    return PyTorch(Checkpoint(str(tiny.checkpoint)))


@pytest.fixture
def request_of(tiny: Any, control_image: Callable[..., np.ndarray]) -> Callable[..., ResolvedRequest]:
    def make(*conditions: str, **fields: Any) -> ResolvedRequest:
        controls = [Control(c, control_image(*tiny.size, seed=i)) for i, c in enumerate(conditions or ("seg",))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "scheduler": "ddim", "seed": 3, **fields}
        return tiny.pipeline.resolve(Request("a red house", "blurry", controls, **settings))

    return make


@contextmanager
def replaced_outputs(module: Any, change: Callable[[int, Any], Any]) -> Iterator[None]:
    """Each call's output goes through `change`, with the number of the call."""
    calls = 0

    def hook(_: Any, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return change(calls - 1, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def unguided_at(steps: set[int]) -> Callable[[int, Any], Any]:
    """The negative prompt's half is the prompt's: diffusers' guidance then gives the prompt's prediction."""

    def change(k: int, output: Any) -> Any:
        if k not in steps:
            return output
        _, prompt = output[0].chunk(2)
        return (prompt.repeat(2, 1, 1, 1),)

    return change


def guided_as_before_at(steps: set[int]) -> Callable[[int, Any], Any]:
    """There the negative prompt's half is as far from the prompt's as at the last step that is none of these."""
    difference: Any = None

    def change(k: int, output: Any) -> Any:
        nonlocal difference
        negative, prompt = output[0].chunk(2)
        if k not in steps:
            difference = prompt - negative
            return output
        return (torch.cat([prompt - difference, prompt]),)

    return change


def kept_at(steps: set[int]) -> Callable[[int, Any], Any]:
    """At these steps the output of the step before."""
    last: Any = None

    def change(k: int, output: Any) -> Any:
        nonlocal last
        if k not in steps:
            last = output
        return last

    return change


def assert_same(found: Any, expected: ReferenceOutput) -> None:
    difference = np.linalg.norm(found.latents - expected.latents) / np.linalg.norm(expected.latents)
    assert difference <= RELATIVE
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


def assert_differs(found: Any, exact: Any) -> None:
    assert np.abs(found.latents - exact.latents).max() > 1e-3


INTERVALS = [(0.0, 0.6, {3, 4}), (0.4, 1.0, {0, 1}), (0.2, 0.8, {0, 4})]


@pytest.mark.parametrize(("start", "end", "unguided"), INTERVALS)
def test_outside_its_interval_guidance_is_left_out(tiny, reference, request_of, start, end, unguided):
    request = request_of("seg", "depth", guidance_start=start, guidance_end=end, num_images_per_prompt=2)
    with replaced_outputs(reference.pipeline(request).unet, unguided_at(unguided)):
        expected = reference(request)
    found = tiny.pipeline(request)
    assert_same(found, expected)
    assert_differs(found, tiny.pipeline(request_of("seg", "depth", num_images_per_prompt=2)))


def test_unguided_steps_follow_guess_mode_and_scales(tiny, reference, request_of):
    request = request_of(guess_mode=True, guidance_end=0.6)
    with replaced_outputs(reference.pipeline(request).unet, unguided_at({3, 4})):
        expected = reference(request)
    assert_same(tiny.pipeline(request), expected)


@pytest.mark.parametrize(("interval", "kept"), [(2, {1, 3}), (3, {1, 2, 4}), (9, {1, 2, 3, 4})])
@pytest.mark.parametrize("conditions", [("seg",), ("seg", "depth")])
def test_residuals_serve_several_steps(tiny, reference, request_of, conditions, interval, kept):
    request = request_of(*conditions, controlnet_interval=interval)
    with replaced_outputs(reference.pipeline(request).controlnet, kept_at(kept)):
        expected = reference(request)
    found = tiny.pipeline(request)
    assert_same(found, expected)
    assert_differs(found, tiny.pipeline(request_of(*conditions)))


def test_both_together_run_the_controlnet_anew_where_the_batch_changes(tiny, reference, request_of):
    request = request_of(guidance_end=0.6, controlnet_interval=2)
    pipeline = reference.pipeline(request)
    with (
        replaced_outputs(pipeline.unet, unguided_at({3, 4})),
        replaced_outputs(pipeline.controlnet, kept_at({1, 4})),
    ):
        expected = reference(request)
    assert_same(tiny.pipeline(request), expected)


@pytest.mark.parametrize(("interval", "again"), [(2, {1, 3}), (3, {1, 2, 4})])
@pytest.mark.parametrize("conditions", [("seg",), ("seg", "depth")])
def test_guidance_serves_several_steps(tiny, reference, request_of, conditions, interval, again):
    request = request_of(*conditions, guidance_interval=interval, num_images_per_prompt=2)
    with replaced_outputs(reference.pipeline(request).unet, guided_as_before_at(again)):
        expected = reference(request)
    found = tiny.pipeline(request)
    assert_same(found, expected)
    assert_differs(found, tiny.pipeline(request_of(*conditions, num_images_per_prompt=2)))


def test_guidance_is_not_used_again_outside_its_interval(tiny, reference, request_of):
    request = request_of(guidance_end=0.6, guidance_interval=2, guess_mode=True)
    unet = reference.pipeline(request).unet
    with replaced_outputs(unet, guided_as_before_at({1})), replaced_outputs(unet, unguided_at({3, 4})):
        expected = reference(request)
    assert_same(tiny.pipeline(request), expected)


# Residuals of a step of both sides serve one that runs the prompt alone; the other way round there are too few.
@pytest.mark.parametrize(("interval", "kept"), [(2, {1, 3}), (3, {1, 2})])
@pytest.mark.parametrize("conditions", [("seg",), ("seg", "depth")])
def test_guidance_and_residuals_serve_several_steps(tiny, reference, request_of, conditions, interval, kept):
    request = request_of(*conditions, guidance_interval=2, controlnet_interval=interval, num_images_per_prompt=2)
    pipeline = reference.pipeline(request)
    with (
        replaced_outputs(pipeline.unet, guided_as_before_at({1, 3})),
        replaced_outputs(pipeline.controlnet, kept_at(kept)),
    ):
        expected = reference(request)
    assert_same(tiny.pipeline(request), expected)


def test_guidance_is_not_used_again_at_sizes_that_no_gpu_could_align(tiny, request_of, monkeypatch):
    monkeypatch.setattr(tiny.pipeline.bundle.manifest, "width", 72)
    with pytest.raises(
        UserError, match=r"^guidance_interval needs a width and height that are multiples of 64, not 72x"
    ):
        tiny.pipeline._plan(request_of(guidance_interval=2))


def launched(program: Program) -> list[list[tuple[str, int]]]:
    """For each step its graphs and the rows of the batch that they run on."""
    return [
        [(s.graph, (s.outputs.get("noise_pred") or s.outputs["mid"]).shape[0]) for s in program.step(k) if s.graph in
         ("unet", "controlnet_seg")]
        for k in range(program.schedule.steps)
    ]  # fmt: skip


def test_what_is_left_out_is_not_launched(tiny, request_of):
    program = tiny.pipeline.prepare(request_of(guidance_end=0.6, controlnet_interval=2)).program
    both, unet = [("controlnet_seg", 2), ("unet", 2)], [("unet", 2)]
    assert launched(program) == [both, unet, both, [("controlnet_seg", 1), ("unet", 1)], [("unet", 1)]]
    program = tiny.pipeline.prepare(request_of(guidance_interval=2, controlnet_interval=2)).program
    assert launched(program) == [both, [("unet", 1)], both, [("unet", 1)], both]


def test_levers_that_are_off_leave_the_launch_list_as_it_is(tiny, request_of):
    off = {"guidance_interval": 1, "controlnet_interval": 1}
    plain, said = request_of(), request_of(guidance_start=0.0, guidance_end=1.0, **off)
    assert tiny.pipeline._plan(plain).key == tiny.pipeline._plan(said).key
    np.testing.assert_array_equal(tiny.pipeline(plain).latents, tiny.pipeline(said).latents)


def test_an_interval_of_guidance_means_nothing_without_guidance(tiny, request_of):
    plain, said = request_of(guidance_scale=1.0), request_of(guidance_scale=1.0, guidance_end=0.5, guidance_interval=2)
    assert tiny.pipeline._plan(plain).key == tiny.pipeline._plan(said).key


@pytest.fixture(scope="module")
def cached(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The tiny model in a bundle that was exported for caching."""
    bundle, checkpoint = tmp_path_factory.mktemp("bundles") / "cached", Checkpoint(str(tiny.checkpoint))
    exported(
        "tiny-cached",
        bundle,
        lambda out: export_bundle(checkpoint, ["seg", "depth"], out, options=GraphOptions(deep_cache=True)),
    )
    return Pipeline.open(bundle, threads=1)


@contextmanager
def deep_cache(pipeline: Any, interval: int) -> Iterator[None]:
    """DeepCache's own implementation: it wraps the forwards of the pipeline's UNet."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


@pytest.mark.slow
@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("conditions", [("seg",), ("seg", "depth")])
def test_deep_features_are_those_of_deep_cache(cached, reference, request_of, conditions, interval):
    request = request_of(*conditions, cache_interval=interval, num_images_per_prompt=2)
    pipeline, shallow = reference.pipeline(request), {k for k in range(STEPS) if k % interval}
    with deep_cache(pipeline, interval), replaced_outputs(pipeline.controlnet, kept_at(shallow)):
        expected = reference(request)
    found = cached(request)
    assert_same(found, expected)
    assert_differs(found, cached(request_of(*conditions, num_images_per_prompt=2)))


@pytest.mark.slow
def test_deep_features_and_guidance_serve_several_steps(cached, reference, request_of):
    request = request_of("seg", "depth", cache_interval=2, guidance_interval=2)
    pipeline = reference.pipeline(request)
    with (
        deep_cache(pipeline, 2),
        replaced_outputs(pipeline.unet, guided_as_before_at({1, 3})),
        replaced_outputs(pipeline.controlnet, kept_at({1, 3})),
    ):
        expected = reference(request)
    assert_same(cached(request), expected)


@pytest.mark.slow
def test_both_sides_of_guidance_take_no_deep_features_of_one(cached, request_of):
    program = cached.prepare(request_of(cache_interval=3, guidance_interval=2)).program
    steps = [
        [(s.graph, s.outputs["noise_pred"].shape[0]) for s in program.step(k) if s.stage == "unet"] for k in range(5)
    ]
    both, prompt = 2, 1
    assert [step for [step] in steps] == [
        ("unet", both), ("unet_shallow", prompt), ("unet_shallow", both), ("unet", prompt), ("unet", both),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_bundle_that_can_cache_draws_the_same_without(cached, tiny, request_of):
    np.testing.assert_allclose(cached(request_of()).latents, tiny.pipeline(request_of()).latents, atol=1e-5)


@pytest.mark.slow
def test_the_deeper_layers_run_anew_where_the_batch_changes(cached, request_of):
    request = request_of(cache_interval=3, controlnet_interval=2, guidance_end=0.6)
    program = cached.prepare(request).program
    names = [[s.graph for s in program.step(k) if s.graph not in ("", "update")] for k in range(STEPS)]
    whole, outer = ["controlnet_seg", "unet"], ["unet_shallow"]
    assert names == [whole, outer, outer, whole, outer]
    rows = [s.outputs["noise_pred"].shape[0] for k in range(STEPS) for s in program.step(k) if s.stage == "unet"]
    assert rows == [2, 2, 2, 1, 1]
    assert np.isfinite(cached(request).latents).all()


def test_a_bundle_that_cannot_cache_says_how_to_export_one(tiny, request_of):
    with pytest.raises(UserError, match=r"^cache_interval needs the graph unet_shallow, .*--deep-cache"):
        tiny.pipeline(request_of(cache_interval=2))


LEVERS: list[dict[str, Any]] = [
    {"guidance_end": 0.6}, {"guidance_start": 0.4}, {"guidance_interval": 2}, {"controlnet_interval": 2},
    {"timestep_spacing": "trailing"},
]  # fmt: skip


def test_requests_of_different_levers_do_not_run_together(tiny, request_of):
    requests = [request_of(), *(request_of(**levers) for levers in LEVERS)]
    assert len({tiny.pipeline._plan(r).key for r in requests}) == len(requests)
    together = tiny.pipeline.batch([r for r in requests for _ in range(2)])
    for found, request in zip(together[::2], requests, strict=True):
        np.testing.assert_allclose(found.latents, tiny.pipeline(request).latents, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_start 0.5 and guidance_end 0.5 must satisfy"),
        ({"guidance_end": "x"}, "guidance_end must be a number"),
        ({"guidance_interval": 1.5}, "guidance_interval must be a whole number from 1 to 1000"),
        ({"controlnet_interval": 0}, "controlnet_interval must be a whole number from 1 to 1000"),
        ({"timestep_spacing": "Karras"}, "unknown timestep_spacing"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Request("a", **fields)


def test_a_bundle_that_is_there_gains_no_deep_feature(tiny):
    checkpoint = Checkpoint(str(tiny.checkpoint))
    with pytest.raises(UserError, match=r"has its graphs divided in another way: choose another --out$"):
        export_bundle(checkpoint, ["seg"], tiny.bundle, options=GraphOptions(deep_cache=True))
