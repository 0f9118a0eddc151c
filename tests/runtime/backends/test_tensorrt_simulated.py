"""The backend `tensorrt` on a simulated GPU: real cuda-python, a simulated driver, ONNX Runtime in TensorRT's place.

What this can show is order, addresses, lifetimes and waits: everything that a launch touches is checked whenever it
runs. What it cannot show is TensorRT itself and speed: tests/gpu does that on a GPU.
"""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def simulate(simulated_gpu: Any, tiny: Any, tmp_path: Path) -> Any:
    """`simulate(function, argument, …)`: what a function of tests/programs/tensorrt_simulated.py prints."""

    def run(function: str, *arguments: str, **options: Any) -> str:
        places = tiny.bundle, tmp_path / "plans"
        return simulated_gpu.program("tensorrt_simulated", function, *places, *arguments, **options)

    return run


@pytest.mark.parametrize("lazy", [False, True])
def test_recorded_and_unrecorded_draw_the_cpu_backends_images(simulate, lazy):
    """Lazily, nothing runs before something waits for it: a forgotten wait would show as stale data."""
    simulate(
        "recorded_and_unrecorded_draw_the_cpu_backends_images",
        lazy=lazy,
    )


def test_images_to_begin_with_long_prompts_and_clip_skip(simulate):
    """Each as the CPU backend draws it; an initial image's strength and the prompt are no reason to record again."""
    simulate("images_to_begin_with_long_prompts_and_clip_skip")


def test_a_graph_launch_for_each_step_and_no_wait_inside(simulate):
    simulate("a_graph_launch_for_each_step_and_no_wait_inside")


def test_values_are_data_in_the_recording(simulate):
    simulate("values_are_data_in_the_recording")


def test_two_hundred_mixed_requests_need_no_more_memory(simulate):
    simulate(
        "two_hundred_mixed_requests_need_no_more_memory",
        timeout=300,
    )


def test_a_recording_keeps_its_memory_and_gives_it_back(simulate):
    simulate("a_recording_keeps_its_memory_and_gives_it_back")


def test_garbage_that_is_collected_during_a_capture_does_not_spoil_it(simulate):
    """To free device memory is not allowed while the thread captures; a pipeline that is gone leaves a cycle that has
    some."""
    simulate("garbage_that_is_collected_during_a_capture_does_not_spoil_it")


def test_requests_of_several_threads_queue(simulate):
    simulate("requests_of_several_threads_queue")


def test_a_card_that_is_too_small_gets_one_line_before_anything_is_loaded(simulate):
    out = simulate(
        "a_card_that_is_too_small_gets_one_line_before_anything_is_loaded",
        memory=3 << 20,
    )
    assert (
        "weights 0.01 GiB + activations 0.00 GiB + buffers 0.00 GiB together: 0.01 GiB of device memory is needed"
        in out
    )
    assert "is free on" in out


def test_memory_by_part(simulate):
    simulate("memory_by_part")


def test_what_was_compiled_is_kept_for_the_next_process(simulate):
    simulate("what_was_compiled_is_kept_for_the_next_process")


@pytest.mark.parametrize(
    ("graph", "message"),
    [("unet", "step 2 of 3: unet gives values that are not finite in noise_pred"),
     ("controlnet_seg", "step 2 of 3: controlnet_seg gives values that are not finite in mid"),
     ("vae_decoder", "the decoder's image is not finite")],
)  # fmt: skip
def test_a_nan_is_traced_to_its_graph(simulate, graph, message):
    """The second call of the graph, and every one after it, gives NaN; recorded and launch by launch."""
    out = simulate(
        "a_nan_is_traced_to_its_graph",
        graph,
    )
    assert message in out


def test_what_cannot_be_captured_runs_launch_by_launch_and_says_so(simulate):
    simulate("what_cannot_be_captured_runs_launch_by_launch_and_says_so")


def test_a_plan_that_was_changed_is_not_loaded(simulate):
    out = simulate("a_plan_that_was_changed_is_not_loaded")
    assert "is damaged and was not loaded: run `cnpp-trt build` again" in out


def test_plans_that_are_missing_or_of_another_version_or_size(simulate):
    out = simulate("plans_that_are_missing_or_of_another_version_or_size")
    size, version, missing = out.splitlines()[-3:]
    assert "no plan of text_encoder takes input_ids [6, 77]" in size
    assert "no plan of text_encoder for tensorrt-rtx 1.8.0 on" in version
    assert "only for 1.7.1.116 for portable: make them with `cnpp-trt build --bundle" in version
    assert "no plan of text_encoder for tensorrt-rtx 1.8.0" in missing


def test_auto_takes_plans_where_there_are_some_and_says_why_not(simulate):
    out = simulate("auto_takes_plans_where_there_are_some_and_says_why_not")
    taken, other = out.splitlines()[-2:]
    assert taken == "tensorrt-rtx"
    assert other.startswith("onnxruntime-cpu not tensorrt: no plan of text_encoder")
    assert "not onnxruntime-cuda: this onnxruntime has no CUDA provider" in other


def test_every_rung_draws_the_same_bytes(simulate):
    simulate("every_rung_draws_the_same_bytes")


def test_a_single_request_records_nothing(simulate):
    simulate("a_single_request_records_nothing")


def test_a_recording_that_does_not_fit_is_not_made(simulate):
    simulate("a_recording_that_does_not_fit_evicts_or_is_not_made")
