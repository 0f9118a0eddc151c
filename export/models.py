"""What has a name: the published ControlNet++ models, and the parts that go with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..conditions import CONDITIONS, REWARD_CONTROLNET_REPOSITORY

# What runwayml/stable-diffusion-v1-5 was: that repository is gone from the hub.
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"

# What the official demo extracts with; canny is an algorithm.
EXTRACTORS: Mapping[str, str] = {
    "seg": "openmmlab/upernet-convnext-small",
    "depth": "Intel/dpt-large",
    "hed": "lllyasviel/Annotators/ControlNetHED.pth",
    "lineart": "lllyasviel/Annotators/sk_model.pth",
}


@dataclass(frozen=True)
class NamedModel:
    """A base model with the ControlNets of its conditions.

    Attributes:
        controlnets: hub folders by condition.
        extractors: of the conditions that have one which speaks their ControlNet's language.
        palettes: of segmentations that are not in ADE20K's colors.
    """

    controlnets: Mapping[str, str]
    extractors: Mapping[str, str]
    palettes: Mapping[str, str] = field(default_factory=dict)
    base: str = BASE


MODELS: Mapping[str, NamedModel] = {
    "sd15": NamedModel(
        {c.name: f"{REWARD_CONTROLNET_REPOSITORY}/{c.checkpoint}" for c in CONDITIONS.values()}, EXTRACTORS
    ),
    "seg-coco": NamedModel(
        {"seg": f"{REWARD_CONTROLNET_REPOSITORY}/checkpoints/cocostuff/reward_5k"}, {}, {"seg": "coco-stuff"}
    ),
}


@dataclass(frozen=True)
class NamedLora:
    """A LoRA on the hub, and the settings that it is made for."""

    source: str
    defaults: Mapping[str, Any]


# Few steps with the LCM scheduler, arXiv 2311.05556; guidance 1 is none, and 1 to 2 is its range.
LORAS: Mapping[str, NamedLora] = {
    "lcm": NamedLora(
        "latent-consistency/lcm-lora-sdv1-5", {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
    )
}

VAES: Mapping[str, str] = {"taesd": "madebyollin/taesd"}
