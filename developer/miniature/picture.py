"""The README's picture: for each condition the images without it, with a ControlNet and with ControlNet++."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...conditions import CONDITIONS
from .data import TEST
from .evaluate import Judge, Sampler, rounded
from .package import EXAMPLES

ZOOM, GAP, TOP = 1, 6, 26
TITLES = ("condition", "no control", "ControlNet", "ControlNet++", "the scene itself")


def draw_picture(work: Path, out: Path, seed: int = 0) -> Path:
    """Writes the PNG `out`: a row for each condition, its example scene, the same noise in every column."""
    from diffusers import ControlNetModel

    sampler, judge = Sampler(work), Judge(work)
    rows = []
    for condition in CONDITIONS:
        which = torch.tensor([EXAMPLES[condition]["scene"] - TEST.start])
        control = judge.conditions(condition, sampler.scenes, which)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        images: list[Tensor] = [(control[0] * 255).round().byte()]
        for folder in (None, "controlnet", "controlnet-reward-0"):
            controlnet: Any = rounded(ControlNetModel.from_pretrained(work / folder / condition)) if folder else None
            own = control if folder else None
            images.append(sampler.sample(controlnet, own, noise, which)[0])
        images.append(sampler.scenes.image[which[0]])
        rows.append([np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images])
    _sheet(rows).save(out, optimize=True)
    return out


def _sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    side = 128 * ZOOM
    columns = len(rows[0])
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, TOP + len(rows) * (side + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for x, title in enumerate(TITLES):
        pen.text((GAP + x * (side + GAP) + side / 2, TOP / 2), title, "black", font, anchor="mm")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + x * (side + GAP), TOP + y * (side + GAP)))
    return sheet
