"""Long prompts, clip skip and distilled UNets give diffusers' pictures."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from cnpp_trt import Control, Pipeline, Request, Result
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint, make_unet
from cnpp_trt.developer.random_models.lora import make_embedding
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.runtime.sampling.guidance import guidance_embedding
from cnpp_trt.runtime.text.prompts import read_prompts
from cnpp_trt.runtime.text.tokenizer import Tokenizer
from fixture_cache import exported
from PIL import Image
from requested import controls_of

pytestmark = pytest.mark.slow

LONG = ", ".join(f"a red house number {i}" for i in range(12))


@pytest.fixture(scope="module")
def text(tiny: Any) -> tuple[Any, Any]:
    encoder: Any = transformers.CLIPTextModel.from_pretrained(tiny.checkpoint / "text_encoder", dtype=torch.float32)
    return encoder, transformers.CLIPTokenizer.from_pretrained(tiny.checkpoint / "tokenizer")


def encode(text: tuple[Any, Any], prompt: str, chunks: int = 1) -> torch.Tensor:
    """[1,77·chunks,D] by transformers: chunks of 75 tokens, the last filled up, the missing ones empty."""
    encoder, tokenizer = text
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for i in range(chunks):
        part = ids[75 * i : 75 * (i + 1)]
        rows.append([start, *part, end, *[tokenizer.pad_token_id] * (75 - len(part))])
    with torch.no_grad():
        return encoder(torch.tensor(rows))[0].reshape(1, 77 * chunks, -1)


def diffusers_pipeline(checkpoint: Any, condition: str, scheduler: Any, unet: Any = None) -> Any:
    encoder: Any = transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
    if not hasattr(encoder, "text_model"):
        # diffusers 0.42 looks for the final layer norm where transformers 4 had it.
        encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    make: Any = diffusers.StableDiffusionControlNetPipeline
    pipeline = make(
        unet=unet or diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32),
        vae=diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32),
        text_encoder=encoder,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        controlnet=diffusers.ControlNetModel.from_pretrained(
            checkpoint / "controlnet" / condition, torch_dtype=torch.float32
        ),
        scheduler=scheduler.from_config(diffusers.DDIMScheduler.load_config(checkpoint / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(
    checkpoint: Any, request: Request, scheduler: Any = diffusers.DDIMScheduler, unet: Any = None, **prompt: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [B,H,W,3], the last latents [B,4,h,w])"""
    [control] = controls_of(request)
    pipeline = diffusers_pipeline(checkpoint, control.condition, scheduler, unet)
    latents = []

    def remember(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents.append(kwargs["latents"].numpy().copy())
        return kwargs

    images = pipeline(
        **(prompt or {"prompt": request.prompt, "negative_prompt": request.negative_prompt}),
        image=Image.fromarray(control.pixels),
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images_per_prompt,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.resolve(SamplingDefaults()).seeds],
        output_type="np",
        callback_on_step_end=remember,
    ).images
    return (images * 255).round().astype(np.uint8), latents[-1]


@pytest.fixture
def request_of(control_image: Any) -> Any:
    seg = Control("seg", control_image(64, 64))

    def make(prompt: str, **fields: Any) -> Request:
        given = {"num_inference_steps": 3, "guidance_scale": 5.0, "scheduler": "ddim", "seed": 4, **fields}
        return Request(prompt, controls=(seg,), **given)

    return make


def assert_same(found: Result, expected: tuple[np.ndarray, np.ndarray]) -> None:
    images, latents = expected
    assert found.images.shape == images.shape
    assert np.linalg.norm(found.latents - latents) <= 1e-4 * np.linalg.norm(latents)
    assert np.abs(found.images.astype(int) - images).max() <= 1


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("prompt", "negative", "chunks"), [(LONG, "", 3), ("a house", LONG, 3), ("a", "b", 1)])
def test_long_prompts(tiny, text, request_of, prompt, negative, chunks, images):
    """The shorter of the two is filled up with empty chunks."""
    # Without commas a chunk ends after 75 tokens, whatever they are.
    prompt, negative = prompt.replace(",", ""), negative.replace(",", "")
    request = request_of(prompt, negative_prompt=negative, long_prompt=True, num_images_per_prompt=images)
    found = tiny.pipeline(request)
    assert found.notes == ()
    expected = reference(
        tiny.checkpoint,
        request,
        prompt_embeds=encode(text, prompt, chunks=chunks),
        negative_prompt_embeds=encode(text, negative, chunks=chunks),
    )
    assert_same(found, expected)


