"""Every wrong value of a request is refused when it is made, by name, in one line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Request, read_image
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS
from cnpp_trt.runtime.settings.request import MAX_IMAGES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from requested import controls_of

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


@pytest.mark.parametrize("value", [v for v in [*NO_INTEGERS, 0, -1, 1001, 10**30, np.int64(0)] if v is not None])
def test_steps(value: Any) -> None:
    refused(Request, "num_inference_steps", "from 1 to 1000", num_inference_steps=value)


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, -1, MAX_IMAGES + 1])
def test_images(value: Any) -> None:
    refused(Request, "num_images_per_prompt", f"1 to {MAX_IMAGES}", num_images_per_prompt=value)


@pytest.mark.parametrize(
    "value", [*(v for v in NO_INTEGERS if v not in (None, [7])), -1, 2**64, 2**70, np.int64(-1), [-1], [2**64], ["7"]]
)
def test_seeds(value: Any) -> None:
    refused(Request, "seed", seed=value)


def test_the_last_image_must_have_a_seed_too() -> None:
    refused(Request, "seed", seed=2**64 - 1, num_images_per_prompt=2)
    assert Request(seed=2**64 - 2, num_images_per_prompt=2).seed == 2**64 - 2


def test_a_seed_for_each_image() -> None:
    assert Request(seed=[7, 2**64 - 1], num_images_per_prompt=2).seed == (7, 2**64 - 1)
    seeds: Any = np.array([3])
    assert Request(seed=seeds).seed == (3,)
    refused(Request, "1 seeds for 2 images", seed=[7], num_images_per_prompt=2)
    refused(Request, "0 seeds for 1 images", seed=())


def test_what_could_not_be_repeated_from_a_picture() -> None:
    """A record holds at most this much, so a request may not ask for more."""
    assert len(Request("x" * 100_000).prompt) == 100_000
    refused(Request, "prompt has more than 100000 characters", prompt="x" * 100_001)
    refused(Request, "17 controls are too many", controls=[Control("seg", IMAGE)] * 17)


@pytest.mark.parametrize("value", [v for v in NO_NUMBERS if v is not None])
def test_guidance_scales(value: Any) -> None:
    refused(Request, "guidance_scale", guidance_scale=value)


@pytest.mark.parametrize("value", ["", "UniPC", "pndm", 3, ["unipc"], np.zeros(2)])
def test_schedulers(value: Any) -> None:
    refused(Request, "unknown scheduler", *SCHEDULERS, scheduler=value)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("value", [None, 3, ["a house"], b"a house"])
def test_prompts(name: str, value: Any) -> None:
    refused(Request, f"{name} must be a string", type(value).__name__, **{name: value})


@pytest.mark.parametrize(
    "value", [None, 3, "seg", ["seg"], [IMAGE], [Control("seg", IMAGE), 1], {Control("seg", IMAGE)}]
)
def test_controls_are_a_list_of_controls(value: Any) -> None:
    refused(Request, "controls must be", controls=value)


@pytest.mark.parametrize("name", ["guess_mode", "long_prompt", "prompt_weights", "clip_skip_negative"])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_switches(name: str, value: Any) -> None:
    refused(Request, f"{name} must be True or False", **{name: value})


def test_settings_that_are_none_are_the_models_own() -> None:
    assert Request("a").num_inference_steps is None
    resolved = Request("a", guidance_scale=2, seed=5, num_images_per_prompt=2).resolve(SamplingDefaults(4, 9.0, "lcm"))
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.scheduler) == (4, 2.0, "lcm")
    assert resolved.seeds == (5, 6) and resolved.prompt == "a"
    assert SamplingDefaults() == SamplingDefaults(20, 7.5, "unipc")
    drawn = {Request().resolve(SamplingDefaults()).seeds for _ in range(8)}
    assert len(drawn) > 1  # random where none is given


def test_a_repr_is_short() -> None:
    control = Control("seg", np.zeros((512, 768, 3), np.uint8), 0.5)
    assert repr(control) == "Control(condition='seg', image=<768x512 image>, controlnet_conditioning_scale=0.5)"
    assert repr(Request("a", controls=control)) == f"Request(prompt='a', controls=({control!r},))"


@pytest.mark.parametrize("value", ["", "Seg", "pose", None, 3, ["seg"]])
def test_conditions(value: Any) -> None:
    refused(Control, "unknown condition", "seg, canny, hed, lineart, depth", condition=value, image=IMAGE)


@pytest.mark.parametrize(
    "image",
    [
        None,
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


def test_images_of_pillow_and_paths(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    for image in (picture, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(Control("seg", image).pixels, pixels)
        np.testing.assert_array_equal(Request(init_image=image).init_image, pixels)
    refused(Control, "no such file", "mask.png", condition="seg", image="mask.png")
    (tmp_path / "text.png").write_text("no image")
    refused(Request, "is not an image", init_image=tmp_path / "text.png")


@pytest.mark.parametrize("kind", ["control", "init"])
def test_transparent_images_of_pillow(kind: str) -> None:
    """Nothing is black in a control image, and white in a picture to begin with."""
    alpha = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    found = Control("seg", alpha).pixels if kind == "control" else Request(init_image=alpha).init_image
    assert isinstance(found, np.ndarray)
    assert (found == (0 if kind == "control" else 255)).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "LA", "I;16"])
def test_pillows_modes_are_read_as_their_files_are(mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    picture = Image.fromarray(pixels).convert("L").convert("I;16") if mode == "I;16" else Image.fromarray(pixels)
    picture = picture if mode == "I;16" else picture.convert(mode)
    name = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(name)
    np.testing.assert_array_equal(Control("depth", picture).pixels, read_image(name).pixels)


def test_a_picture_of_pillow_is_turned_upright(tmp_path: Path) -> None:
    """As its file is: a phone's photo lies on its side, and says so."""
    pixels = np.random.default_rng(2).integers(0, 256, (16, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        found = Control("depth", picture).pixels
        np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(picture)))
    assert found.shape == (24, 16, 3)


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
    request = Request("", "", (), steps, guidance, scheduler, seed, images).resolve(SamplingDefaults())
    assert request.guided is (guidance > 1)
    assert request.seeds == tuple(seed + i for i in range(images))


def test_numpy_numbers_and_lists_are_taken() -> None:
    scalars: Any = np  # annotated are Python's numbers
    control = Control("seg", IMAGE, scalars.float32(0.5), scalars.float64(0), scalars.int64(1))
    request = Request(
        "", "", [control], scalars.int64(4), scalars.float32(2), "lcm", scalars.uint64(2**63), scalars.int32(2)
    )
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
        assert isinstance(held, np.ndarray)
        np.testing.assert_array_equal(held, was)
        assert not np.shares_memory(held, frame)
        with pytest.raises(ValueError, match="read-only"):
            held[:] = 0
    assert controls_of(request)[0] is control


@pytest.mark.parametrize("image", [np.asfortranarray(IMAGE), IMAGE[:, ::-1], np.broadcast_to(IMAGE[0, 0], (8, 8, 3))])
def test_images_of_any_layout(image: np.ndarray) -> None:
    held = Control("seg", image).image
    assert type(held) is np.ndarray
    np.testing.assert_array_equal(held, image)
    assert held.flags.c_contiguous
