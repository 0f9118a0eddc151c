"""The images are diffusers' images: the same weights, prompt, condition and seed through diffusers' own pipeline.

The whole matrix runs on the tiny random checkpoint; where the miniature is there, a subset of it runs on that too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.defaults import SamplingDefaults
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
RELATIVE = 1e-4
PROMPT, NEGATIVE = "a red house, with Snow", "blurry"


@dataclass
class Drawn:
    """images uint8 [B,H,W,3]; for each step its timestep and the latents [B,4,h,w] after it."""

    images: np.ndarray
    timesteps: list[float]
    latents: list[np.ndarray]


class Reference:
    """diffusers' StableDiffusionControlNetPipeline in fp32, its components loaded once."""

    def __init__(self, checkpoint: Any) -> None:
        fp32 = {"torch_dtype": torch.float32}
        text_encoder = transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
        self.components = {
            "unet": diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet", **fp32),
            "vae": diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae", **fp32),
            "text_encoder": text_encoder,
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        }
        self.controlnets = {
            folder.name: diffusers.ControlNetModel.from_pretrained(folder, **fp32)
            for folder in (checkpoint / "controlnet").iterdir()
            if folder.name in ("seg", "depth")
        }
        self.scheduler = diffusers.DDIMScheduler.load_config(checkpoint / "scheduler")

    def __call__(self, request: Request, generators: Any = None) -> Drawn:
        request = request.resolve(SamplingDefaults())
        target, overrides = SCHEDULERS[request.scheduler]
        make: Any = diffusers.StableDiffusionControlNetPipeline
        pipeline = make(
            controlnet=[self.controlnets[c.condition] for c in request.controls],
            scheduler=target.from_config(self.scheduler, **overrides),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **self.components,
        )
        pipeline.set_progress_bar_config(disable=True)
        timesteps, latents = [], []

        def remember(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            timesteps.append(float(timestep))
            latents.append(kwargs["latents"].numpy().copy())
            return kwargs

        output = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            image=[Image.fromarray(c.pixels) for c in request.controls],
            height=None if request.controls else 64,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images_per_prompt,
            generator=generators or [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            controlnet_conditioning_scale=[float(c.controlnet_conditioning_scale) for c in request.controls],
            control_guidance_start=[c.control_guidance_start for c in request.controls],
            control_guidance_end=[c.control_guidance_end for c in request.controls],
            guess_mode=request.guess_mode,
            output_type="np",
            callback_on_step_end=remember,
        )
        return Drawn((output.images * 255).round().astype(np.uint8), timesteps, latents)


def ours(pipeline: Pipeline, request: Request) -> Drawn:
    timesteps: list[float] = []
    latents: list[np.ndarray] = []

    def remember(_: int, timestep: float, x: np.ndarray) -> None:
        timesteps.append(timestep)
        latents.append(x)

    result = pipeline(request, callback_on_step_end=remember)
    np.testing.assert_array_equal(latents[-1], result.latents)
    resolved = pipeline.resolve(request)
    assert result.request.seeds == resolved.seeds and len(latents) == resolved.num_inference_steps
    return Drawn(result.images, timesteps, latents)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_same(found: Drawn, expected: Drawn) -> None:
    assert found.timesteps == expected.timesteps
    assert len(found.latents) == len(expected.latents)
    for k, (a, b) in enumerate(zip(found.latents, expected.latents, strict=True)):
        assert relative(a, b) <= RELATIVE, f"step {k}"
    assert found.images.dtype == np.uint8
    assert found.images.shape == expected.images.shape
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    # Were both one flat color, they would agree whatever went wrong.
    assert found.images.std() > 1


@pytest.fixture(scope="module")
def tiny_reference(tiny: Any) -> Reference:
    return Reference(tiny.checkpoint)


@pytest.fixture(scope="module")
def miniature_reference(miniature: Any) -> Reference:
    return Reference(miniature.checkpoint)


@pytest.fixture(scope="module")
def v_reference(v_prediction: Any) -> Reference:
    return Reference(v_prediction.checkpoint)


@pytest.fixture
def make(control_image: Callable[..., np.ndarray]) -> Callable[..., Request]:
    """A request of so many controls for a model; fields of `Request` as keywords."""

    def request(model: Any, controls: int = 1, **fields: Any) -> Request:
        chosen = ("seg", "depth")[:controls]
        made = [Control(c, control_image(*model.size, seed=i), (0.8, 0.6)[i]) for i, c in enumerate(chosen)]
        lcm = fields.get("scheduler") == "lcm"
        defaults = {"num_inference_steps": 4 if lcm else 20, "guidance_scale": 7.5, "seed": 5}
        return Request(PROMPT, NEGATIVE, made, **{**defaults, **fields})

    return request


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_are_those_of_diffusers(tiny, tiny_reference, make, scheduler, guidance_scale, controls, images):
    request = make(tiny, controls, scheduler=scheduler, guidance_scale=guidance_scale, num_images_per_prompt=images)
    assert_same(ours(tiny.pipeline, request), tiny_reference(request))


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "controls", "images"),
    [
        ("ddim", 7.5, 1, 1),
        ("ddim", 1.0, 2, 3),
        ("euler", 7.5, 2, 1),
        ("euler", 1.0, 1, 3),
        ("dpmpp_2m", 7.5, 1, 3),
        ("dpmpp_2m", 1.0, 2, 1),
        ("dpmpp_2m_karras", 7.5, 2, 1),
        ("dpmpp_2m_karras", 1.0, 1, 1),
        ("unipc", 7.5, 2, 3),
        ("unipc", 1.0, 1, 1),
        ("unipc", 7.5, 1, 1),
        ("lcm", 1.0, 1, 3),
        ("lcm", 7.5, 2, 1),
    ],
)
def test_images_of_the_miniature(miniature, miniature_reference, make, scheduler, guidance_scale, controls, images):
    request = make(
        miniature, controls, scheduler=scheduler, guidance_scale=guidance_scale, num_images_per_prompt=images
    )
    assert_same(ours(miniature.pipeline, request), miniature_reference(request))


