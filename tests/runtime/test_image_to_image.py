"""Image-to-image draws diffusers' pictures: the same weights, image, strength and seed through diffusers' pipelines."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from fixture_cache import exported
from PIL import Image

pytestmark = pytest.mark.slow

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}


def load(checkpoint: Any, vae: Any = None) -> dict[str, Any]:
    text_encoder = transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32),
        "vae": vae or diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32),
        "text_encoder": text_encoder,
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
    }


@pytest.fixture(scope="module")
def components(tiny: Any) -> dict[str, Any]:
    return load(tiny.checkpoint)


def reference(checkpoint: Any, components: dict[str, Any], request: Request) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [B,H,W,3], the last latents [B,4,h,w])"""
    request = request.resolve(SamplingDefaults())
    target, overrides = SCHEDULERS[request.scheduler]
    config = diffusers.DDIMScheduler.load_config(checkpoint / "scheduler")
    parts = {
        **components,
        "scheduler": target.from_config(config, **overrides),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    control: dict[str, Any] = {}
    if request.controls:
        [given] = request.controls
        folder = checkpoint / "controlnet" / given.condition
        controlnet = diffusers.ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline = diffusers.StableDiffusionControlNetImg2ImgPipeline(controlnet=controlnet, **parts)
        control = {
            "control_image": Image.fromarray(given.pixels),
            "controlnet_conditioning_scale": given.controlnet_conditioning_scale,
            "control_guidance_start": given.control_guidance_start,
            "control_guidance_end": given.control_guidance_end,
        }
    else:
        pipeline = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    latents = []

    def remember(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"].numpy().copy())
        return kwargs

    draw: Any = pipeline
    assert request.init_image is not None
    images = draw(
        request.prompt,
        image=Image.fromarray(request.init_image),
        strength=request.strength,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images_per_prompt,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
        output_type="np",
        callback_on_step_end=remember,
        **control,
    ).images
    return (images * 255).round().astype(np.uint8), latents[-1]


def assert_same(pipeline: Pipeline, request: Request, expected: tuple[np.ndarray, np.ndarray]) -> None:
    found = pipeline(request)
    images, latents = expected
    assert found.images.shape == images.shape
    assert np.linalg.norm(found.latents - latents) <= 1e-4 * np.linalg.norm(latents)
    assert np.abs(found.images.astype(int) - images).max() <= 1
    assert found.images.std() > 1  # two flat colors would agree whatever went wrong


@pytest.fixture
def photo(control_image: Any) -> np.ndarray:
    noise = np.random.default_rng(5).integers(0, 40, (64, 64, 3))
    return (control_image(64, 64, 3) * 0.8 + noise).clip(0, 255).astype(np.uint8)


CASES = [(0.5, 4.0, 1, 1), (0.5, 1.0, 0, 2), (1.0, 4.0, 0, 1), (0.2, 4.0, 1, 2), (0.9, 1.0, 1, 1)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("strength", "guidance", "controls", "images"), CASES)
def test_diffusers_pictures(tiny, components, control_image, photo, scheduler, strength, guidance, controls, images):
    """With a control that applies to a part of the steps, of those that are left."""
    seg = Control("seg", control_image(64, 64), 0.8, control_guidance_start=0.1, control_guidance_end=0.7)
    request = Request(
        "a red house",
        "blurry",
        controls=(seg,) * controls,
        num_inference_steps=8,
        guidance_scale=guidance,
        scheduler=scheduler,
        seed=11,
        num_images_per_prompt=images,
        init_image=photo,
        strength=strength,
    )
    assert_same(tiny.pipeline, request, reference(tiny.checkpoint, components, request))


def test_another_size_is_resized_as_diffusers_does(tiny, components, control_image):
    request = Request("", num_inference_steps=4, seed=1, init_image=control_image(100, 80), strength=0.6)
    expected = reference(tiny.checkpoint, components, replace_image(request))
    assert_same(tiny.pipeline, request, expected)
    assert "the initial image was resized from 100x80 to 64x64 (lanczos)" in tiny.pipeline(request).notes


def replace_image(request: Request) -> Request:
    from dataclasses import replace

    assert isinstance(request.init_image, np.ndarray)
    resized = Image.fromarray(request.init_image).resize((64, 64), Image.Resampling.LANCZOS)
    return replace(request, init_image=np.array(resized))


def test_the_less_strength_the_nearer_to_the_image(miniature, photo):
    image = np.array(Image.fromarray(photo).resize(miniature.size, Image.Resampling.BICUBIC))
    distances = []
    for strength in (0.2, 0.6, 1.0):
        request = Request("", num_inference_steps=10, guidance_scale=1.0, seed=1, init_image=image, strength=strength)
        distances.append(np.abs(miniature.pipeline(request).images[0].astype(int) - image).mean())
    assert distances == sorted(distances)
    assert distances[0] < 0.7 * distances[2]  # the VAE alone does not bring such an image back


@pytest.mark.parametrize(
    ("strength", "word"), [(0.0, "above 0"), (1.2, "at most 1"), (-1, "above 0"), (None, "number")]
)
def test_strengths_that_are_none(photo, strength, word):
    with pytest.raises(UserError, match=word):
        Request("", init_image=photo, strength=strength)


def test_a_strength_that_leaves_no_step(tiny, photo):
    with pytest.raises(UserError, match=r"strength 0.1 leaves none of 5 steps"):
        tiny.pipeline(Request("", num_inference_steps=5, init_image=photo, strength=0.1))


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), 5])
def test_images_that_are_none(image):
    with pytest.raises(UserError, match="the initial image"):
        Request("", init_image=image)


def test_a_tiny_vae(tiny, photo, tmp_path_factory):
    """It draws nothing: the noise begins with what the latents start from."""

    def make(out: Path) -> None:
        torch.manual_seed(0)
        channels = (8,) * 4
        made: Any = diffusers.AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels)
        with torch.no_grad():
            made.decoder.layers[-1].weight.mul_(20)  # what random weights draw is all but one color
        made.save_pretrained(out / "vae")
        export_bundle(Checkpoint(str(tiny.checkpoint), vae=str(out / "vae")), ["seg"], out / "bundle")

    folder = exported("tiny-vae", tmp_path_factory.mktemp("taesd") / "made", make)
    vae = diffusers.AutoencoderTiny.from_pretrained(folder / "vae").eval()
    request = Request(
        "a red house", num_inference_steps=4, guidance_scale=3.0, seed=2, init_image=photo, strength=0.5,
        num_images_per_prompt=2,
    )  # fmt: skip
    parts = load(tiny.checkpoint, vae)
    assert_same(Pipeline.open(folder / "bundle", threads=1), request, reference(tiny.checkpoint, parts, request))
