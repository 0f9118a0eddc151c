"""The embedded model: diffusers' layout, its size, and what its README says of it."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.developer.miniature import evaluate, few_steps
from cnpp_trt.export.extractors.miniature import load_extractor
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from PIL import Image

pytestmark = pytest.mark.slow

ROOM, RESULTS = MINIATURE.parent, MINIATURE.parents[1] / "developer" / "miniature"


def test_size_in_git() -> None:
    assert sum(p.stat().st_size for p in MINIATURE.rglob("*") if p.is_file()) < 20e6


def test_diffusers_loads_every_part() -> None:
    from diffusers import ControlNetModel, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MINIATURE, safety_checker=None)
    assert pipeline.unet.config.in_channels == 4 and pipeline.tokenizer.model_max_length == 77
    folders = [MINIATURE / "controlnet" / c for c in CONDITIONS]
    folders += [MINIATURE / "controlnet-plain" / c for c in ("seg", "depth")]
    for folder in folders:
        controlnet: Any = ControlNetModel.from_pretrained(folder)
        assert controlnet.config.block_out_channels == pipeline.unet.config.block_out_channels


def test_plus_is_another_controlnet_than_plain() -> None:
    for condition in ("seg", "depth"):
        name = f"{condition}/diffusion_pytorch_model.safetensors"
        assert (MINIATURE / "controlnet" / name).read_bytes() != (MINIATURE / "controlnet-plain" / name).read_bytes()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_has_an_example(condition: str) -> None:
    examples = json.loads((MINIATURE / "examples" / "examples.json").read_text())
    example = examples["examples"][condition]
    image = np.array(Image.open(MINIATURE / "examples" / example["image"]).convert("RGB"))
    assert image.shape == (128, 128, 3) and image.std() > 10
    assert example["prompt"] and examples["defaults"]["guidance_scale"] > 1
    if CONDITIONS[condition].extractor_graph:
        load_extractor(MINIATURE / "extractors" / condition)


@pytest.mark.parametrize(("file", "table"), [("results.json", evaluate.table), ("few_steps.json", few_steps.table)])
def test_readme_shows_the_results_files(file: str, table: Callable[[dict[str, Any]], str]) -> None:
    results = json.loads((RESULTS / file).read_text())
    assert table(results) in (ROOM / "README.md").read_text("utf-8")


def test_reward_helps() -> None:
    """What the README claims of the shipped training, from the figures as measured."""
    results = json.loads((RESULTS / "results.json").read_text())

    def values(condition: str, stage: str) -> list[float]:
        metric = CONDITIONS[condition].metric
        return [seed[metric] for seed in results[condition][stage]]

    assert min(values("seg", "ControlNet++")) >= 84
    assert min(values("seg", "ControlNet++")) > max(values("seg", "ControlNet"))
    assert max(values("depth", "ControlNet++")) < min(values("depth", "ControlNet"))