def test_what_comes_after_the_first_chunk_counts(tiny, request_of):
    prompt = LONG.replace(",", "")
    whole = tiny.pipeline(request_of(prompt, long_prompt=True)).images
    other = tiny.pipeline(request_of(f"{prompt} at dusk", long_prompt=True)).images
    cut = tiny.pipeline(request_of(prompt))
    assert not np.array_equal(whole, other)
    assert not np.array_equal(whole, cut.images)
    assert "--long-prompt" in cut.notes[0]


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize(("clip_skip", "images"), [(0, 1), (1, 1), (1, 2)])
def test_clip_skip(tiny, request_of, clip_skip, images, guidance_scale):
    """Layers of the prompt are left out, none of the negative prompt: diffusers' own `clip_skip`."""
    request = request_of(
        "a red house",
        negative_prompt="blurry",
        clip_skip=clip_skip,
        num_images_per_prompt=images,
        guidance_scale=guidance_scale,
    )
    words = {"prompt": "a red house", "negative_prompt": "blurry", "clip_skip": clip_skip}
    assert_same(tiny.pipeline(request), reference(tiny.checkpoint, request, **words))


def encode_by_diffusers(pipeline: Any, chunks: list[str], clip_skip: int) -> torch.Tensor:
    """[1,77·chunks,D]: every chunk as a prompt of its own."""
    with torch.no_grad():
        rows = [pipeline.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip)[0] for text in chunks]
    return torch.cat(rows, 1)


def test_clip_skip_of_a_long_prompt(tiny, request_of):
    """Of every chunk of the prompt, and of no chunk that the negative prompt is filled up with."""
    chunks = ["house " * 15, "at dusk"]  # the tiny tokenizer knows single bytes: 75 tokens, and 6
    request = request_of("".join(chunks), negative_prompt="blurry", clip_skip=1, long_prompt=True)
    pipeline = diffusers_pipeline(tiny.checkpoint, "seg", diffusers.DDIMScheduler)
    expected = reference(
        tiny.checkpoint,
        request,
        prompt_embeds=encode_by_diffusers(pipeline, chunks, 1),
        negative_prompt_embeds=encode_by_diffusers(pipeline, ["blurry", ""], 0),
    )
    assert_same(tiny.pipeline(request), expected)


def test_clip_skip_of_the_negative_prompt_too(tiny, request_of):
    """As AUTOMATIC1111's web UI: the negative prompt encoded as diffusers encodes a prompt."""
    request = request_of("a red house", negative_prompt="blurry", clip_skip=1, clip_skip_negative=True)
    pipeline = diffusers_pipeline(tiny.checkpoint, "seg", diffusers.DDIMScheduler)
    expected = reference(
        tiny.checkpoint,
        request,
        prompt_embeds=encode_by_diffusers(pipeline, ["a red house"], 1),
        negative_prompt_embeds=encode_by_diffusers(pipeline, ["blurry"], 1),
    )
    found = tiny.pipeline(request)
    assert_same(found, expected)
    assert not np.array_equal(found.images, tiny.pipeline(replace(request, clip_skip_negative=False)).images)


