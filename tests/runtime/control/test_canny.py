"""Canny edges against kornia's."""

from pathlib import Path

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.control import canny as module
from cnpp_trt.runtime.control.canny import canny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

torch = pytest.importorskip("torch")
kornia = pytest.importorskip("kornia")
skimage = pytest.importorskip("skimage")

# All of these lie in scikit-image's wheel.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "rocket.jpg",
    "text.png",
)


def reference(pixels: np.ndarray, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    planes = np.array(pixels if pixels.ndim == 3 else pixels[..., None])
    image = torch.from_numpy(planes).permute(2, 0, 1)[None].float() / 255
    edges = kornia.filters.Canny(low, high, (5, 5), (1.0, 1.0), hysteresis=True)(image)[1]
    return (edges[0, 0].numpy() * 255).astype(np.uint8)


def differing(pixels: np.ndarray, **thresholds: float) -> int:
    edges = canny(pixels, **thresholds)
    assert edges.dtype == np.uint8 and edges.shape == pixels.shape[:2] and set(np.unique(edges)) <= {0, 255}
    return int((edges != reference(pixels, **thresholds)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_exact(name: str) -> None:
    with Image.open(Path(skimage.__file__).parent / "data" / name) as photograph:
        for mode, size in (
            ("RGB", None),
            ("RGB", (128, 128)),
            ("RGB", (512, 512)),
            ("L", (128, 128)),
            ("L", (200, 300)),
        ):
            image = photograph.convert(mode)
            pixels = np.asarray(image if size is None else image.resize(size, Image.Resampling.BICUBIC))
            assert 0 < canny(pixels).mean() < 255
            assert differing(pixels) == 0, (mode, size)


@pytest.mark.parametrize("shape", [(3, 3), (16, 16), (31, 47), (64, 64), (200, 201), (256, 256), (512, 512)])
def test_noise_is_exact(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    assert differing(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) == 0
    assert differing(rng.integers(0, 256, shape, dtype=np.uint8), low=0.7, high=1.1) == 0


def synthetic(size: int) -> dict[str, np.ndarray]:
    y, x = np.mgrid[:size, :size]
    return {
        "disc": np.hypot(x - size / 2, y - size / 2) < size / 3,
        "checkerboard": (x // 8 + y // 8) % 2,
        "step": x > size // 2,
        "diagonal": x > y,
        "ramp": x / size,
        "constant": np.full((size, size), 0.7),
        "line": x == size // 2,
        "point": (x == size // 2) & (y == size // 3),
        "rings": 0.5 + 0.5 * np.sin(np.hypot(x - size / 2, y - size / 2)),
    }


@pytest.mark.parametrize("size", [40, 128, 512])
def test_synthetic_shapes_differ_in_no_more_than_ties(size: int) -> None:
    """Their symmetry makes exact ties, which PyTorch breaks by the last bit of its square root: 0.6 % of the pixels."""
    for name, values in synthetic(size).items():
        pixels = (np.asarray(values, np.float64) * 255).astype(np.uint8)
        assert differing(pixels) <= 0.006 * size**2, name
    assert not canny(np.full((40, 40, 3), 99, np.uint8)).any()


def test_a_step_is_one_line_at_the_left_of_the_tie() -> None:
    pixels = np.zeros((20, 20), np.uint8)
    pixels[:, 10:] = 255
    expected = np.zeros_like(pixels)
    expected[:, 9] = 255
    np.testing.assert_array_equal(canny(pixels), expected)


@settings(max_examples=50, deadline=None)
@given(
    weak=arrays(np.bool_, st.tuples(st.integers(1, 24), st.integers(1, 24))),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 0.3),
)
def test_connected_components_are_the_iterated_dilation(weak: np.ndarray, seed: int, share: float) -> None:
    strong = weak & (np.random.default_rng(seed).random(weak.shape) < share)
    edges, grown = strong, None
    while grown is None or (grown != edges).any():
        edges = edges if grown is None else grown
        padded = np.pad(edges, 1)
        height, width = weak.shape
        around = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        grown = np.any(around, axis=0) & weak
    np.testing.assert_array_equal(module._hysteresis(weak, strong) > 0, grown)


@pytest.mark.parametrize("thresholds", [(0, 0.1), (-1, 1), (0.2, 0.1), (float("nan"), 1), (0.1, float("inf"))])
def test_bad_thresholds(thresholds: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="thresholds"):
        canny(np.zeros((20, 20), np.uint8), *thresholds)


@pytest.mark.parametrize("shape", [(2, 9), (9, 9, 4), (9,), (1, 9, 9, 3)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="RGB or gray"):
        canny(np.zeros(shape, np.uint8))
