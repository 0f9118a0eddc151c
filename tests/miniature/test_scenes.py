"""Scenes: the same seed gives the same scene; image, labels, depth and caption tell of one thing."""

import re

import numpy as np
import pytest
from cnpp_trt.miniature.scenes import LABELS, SIZE, Scene, draw_scene

SEEDS = range(40)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed) for seed in SEEDS]


def test_same_seed_same_scene(scenes: list[Scene]) -> None:
    for seed in SEEDS[:5]:
        again = draw_scene(seed)
        assert np.array_equal(again.image, scenes[seed].image)
        assert np.array_equal(again.labels, scenes[seed].labels)
        assert np.array_equal(again.depth, scenes[seed].depth)
        assert again.caption == scenes[seed].caption


def test_seeds_differ(scenes: list[Scene]) -> None:
    assert len({s.image.tobytes() for s in scenes}) == len(scenes)


def test_shapes_and_ranges(scenes: list[Scene]) -> None:
    for s in scenes:
        assert s.image.shape == (SIZE, SIZE, 3) and s.image.dtype == np.uint8
        assert s.labels.shape == (SIZE, SIZE) and set(np.unique(s.labels)) <= set(LABELS.values())
        assert s.depth.shape == (SIZE, SIZE) and s.depth.min() >= 0 and s.depth.max() <= 1


def test_sky_is_far_and_above(scenes: list[Scene]) -> None:
    for s in scenes:
        sky = s.labels == LABELS["sky"]
        assert sky[0].all(), "the first row is sky"
        assert s.depth[sky].max() < 0.05
        assert s.depth[~sky].mean() > s.depth[sky].mean()


def test_ground_comes_nearer_downwards(scenes: list[Scene]) -> None:
    ground = [LABELS[name] for name in ("grass", "sand")]
    for s in scenes:
        rows = [s.depth[y][np.isin(s.labels[y], ground)] for y in range(SIZE)]
        means = [row.mean() for row in rows if row.size]
        assert np.all(np.diff(means) > -1e-3)


@pytest.mark.parametrize(
    ("pattern", "label"),
    [(r"\bhouse\b", "house"), (r"\btrees?\b", "tree"), ("mountains", "mountain"), ("road", "road")],
)
def test_caption_names_what_is_there(scenes: list[Scene], pattern: str, label: str) -> None:
    named = [bool(re.search(pattern, s.caption)) for s in scenes]
    there = [bool((s.labels == LABELS[label]).any()) for s in scenes]
    assert named == there
    assert any(named) and not all(named), "the test sees both cases"