@pytest.mark.parametrize("scheduler", ["unipc", "lcm"])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_one_image_from_a_single_generator(tiny, tiny_reference, make, scheduler, seed):
    request = make(tiny, scheduler=scheduler, seed=seed, num_inference_steps=4)
    generator = torch.Generator("cpu").manual_seed(seed)
    assert_same(ours(tiny.pipeline, request), tiny_reference(request, generator))


@pytest.mark.parametrize(
    "windows",
    [
        [(0.0, 0.5)],
        [(0.3, 1.0)],
        [(0.24, 0.76)],
        # Narrower than a step: no step lies within it, so the ControlNet never runs.
        [(0.42, 0.45)],
        # A gap in between in which no control applies, one in which both do, and one alone at a time.
        [(0.0, 0.3), (0.7, 1.0)],
        [(0.0, 0.7), (0.3, 1.0)],
        [(0.0, 1.0), (0.45, 0.55)],
    ],
)
def test_control_start_and_end(tiny, tiny_reference, make, windows):
    request = make(tiny, len(windows), num_inference_steps=10)
    controls = [
        replace(c, control_guidance_start=start, control_guidance_end=end)
        for c, (start, end) in zip(request.controls, windows, strict=True)
    ]
    request = replace(request, controls=controls)
    found = ours(tiny.pipeline, request)
    assert_same(found, tiny_reference(request))
    whole = ours(tiny.pipeline, make(tiny, len(windows), num_inference_steps=10))
    assert relative(found.latents[-1], whole.latents[-1]) > 10 * RELATIVE, "the window changed nothing"


@pytest.mark.parametrize("scales", [(0.0,), (1.7,), (-0.5,), (0.3, 1.2), (1.0, 0.0)])
def test_control_scales(tiny, tiny_reference, make, scales):
    request = make(tiny, len(scales), num_inference_steps=6)
    controls = [replace(c, controlnet_conditioning_scale=s) for c, s in zip(request.controls, scales, strict=True)]
    request = replace(request, controls=controls)
    assert_same(ours(tiny.pipeline, request), tiny_reference(request))


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("controls", [1, 2])
def test_guess_mode(tiny, tiny_reference, make, controls, guidance_scale):
    request = make(tiny, controls, guess_mode=True, guidance_scale=guidance_scale, num_inference_steps=5)
    found = ours(tiny.pipeline, request)
    assert_same(found, tiny_reference(request))
    assert relative(found.latents[-1], ours(tiny.pipeline, replace(request, guess_mode=False)).latents[-1]) > 1e-3