def test_clip_skip_is_no_cached_prompt(tiny, request_of):
    first, second = (tiny.pipeline(request_of("a unique house", clip_skip=k)).images for k in (0, 1))
    again = tiny.pipeline(request_of("a unique house", clip_skip=0)).images
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_clip_skip_beyond_the_layers(tiny, request_of):
    with pytest.raises(UserError, match=r"clip_skip must be from 0 to 1, not 2"):
        tiny.pipeline(request_of("", clip_skip=2))
    with pytest.raises(UserError, match="clip_skip"):
        request_of("", clip_skip=-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline]:
    """A checkpoint whose text encoder's results have a mean, as a trained one's have, and its pipeline."""

    def make(out: Path) -> None:
        checkpoint = make_checkpoint(out / "checkpoint", tiny=True)
        encoder: Any = transformers.CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
        torch.nn.init.normal_(encoder.final_layer_norm.bias, 0.3, 0.1, generator=torch.Generator().manual_seed(0))
        encoder.save_pretrained(checkpoint / "text_encoder")
        export_bundle(Checkpoint(str(checkpoint)), ["seg"], out / "bundle")

    folder = exported("trained", tmp_path_factory.mktemp("trained") / "made", make)
    return folder / "checkpoint", Pipeline.open(folder / "bundle", threads=1)


def weighted(embeds: torch.Tensor, weights: dict[int, float]) -> torch.Tensor:
    """[1,77,D] with the vectors at these positions multiplied, and the mean restored."""
    factors = torch.ones(embeds.shape[1])
    for position, weight in weights.items():
        factors[position] = weight
    found = embeds * factors[None, :, None]
    return found * (embeds.mean() / found.mean())


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_emphasis(trained, request_of, clip_skip, images):
    """In both prompts, each with its own mean: what diffusers draws from its own embeddings, weighted."""
    request = request_of(
        "a (red:1.4) house",
        negative_prompt="[blur] x",
        prompt_weights=True,
        clip_skip=clip_skip,
        num_images_per_prompt=images,
    )
    checkpoint, drawing = trained
    pipeline = diffusers_pipeline(checkpoint, "seg", diffusers.DDIMScheduler)
    # Tokens are single bytes, and position 0 is the start.
    prompt = weighted(encode_by_diffusers(pipeline, ["a red house"], clip_skip), dict.fromkeys((2, 3, 4), 1.4))
    negative = weighted(encode_by_diffusers(pipeline, ["blur x"], 0), dict.fromkeys((1, 2, 3, 4), 1 / 1.1))
    found = drawing(request)
    assert found.notes == ()
    assert_same(found, reference(checkpoint, request, prompt_embeds=prompt, negative_prompt_embeds=negative))


def test_emphasis_in_long_prompts_is_of_each_chunk(trained, request_of):
    request = request_of("house BREAK (red:1.4)", prompt_weights=True, long_prompt=True)
    checkpoint, drawing = trained
    pipeline = diffusers_pipeline(checkpoint, "seg", diffusers.DDIMScheduler)
    house, red, empty = (encode_by_diffusers(pipeline, [text], 0) for text in ("house", "red", ""))
    prompt = torch.cat([house, weighted(red, dict.fromkeys((1, 2, 3), 1.4))], 1)
    negative = torch.cat([empty, empty], 1)
    expected = reference(checkpoint, request, prompt_embeds=prompt, negative_prompt_embeds=negative)
    assert_same(drawing(request), expected)


def test_weights_are_no_cached_prompt(tiny, request_of):
    def draw(prompt: str, **fields: Any) -> np.ndarray:
        return tiny.pipeline(request_of(prompt, **fields)).images

    plain = draw("one more house")
    heavy = draw("one more (house:1.5)", prompt_weights=True)
    assert not np.array_equal(plain, heavy)
    np.testing.assert_array_equal(draw("one more (house:1.0)", prompt_weights=True), plain)
    np.testing.assert_array_equal(draw("one more (house:1.5)", prompt_weights=True), heavy)
    np.testing.assert_array_equal(draw("one more house", prompt_weights=True), plain)


def test_emphasis_that_is_not_asked_for_is_noted(tiny, request_of):
    def notes(prompt: str, **fields: Any) -> str:
        return " | ".join(tiny.pipeline(request_of(prompt, num_inference_steps=1, **fields)).notes)

    found = notes("a (red:1.4) house")
    assert found == "'(red:1.4)' in the prompt is read literally: --prompt-weights reads it as emphasis"
    assert "'((fog))' in the negative prompt" in notes("a house", negative_prompt="((fog))")
    assert notes("a (red) house") == notes("a (red:1.4) house", prompt_weights=True) == ""
    for fields in ({}, {"prompt_weights": True}):
        found = notes("a house <lora:pixel:0.8>", **fields)
        assert "'<lora:pixel:0.8>' in the prompt is read literally" in found and "--lora" in found
    assert "\x1b" not in notes("a <lora:\x1b[31mred:1> house")


