"""Every wrong value of a request is refused when it is made, by name, in one line."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Request
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.request import MAX_IMAGES
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS
from hypothesis import given
from hypothesis import strategies as st

IMAGE = np.zeros((16, 24, 3), np.uint8)
NO_NUMBERS = [True, False, "7", None, [1.0], 1j, math.nan, math.inf, -math.inf, 1e30, 10**400, np.float32("nan")]
NO_INTEGERS = [True, False, "7", 7.0, 7.5, None, [7], math.nan, math.inf, np.float64(7)]


def refused(make: Any, *words: str, **fields: Any) -> None:
    with pytest.raises(UserError) as error:
        make(**fields)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, -1, 1001, 10**30, np.int64(0)])
def test_steps(value: Any) -> None:
    refused(Request, "num_inference_steps", "from 1 to 1000", num_inference_steps=value)


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, -1, MAX_IMAGES + 1])
def test_images(value: Any) -> None:
    refused(Request, "num_images_per_prompt", f"1 to {MAX_IMAGES}", num_images_per_prompt=value)


@pytest.mark.parametrize("value", [v for v in [*NO_INTEGERS, -1, 2**64, 2**70, np.int64(-1)] if v is not None])
def test_seeds(value: Any) -> None:
    refused(Request, "seed", seed=value)


def test_the_last_image_must_have_a_seed_too() -> None:
    refused(Request, "seed", seed=2**64 - 1, num_images_per_prompt=2)
    assert Request(seed=2**64 - 2, num_images_per_prompt=2).seed == 2**64 - 2


def test_what_could_not_be_repeated_from_a_picture() -> None:
    """A record holds at most this much, so a request may not ask for more."""
    assert len(Request("x" * 100_000).prompt) == 100_000
    refused(Request, "prompt has more than 100000 characters", prompt="x" * 100_001)
    refused(Request, "17 controls are too many", controls=[Control("seg", IMAGE)] * 17)


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_guidance_scales(value: Any) -> None:
    refused(Request, "guidance_scale", guidance_scale=value)


@pytest.mark.parametrize("value", ["", "UniPC", "pndm", None, 3, ["unipc"], np.zeros(2)])
def test_schedulers(value: Any) -> None:
    refused(Request, "unknown scheduler", *SCHEDULERS, scheduler=value)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("value", [None, 3, ["a house"], b"a house"])
def test_prompts(name: str, value: Any) -> None:
    refused(Request, f"{name} must be a string", type(value).__name__, **{name: value})


@pytest.mark.parametrize("value", [None, 3, "seg", Control("seg", IMAGE), ["seg"], [IMAGE], [Control("seg", IMAGE), 1]])
def test_controls_are_a_list_of_controls(value: Any) -> None:
    refused(Request, "controls must be", controls=value)


def test_guess_mode_is_refused_not_ignored() -> None:
    refused(Request, "guess_mode is not supported", guess_mode=True)


@pytest.mark.parametrize("value", ["", "Seg", "pose", None, 3, ["seg"]])
def test_conditions(value: Any) -> None:
    refused(Control, "unknown condition", "seg, canny, hed, lineart, depth", condition=value, image=IMAGE)


@pytest.mark.parametrize(
    "image",
    [
        None,
        "mask.png",
        IMAGE.tolist(),
        IMAGE.astype(np.float32),
        IMAGE.astype(np.int64),
        IMAGE[:, :, 0],
        IMAGE[:, :, :2],
        IMAGE[None],
        np.zeros((16, 24, 4), np.uint8),
        np.zeros((0, 24, 3), np.uint8),
        np.zeros((16, 0, 3), np.uint8),
    ],
)
def test_control_images(image: Any) -> None:
    refused(Control, "the seg image", condition="seg", image=image)


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", ["controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"])
def test_numbers_of_a_control(name: str, value: Any) -> None:
    refused(Control, name, condition="seg", image=IMAGE, **{name: value})


@pytest.mark.parametrize("window", [(-0.1, 1), (0, 1.1), (0.5, 0.5), (0.6, 0.4), (1, 1), (0, 0), (1.0, 2.0)])
def test_windows(window: tuple[float, float]) -> None:
    start, end = window
    refused(
        Control,
        "0 <= start < end <= 1",
        condition="seg",
        image=IMAGE,
        control_guidance_start=start,
        control_guidance_end=end,
    )


@given(
    st.integers(1, 1000),
    st.integers(0, 2**64 - MAX_IMAGES),
    st.integers(1, MAX_IMAGES),
    st.floats(-1e4, 1e4),
    st.sampled_from(SCHEDULERS),
)
def test_what_is_in_range_is_taken(steps: int, seed: int, images: int, guidance: float, scheduler: str) -> None:
    request = Request("", "", (), steps, guidance, scheduler, seed, images)
    assert request.guided is (guidance > 1)


def test_numpy_numbers_and_lists_are_taken() -> None:
    control = Control("seg", IMAGE, np.float32(0.5), np.float64(0), np.int64(1))
    request = Request("", "", [control], np.int64(4), np.float32(2), "lcm", np.uint64(2**63), np.int32(2))
    assert request.controls == (control,)
    json.dumps([request.num_inference_steps, request.guidance_scale, request.seed, request.num_images_per_prompt])
    json.dumps([control.controlnet_conditioning_scale, control.control_guidance_start, control.control_guidance_end])


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_active_steps_are_diffusers_controlnet_keep(n: int, a: float, b: float) -> None:
    start, end = min(a, b), max(a, b)
    if start == end:
        return
    # The line of StableDiffusionControlNetPipeline.__call__ that decides it.
    keep = [1.0 - float(i / n < start or (i + 1) / n > end) for i in range(n)]
    assert [float(x) for x in Control("seg", IMAGE, 1.0, start, end).active(n)] == keep


def test_an_array_that_is_filled_anew_changes_no_request() -> None:
    """A camera gives one array again and again."""
    frame = IMAGE.copy()
    control = Control("seg", frame)
    request = Request(controls=[control], init_image=frame[::-1])
    copied = replace(request, prompt="another")
    frame[:] = 7
    for held, was in ((control.image, IMAGE), (request.init_image, IMAGE[::-1]), (copied.init_image, IMAGE[::-1])):
        np.testing.assert_array_equal(held, was)
        assert not np.shares_memory(held, frame)
        with pytest.raises(ValueError, match="read-only"):
            held[:] = 0
    assert request.controls[0] is control


@pytest.mark.parametrize("image", [np.asfortranarray(IMAGE), IMAGE[:, ::-1], np.broadcast_to(IMAGE[0, 0], (8, 8, 3))])
def test_images_of_any_layout(image: np.ndarray) -> None:
    held = Control("seg", image).image
    np.testing.assert_array_equal(held, image)
    assert held.flags.c_contiguous and type(held) is np.ndarray
