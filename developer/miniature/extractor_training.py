"""Trains the segmentation and depth networks: one pair to train ControlNets against, another pair to score them."""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...export.extractors.miniature import make_extractor
from ...miniature.scenes import LABELS
from .data import TRAIN, Scenes, load_scenes
from .muon import Trainer

# Reward and scoring networks share neither width, nor seed, nor training scenes.
WIDTHS = {"reward": 16, "scoring": 20}
SEEDS = {"reward": 1, "scoring": 2}
STEPS = 700


def train_extractor(work: Path, condition: str, role: str) -> Path:
    """Trains one network into `work/extractors/<role>/<condition>`.

    Args:
        work: the folder of the training.
        condition: `seg` or `depth`.
        role: `reward` or `scoring`; each sees its own half of the scenes.
    """
    torch.manual_seed(SEEDS[role])
    scenes = load_scenes(work, TRAIN)
    half = len(scenes) // 2
    first = 0 if role == "reward" else half
    config: dict[str, object] = {"type": "depth_network", "width": WIDTHS[role]}
    if condition == "seg":
        config = {"type": "segmentation_network", "width": WIDTHS[role], "labels": list(LABELS.values())}
    model = make_extractor(config)
    trainer = Trainer([model], STEPS, lr=5e-3)
    start = time.perf_counter()
    for step in range(STEPS):
        which = torch.randint(first, first + half, (16,))
        image = disturb(scenes.pixels(which))
        loss = _loss(model, condition, image, scenes, which)
        trainer.step(loss)
        if step % 100 == 99:
            print(
                f"{role} {condition} {step + 1}: loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    trainer.finish()
    folder = work / "extractors" / role / condition
    save_extractor(model, config, folder)
    return folder


def save_extractor(model: torch.nn.Module, config: dict[str, object], folder: Path) -> None:
    """Writes an extractor's weights, rounded to fp16, and its config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    if state:
        save_file(state, folder / "model.safetensors")


def disturb(image: Tensor) -> Tensor:
    """Blur, brightness and noise, at random: generated images are softer than drawn ones."""
    if torch.rand(()) < 0.5:
        weight = torch.rand(())
        image = torch.lerp(image, F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1), weight)
    gain = 1 + 0.1 * (torch.rand(len(image), 3, 1, 1) - 0.5)
    return (image * gain + 0.02 * torch.rand(()) * torch.randn_like(image)).clamp(0, 1)


def _loss(model: torch.nn.Module, condition: str, image: Tensor, scenes: Scenes, which: Tensor) -> Tensor:
    if condition == "seg":
        logits = model.logits(image)  # type: ignore[operator]
        return F.cross_entropy(logits, scenes.index[which].long())
    return F.l1_loss(model(image), scenes.depth[which])
