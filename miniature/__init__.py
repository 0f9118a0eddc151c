"""The embedded model: its weights (`model/`), its graphs (`graphs.zip`) and the scenes that it draws (`scenes.py`)."""

from dataclasses import dataclass
from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The checkpoint, in diffusers' layout."""
GRAPHS = Path(__file__).parent / "graphs.zip"
"""What bundles of the model need beside its weights (bundles/embedded.py)."""
PRESETS = Path(__file__).parent / "presets"
"""Faster settings of the embedded models, as `cnpp-trt tune` found them: `<model>-<condition>.json`."""
SIZE = (128, 128)
"""Width and height of its images, in pixels."""


@dataclass(frozen=True)
class Embedded:
    """A variant of the embedded model: the folder of its ControlNets, and the LoRA that is fused into its UNet."""

    controlnets: str = "controlnet"
    lora: Path | None = None


EMBEDDED = {
    "miniature": Embedded(),
    "miniature-lcm": Embedded(lora=MODEL_FOLDER / "lora" / "lcm" / "pytorch_lora_weights.safetensors"),
    "miniature-controlnet": Embedded(controlnets="controlnet-plain"),
}
