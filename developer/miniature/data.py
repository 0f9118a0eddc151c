"""The scenes as tensors, and the control images of a batch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...conditions import ADE20K_PALETTE
from ...export.extractors.miniature import make_extractor
from ...miniature.scenes import LABELS, draw_scene

TRAIN = range(10_000, 16_000)
TEST = range(1_000_000, 1_000_200)

# Chosen by eye on scenes: outlines stay, the texture of ground and walls does not show.
FILTERS = {
    "hed": {"type": "soft_edges", "sigma": 1.2, "low": 0.01, "high": 0.12},
    "lineart": {"type": "line_art", "sigma": 1.0, "low": 0.006, "high": 0.035},
}


@dataclass
class Scenes:
    """image uint8 [N,3,128,128], index uint8 [N,128,128] (place in `LABELS`), depth float32 [N,128,128]."""

    image: Tensor
    index: Tensor
    depth: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, which: Tensor | slice) -> Tensor:
        """Images float [B,3,H,W] in [0,1]."""
        return self.image[which].float().div(255)


def make_scenes(seeds: range) -> Scenes:
    """Draws the scenes of these seeds."""
    drawn = [draw_scene(seed) for seed in seeds]
    position = np.zeros(256, np.uint8)
    position[list(LABELS.values())] = np.arange(len(LABELS))
    return Scenes(
        torch.from_numpy(np.stack([s.image for s in drawn])).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(position[np.stack([s.labels for s in drawn])]),
        torch.from_numpy(np.stack([s.depth for s in drawn])).float(),
        [s.caption for s in drawn],
    )


def load_scenes(work: Path, seeds: range) -> Scenes:
    """Drawn once into `work`, then read."""
    path = work / f"scenes-{seeds.start}-{seeds.stop}.pt"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        scenes = make_scenes(seeds)
        partial = path.with_suffix(f".{torch.initial_seed()}.partial")
        torch.save((scenes.image, scenes.index, scenes.depth, scenes.captions), partial)
        partial.replace(path)
    return Scenes(*torch.load(path, weights_only=True))


class Conditions(nn.Module):
    """Control images of a batch of scenes, float [B,3,128,128] in [0,1], as whole gray levels like a PNG's."""

    palette: Tensor

    def __init__(self) -> None:
        super().__init__()
        colors = torch.tensor([ADE20K_PALETTE[label] for label in LABELS.values()])
        self.register_buffer("palette", colors.float() / 255)
        self.filters = nn.ModuleDict({name: make_extractor(config) for name, config in FILTERS.items()})

    @torch.no_grad()
    def forward(self, condition: str, scenes: Scenes, which: Tensor | slice) -> Tensor:
        """The control images of scenes, float32 [B,3,S,S] in 0 to 1."""
        if condition == "seg":
            return self.palette[scenes.index[which].long()].permute(0, 3, 1, 2)
        if condition == "depth":
            plane = scenes.depth[which]
        elif condition == "canny":
            plane = canny(scenes.pixels(which))
        else:
            plane = self.filters[condition](scenes.pixels(which))
        return (plane * 255).round().div(255).unsqueeze(1).expand(-1, 3, -1, -1)


def canny(images: Tensor) -> Tensor:
    """Binary edges [B,H,W] of images [B,3,H,W] in [0,1], by the runtime's own algorithm (kornia's)."""
    from ...runtime.control.canny import canny as edges_of

    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(np.stack([edges_of(p) for p in pixels])).float().div(255)