@pytest.mark.parametrize("name", ["prompt_weights", "clip_skip_negative", "long_prompt"])
@pytest.mark.parametrize("value", [1, None, "yes", "\x1b[31m"])
def test_switches_are_true_or_false(request_of, name, value):
    with pytest.raises(UserError, match=f"{name} must be True or False") as refused:
        request_of("", **{name: value})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("prompt", [None, 1, b"red", ["red"]])
def test_prompts_of_other_types(prompt):
    with pytest.raises(UserError, match="prompt must be a string"):
        Request(prompt)


def test_too_many_chunks_are_refused(tiny, request_of):
    with pytest.raises(UserError, match="the prompt takes 1001 chunks of tokens, more than 100: shorten it"):
        tiny.pipeline(request_of("BREAK x " * 1000, long_prompt=True))


def test_the_embeddings_of_a_bundle_are_told(tiny_checkpoint, request_of, tmp_path):
    """Which a prompt uses, and the words of the others."""
    files = [make_embedding(tmp_path / f"{w}.bin", 32, token=w, vectors=n) for w, n in (("<w>", 2), ("Wx", 1))]
    checkpoint = Checkpoint(str(tiny_checkpoint), embeddings=[str(file) for file in files])
    checkpoint.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = Tokenizer(tmp_path / "tokenizer", {"<w>": 2, "Wx": 1})
    for prompt, negative, expected in (
        ("a <w>", "wx", ["embeddings in the negative prompt: 'Wx' (1 vector)", "… prompt: '<w>' (2 vectors)"]),
        ("a <W> <w>", "", ["embeddings in the prompt: '<w>' (2 vectors)", "embeddings in no prompt: 'Wx'"]),
        ("a house", "", ["embeddings in no prompt: '<w>', 'Wx'"]),
    ):
        request = request_of(prompt, negative_prompt=negative).resolve(SamplingDefaults())
        _, notes = read_prompts(tokenizer, request, True)
        assert notes == [line.replace("…", "embeddings in the") for line in expected]


@pytest.mark.parametrize("scale", [1.0, 1.7, 8.0])
@pytest.mark.parametrize("width", [32, 256])
def test_guidance_embeddings_are_diffusers(scale, width):
    embed: Any = diffusers.StableDiffusionControlNetPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([scale]) - 1, width).numpy()
    found = guidance_embedding(scale, width)
    assert found.dtype == np.float32
    # Sines of angles in the thousands: a last bit of the angle is 5e-4.
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Pipeline, Any]:
    """A checkpoint whose UNet reads its guidance scale, its pipeline, and that UNet in diffusers."""

    def make(out: Path) -> None:
        checkpoint = make_checkpoint(out / "checkpoint", tiny=True)
        unet = make_unet(True, time_cond_proj_dim=64)
        # Without it being noticed it would not be tested: a new projection is all but zero.
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)
        unet.save_pretrained(checkpoint / "unet")
        export_bundle(Checkpoint(str(checkpoint)), ["seg"], out / "bundle")

    folder = exported("distilled", tmp_path_factory.mktemp("distilled") / "made", make)
    checkpoint = folder / "checkpoint"
    loaded = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    return checkpoint, Pipeline.open(folder / "bundle", threads=1), loaded


@pytest.mark.parametrize("images", [1, 2])
def test_distilled_unets(distilled, request_of, images):
    checkpoint, pipeline, unet = distilled
    request = request_of("a red house", scheduler="lcm", guidance_scale=2.0, num_images_per_prompt=images)
    found = pipeline(request)
    assert_same(found, reference(checkpoint, request, diffusers.LCMScheduler, unet))
    other = pipeline(replace(request, guidance_scale=4.0))
    assert not np.array_equal(found.images, other.images)  # the scale is read
    shapes = list(pipeline._preparation.programs.programs)
    assert [s.guided for s in shapes] == [False] * len(shapes)  # and never doubles the batch
