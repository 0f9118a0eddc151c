"""What a user of the package may write; the checkers of types read it as a project of its own, and nothing runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import assert_type

import numpy as np
from cnpp_trt import Control, Pipeline, Request, Result, RuntimeOptions, Score
from numpy.typing import NDArray
from PIL import Image


def draw(bundle: Path, maps: Sequence[Path], out: Path) -> list[Image.Image]:
    """One image of each map, then several of the first."""
    options = RuntimeOptions("onnxruntime-cpu", threads=2)
    with Pipeline.open(bundle, options) as pipeline:
        requests = [Request("a house", controls=Control("seg", file), seed=i) for i, file in enumerate(maps)]
        results = pipeline.batch(requests)
        assert_type(results, list[Result])
        result = pipeline("a house", Control("depth", Image.open(maps[0]), 0.8), num_inference_steps=4, seed=[1, 2])
        assert_type(result, Result)
        score = pipeline.score("depth", maps[0], result.images[0])
        assert_type(score, Score)
        result.save(out)
        return [image for found in (*results, result) for image in found.pil()]


def stepwise(pipeline: Pipeline, request: Request) -> list[NDArray[np.float32]]:
    """The latents after each step."""
    latents: list[NDArray[np.float32]] = []

    def keep(step: int, timestep: float, x: NDArray[np.float32]) -> None:
        latents.append(x)

    pipeline(request, callback_on_step_end=keep)
    return latents
