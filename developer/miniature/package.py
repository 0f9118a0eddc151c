"""Puts the trained parts together as a checkpoint in the diffusers layout, in fp16, with its examples."""

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...conditions import CONDITIONS
from ...miniature.scenes import draw_scene
from .data import FILTERS, Conditions, make_scenes
from .diffusion import write_json
from .evaluate import GUIDANCE, STEPS

# Fresh scenes whose conditions ship as examples, with their seeds, and a prompt where it is not the scene's caption.
EXAMPLES: dict[str, dict[str, Any]] = {
    "seg": {"scene": 1_000_005, "seed": 1},
    "depth": {"scene": 1_000_012, "seed": 2},
    "canny": {"scene": 1_000_004, "seed": 3},
    "hed": {"scene": 1_000_006, "seed": 4},
    "lineart": {"scene": 1_000_002, "seed": 5},
}
PLAIN = ("seg", "depth")
LCM_DEFAULTS = {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}


def package(work: Path, out: Path, plus: str = "controlnet-reward-0") -> Path:
    """Writes the model folder `out`, replacing it whole.

    Args:
        work: the folder of the training.
        out: the folder to write.
        plus: the folder in `work` with the ControlNet++ of each condition; a condition it lacks takes the plain one.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        kind.from_pretrained(work / name).half().save_pretrained(new / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(work / name, new / name)
    for condition in CONDITIONS:
        plain = work / "controlnet" / condition
        best = work / plus / condition
        chosen = best if (best / "config.json").is_file() else plain
        ControlNetModel.from_pretrained(chosen).half().save_pretrained(new / "controlnet" / condition)
        if condition in PLAIN:
            ControlNetModel.from_pretrained(plain).half().save_pretrained(new / "controlnet-plain" / condition)
            shutil.copytree(work / "extractors" / "scoring" / condition, new / "extractors" / condition)
    for condition, config in FILTERS.items():
        write_json(new / "extractors" / condition / "config.json", config)
    write_json(new / "model_index.json", _INDEX)
    lora = work / "lora" / "lcm" / "pytorch_lora_weights.safetensors"
    (new / "lora" / "lcm").mkdir(parents=True)
    shutil.copyfile(lora, new / "lora" / "lcm" / lora.name)
    write_json(new / "lora" / "lcm" / "defaults.json", LCM_DEFAULTS)
    _examples(new / "examples")
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out


_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _examples(folder: Path) -> None:
    folder.mkdir()
    conditions = Conditions()
    examples = {}
    for condition, example in EXAMPLES.items():
        seed = example["scene"]
        scenes = make_scenes(range(seed, seed + 1))
        control = conditions(condition, scenes, slice(None))[0]
        _save(control, folder / f"{condition}.png")
        prompt = example.get("prompt", scenes.captions[0])
        # `typical_scores` adds what such pictures score, once the model is exported.
        examples[condition] = {"image": f"{condition}.png", "prompt": prompt, "seed": example["seed"]}
    Image.fromarray(draw_scene(EXAMPLES["seg"]["scene"] + 100).image).save(folder / "scene.png", optimize=True)
    defaults = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS}
    write_json(folder / "examples.json", {"defaults": defaults, "examples": examples})


def _save(image: torch.Tensor, path: Path) -> None:
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path, optimize=True)