def test_a_seed_for_each_image(tiny, tiny_reference, make):
    request = make(tiny, seed=[5, 2**63, 5], num_images_per_prompt=3, num_inference_steps=5)
    found = ours(tiny.pipeline, request)
    assert_same(found, tiny_reference(request))
    np.testing.assert_allclose(found.latents[-1][0], found.latents[-1][2], atol=1e-5)


def test_one_condition_twice(tiny, tiny_reference, make, control_image):
    request = make(tiny, num_inference_steps=6)
    request = replace(request, controls=[*request.controls, Control("seg", control_image(*tiny.size, seed=9), 0.4)])
    assert_same(ours(tiny.pipeline, request), tiny_reference(request))


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0, 1.001, -2.0, 30.0])
def test_guidance_scales(tiny, tiny_reference, make, guidance_scale):
    request = make(tiny, num_inference_steps=6, guidance_scale=guidance_scale)
    assert_same(ours(tiny.pipeline, request), tiny_reference(request))


def test_the_negative_prompt_counts_only_with_guidance(tiny, tiny_reference, make):
    def latents(**fields: Any) -> np.ndarray:
        request = make(tiny, num_inference_steps=6, **fields)
        drawn = [ours(tiny.pipeline, replace(request, negative_prompt=n)) for n in ("", "ugly, blurry")]
        for d, negative in zip(drawn, ("", "ugly, blurry"), strict=True):
            assert_same(d, tiny_reference(replace(request, negative_prompt=negative)))
        return np.stack([d.latents[-1] for d in drawn])

    guided, unguided = latents(guidance_scale=7.5), latents(guidance_scale=1.0)
    assert relative(guided[0], guided[1]) > 10 * RELATIVE
    np.testing.assert_array_equal(unguided[0], unguided[1])


@pytest.mark.parametrize("prompt", ["", "words " * 100, "Ünïcödé 日本語 🏠"])
def test_prompts(tiny, tiny_reference, make, prompt):
    request = replace(make(tiny, num_inference_steps=4), prompt=prompt)
    assert_same(ours(tiny.pipeline, request), tiny_reference(request))


@pytest.mark.parametrize("size", [(37, 53), (200, 64), (500, 301)])
def test_a_condition_of_another_size_is_resized_as_diffusers_does(tiny, tiny_reference, control_image, size):
    """depth: diffusers resizes with Lanczos, and so do we. (seg is resized by nearest neighbor instead.)"""
    width, height = tiny.size
    odd = control_image(*size)
    request = Request(PROMPT, "", [Control("depth", odd)], 6, seed=1)
    resized = Image.fromarray(odd).resize((width, height), Image.Resampling.LANCZOS)
    result = tiny.pipeline(request)
    np.testing.assert_array_equal(result.control_images[0], np.asarray(resized))
    assert f"the depth image was resized from {size[0]}x{size[1]} to {width}x{height} (lanczos)" in result.notes

    # diffusers brings the image to the height and width that it is asked for, by its own resize.
    make: Any = diffusers.StableDiffusionControlNetPipeline
    diffusers_pipeline = make(
        controlnet=tiny_reference.controlnets["depth"],
        scheduler=diffusers.UniPCMultistepScheduler.from_config(tiny_reference.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **tiny_reference.components,
    )
    diffusers_pipeline.set_progress_bar_config(disable=True)
    output = diffusers_pipeline(
        PROMPT,
        image=Image.fromarray(odd),
        height=height,
        width=width,
        num_inference_steps=6,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="np",
    )
    expected = (output.images * 255).round().astype(np.uint8)
    assert np.abs(result.images.astype(int) - expected).max() <= 1


def test_seg_is_resized_without_new_colors(tiny, control_image):
    odd = control_image(37, 53)
    result = tiny.pipeline(Request(PROMPT, "", [Control("seg", odd)], 1, seed=1))
    colors = {tuple(c) for c in odd.reshape(-1, 3)}
    assert {tuple(c) for c in result.control_images[0].reshape(-1, 3)} <= colors
    assert any(note.endswith("(nearest)") for note in result.notes)


@pytest.mark.parametrize("scheduler", ["unipc", "lcm"])
def test_the_same_seed_gives_the_same_bytes(model, make, scheduler):
    request = make(model, 2, scheduler=scheduler, num_inference_steps=4, num_images_per_prompt=2)
    other = replace(request, seed=6)
    first, between, again = (model.pipeline(r) for r in (request, other, request))
    assert first.images.tobytes() == again.images.tobytes()
    assert first.latents.tobytes() == again.latents.tobytes()
    assert between.latents.tobytes() != first.latents.tobytes()
    # Image i of a seed is image 0 of seed + i.
    assert relative(between.latents[:1], first.latents[1:]) <= RELATIVE
    # A pipeline that is opened anew knows nothing of the requests before.
    fresh = Pipeline.open(model.bundle, threads=1 if model.name == "tiny" else None)(request)
    assert fresh.images.tobytes() == first.images.tobytes()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_batch_of_three_is_three_single_images(tiny, make, scheduler):
    request = make(tiny, 2, scheduler=scheduler, num_images_per_prompt=3)
    batch = ours(tiny.pipeline, request)
    for i in range(3):
        single = ours(tiny.pipeline, replace(request, seed=5 + i, num_images_per_prompt=1))
        assert relative(batch.latents[-1][i : i + 1], single.latents[-1]) <= RELATIVE
        assert np.abs(batch.images[i].astype(int) - single.images[0]).max() <= 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_v_prediction_at_an_odd_size(v_prediction, v_reference, make, scheduler, guidance_scale):
    request = make(v_prediction, scheduler=scheduler, guidance_scale=guidance_scale)
    assert_same(ours(v_prediction.pipeline, request), v_reference(request))


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 1), (0.0, 1), (1.5, 2)])
def test_guidance_of_one_or_less_runs_at_half_the_work(tiny, make, guidance_scale, batch):
    request = make(tiny, num_inference_steps=2, guidance_scale=guidance_scale)
    tiny.pipeline(request)
    program = next(reversed(tiny.pipeline._preparation.programs.programs.values())).program
    assert program.workspace.model_input.shape[0] == 1  # both sides of the guidance begin with the same
    assert program.workspace.noise_pred.shape[0] == batch
    assert program.workspace.prompt_embeds.shape[0] == batch


