"""From the hub to a picture: what is downloaded, what the bundle says, and that diffusers draws the same."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.developer.random_models.hub import BASE, snapshot_of
from PIL import Image

pytestmark = pytest.mark.slow

CONTROLNETS = "limingcv/reward_controlnet"


@pytest.fixture
def exported(online, hub, tmp_path) -> Path:
    """`sd15` with canny, by the command, from a gated hub with a token."""
    hub.gated, hub.accepted = {BASE}, True
    bundle = tmp_path / "bundle"
    ended = online("export", "--model", "sd15", "--cond", "canny", "--out", bundle, "--json", HF_TOKEN=hub.token)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["bundle"] == str(bundle)
    return bundle


def test_an_export_from_the_hub(exported, hub, hub_home, base, control_image, tmp_path):
    assert sorted(hub.downloads) == sorted(
        [
            *("config.json" for _ in range(4)),
            *("diffusion_pytorch_model.safetensors" for _ in range(3)),
            *("model.safetensors", "scheduler_config.json", "model_index.json"),
            *("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
        ]
    )
    pipeline = Pipeline.open(exported, threads=1)
    manifest = pipeline.bundle.manifest
    controlnets = snapshot_of(hub_home, CONTROLNETS)
    assert manifest.model == "sd15"
    assert manifest.sources["unet"] == f"{BASE}@{base.name}/unet"
    assert manifest.conditions["canny"].get("source") == f"{CONTROLNETS}@{controlnets.name}/checkpoints/canny"

    pixels = control_image(64, 64)
    request = Request("a red house", "blurry", [Control("canny", pixels)], 3, 7.5, "ddim", 5)
    assert np.abs(pipeline(request).images[0].astype(int) - _diffusers(base, controlnets, pixels)).max() <= 1


def _diffusers(base: Path, controlnets: Path, pixels: np.ndarray) -> np.ndarray:
    """The published folders through diffusers' own pipeline: int [H,W,3]."""
    controlnet = diffusers.ControlNetModel.from_pretrained(controlnets / "checkpoints" / "canny")
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        base, controlnet=controlnet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    drawn: Any = pipeline(
        "a red house",
        Image.fromarray(pixels),
        negative_prompt="blurry",
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator("cpu").manual_seed(5),
    )
    return np.asarray(drawn.images[0]).astype(int)
