"""Many mixed requests on one pipeline: what its memory does, and that each either draws or is refused in one line."""

import gc
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cnpp_trt import Pipeline
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS
from cnpp_trt.runtime.settings.request import Control, Request
from requested import controls_of

PAGE = 4096


@dataclass
class Requests:
    """What became of the requests.

    Attributes:
        outcomes: how many were `drawn`, `refused`, or `interrupted` by their callback.
        resident: bytes of memory that the process holds after each request (Linux), garbage collected.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)

    def growth(self) -> float:
        """How many bytes a request adds in the second half, where every cache is full: the slope of a fitted line."""
        half = np.array(self.resident[len(self.resident) // 2 :], float)
        return float(np.polyfit(np.arange(len(half)), half, 1)[0])


class _Stopped(Exception):
    """What a user's callback raises."""


def mixed_requests(pipeline: Pipeline, count: int, seed: int = 0) -> Requests:
    """Draws `count` requests of every kind, errors in between.

    Conditions, schedulers, steps, sizes of control images, guidance, several images, clip skip, long prompts, initial
    images, extraction, interrupted callbacks and requests that are refused, in random order.
    Raises: AssertionError where an image or a message is not what it must be.
    """
    rng = random.Random(seed)
    done = Requests()
    for _ in range(count):
        done.outcomes[_one(pipeline, rng)] += 1
        gc.collect()
        done.resident.append(_resident())
    return done


def _one(pipeline: Pipeline, rng: random.Random) -> str:
    wrong = rng.choice(_WRONG) if rng.random() < 0.15 else None
    stops = rng.random() < 0.1

    def stop(*_: Any) -> None:
        raise _Stopped

    try:
        request = _request(pipeline, rng, wrong)
        result = pipeline(request, callback_on_step_end=stop if stops else None)
        if request.controls and rng.random() < 0.3:
            pipeline.extract(controls_of(request)[0].condition, result.images[0])
    except UserError as e:
        assert str(e).isprintable()
        assert wrong or "has no extractor" in str(e), e
        return "refused"
    except _Stopped:
        return "interrupted"
    assert wrong is None and not stops
    m = pipeline.bundle.manifest
    assert result.images.shape == (request.num_images_per_prompt, m.height, m.width, 3)
    return "drawn"


def _picture(rng: random.Random) -> np.ndarray:
    side = rng.choice((16, 64, 128, 200, 512))
    return np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (side, rng.choice((32, side)), 3), np.uint8)


def _request(pipeline: Pipeline, rng: random.Random, wrong: dict[str, Any] | None) -> Request:
    here = list(pipeline.bundle.manifest.conditions)
    chosen = rng.sample(here, rng.randint(0, len(here)))
    controls = [Control(c, _picture(rng), rng.uniform(0, 2), 0.0, rng.choice((0.5, 1.0))) for c in chosen]
    fields: dict[str, Any] = {
        "prompt": " ".join(rng.choice(("a house", "by a lake", "at dusk")) for _ in range(rng.choice((1, 5, 60)))),
        "negative_prompt": rng.choice(("", "rain")),
        "controls": controls,
        "num_inference_steps": rng.randint(1, 4),
        "guidance_scale": rng.choice((1.0, 3.0, 7.5)),
        "scheduler": rng.choice(SCHEDULERS),
        "seed": rng.randrange(2**32),
        "num_images_per_prompt": rng.choice((1, 1, 2)),
        "clip_skip": rng.choice((0, 0, 1)),
        "long_prompt": rng.random() < 0.2,
    }
    if rng.random() < 0.3:
        fields |= {"init_image": _picture(rng), "strength": rng.choice((0.8, 1.0)), "num_inference_steps": 4}
    return Request(**{**fields, **(wrong or {})})


_WRONG: tuple[dict[str, Any], ...] = (
    {"clip_skip": 99},
    {"scheduler": "pndm"},
    {"num_inference_steps": 0},
    {"guidance_scale": float("nan")},
    {"prompt": "\ud800"},
    {"controls": ["seg"]},
    {"init_image": np.zeros((64, 64, 3), np.uint8), "strength": 0.01, "num_inference_steps": 2},
    {"seed": 2**64},
)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