def test_a_prompt_over_77_tokens_says_what_was_dropped(tiny, make):
    kept = "a" * 60 + " "  # the tiny tokenizer knows single bytes: a token for each letter
    request = replace(make(tiny, num_inference_steps=1), prompt=kept + "house and Garden gate")
    notes = tiny.pipeline(request).notes
    assert len(notes) == 1
    assert "longer than 77 tokens" in notes[0]
    expected = transformers.CLIPTokenizer.from_pretrained(tiny.checkpoint / "tokenizer")
    ids = expected(request.prompt, truncation=False)["input_ids"][76:-1]
    dropped = expected.decode(ids).strip()
    assert dropped
    assert repr(dropped) in notes[0]
    assert tiny.pipeline(replace(request, prompt=kept)).notes == ()


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize(("scheduler", "left"), [("ddim", {}), ("ddim", {"clip_sample_range": 0.6}), ("lcm", None)])
@pytest.mark.parametrize("which", ["tiny", "miniature"])
def test_clipped_samples(request, make, which, scheduler, left, guidance_scale):
    """A scheduler config as LMSDiscreteScheduler writes it has no `clip_sample`: diffusers' DDIM then clips.

    Few steps: x and the prediction of its noise no longer belong together once x0 is clipped, and a model with random
    weights then doubles every difference from step to step, until after twenty of them each side draws its own picture.
    """
    model = request.getfixturevalue(which)
    reference = request.getfixturevalue(f"{which}_reference")
    config = {k: v for k, v in model.pipeline.bundle.manifest.scheduler_config.items() if k != "clip_sample"}
    config |= {"clip_sample": True} if left is None else left
    manifest = replace(model.pipeline.bundle.manifest, scheduler_config=config)
    clipping = Pipeline(Bundle(model.bundle, manifest), model.pipeline.backend)
    asked = make(model, scheduler=scheduler, guidance_scale=guidance_scale, num_inference_steps=4)
    clipped = ours(clipping, asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "scheduler", {**config, "_class_name": "LMSDiscreteScheduler"})
        assert_same(clipped, reference(asked))
    assert "clip_sample" in clipping(asked).notes[-1]
    assert relative(clipped.latents[-1], ours(model.pipeline, asked).latents[-1]) > 0.01
