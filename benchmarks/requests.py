"""Requests to measure with: fresh scenes for the embedded models, random blocks for every other."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..miniature import EMBEDDED
from ..miniature.scenes import draw_scene
from ..runtime.control.palette import colors_from_labels
from ..runtime.images.image_files import resize
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import Control, Request, ResolvedRequest

# Beyond every seed of developer/miniature/data.py's splits: nothing was trained or measured on these scenes.
FIRST_SCENE = 10_000_000


def make_requests(
    pipeline: Pipeline, condition: str, indices: Iterable[int], **fields: Any
) -> Iterator[ResolvedRequest]:
    """One request for each index, each with its own prompt, control image and seed.

    An embedded model gets scenes that nothing was trained on, with their captions; any other model random blocks,
    which have no meaning but do for latency and parity.

    Args:
        pipeline: that takes them.
        condition: of the control image.
        indices: one for each request.
        fields: of `ResolvedRequest`, over the model's defaults.
    """
    for index in indices:
        image, prompt = control(pipeline, condition, index)
        yield pipeline.resolve(Request(prompt, controls=(Control(condition, image),), **{"seed": index, **fields}))


def control(pipeline: Pipeline, condition: str, index: int) -> tuple[NDArray[np.uint8], str]:
    """The index-th control image, uint8 [H,W,3] of the bundle's size, and its prompt."""
    m = pipeline.bundle.manifest
    if m.model not in EMBEDDED:
        return blocks(m.width, m.height, index), f"a photo of {index} colored blocks"
    scene = draw_scene(FIRST_SCENE + index)
    if condition == "seg":  # scenes have one size; the labels of each pixel are known
        return resize(colors_from_labels(scene.labels), m.width, m.height, "nearest"), scene.caption
    return pipeline.extract(condition, scene.image), scene.caption


def blocks(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """16 by 16 random colors, uint8 [H,W,3]."""
    cells = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 16 // height, np.arange(width) * 16 // width
    return np.ascontiguousarray(cells[rows][:, columns])
