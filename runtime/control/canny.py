"""Canny edges as kornia computes them, in NumPy.

ControlNet++ trains and scores canny with `kornia.filters.canny`, so an edge map from OpenCV is not what its ControlNet
has seen. This is kornia 0.9's algorithm (its `filters/canny.py`) in float32: BT.601 gray, 5×5 Gaussian of sigma 1
with reflected border, unnormalized Sobel with replicated border, non-maximum suppression along eight directions,
strict thresholds on √(gx² + gy² + eps), hysteresis over 8-neighbors.

On photographs the result equals kornia's pixel for pixel (`test_canny.py`). Only where neighboring
magnitudes tie to the last bit, as along symmetric synthetic shapes, single pixels may differ (measured: at most 0.6 %
of a chessboard, 6 pixels of a disc): PyTorch's square root is off by one unit in the last place on some processors,
which breaks such ties its own way.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError

_Plane: TypeAlias = NDArray[np.float32]

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_EPS = np.float32(1e-6)
_GAUSSIAN = np.exp(-np.square(np.arange(-2, 3, dtype=np.float32)) / 2)
_GAUSSIAN = (_GAUSSIAN / _GAUSSIAN.sum()).astype(np.float32)
# (dy, dx) of the neighbor in direction k, counted from +x (right) towards +y (down) in steps of 45 degrees.
_NEIGHBORS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
# PyTorch gives a convolution of more elements than this to oneDNN, which fuses multiply and add; below it, it rounds
# the product first.
_FUSED_ABOVE = 20_480


def canny(pixels: NDArray[np.uint8], low: float = 0.1, high: float = 0.2) -> NDArray[np.uint8]:
    """Find edges.

    Args:
        pixels: uint8 [H, W, 3] (RGB) or [H, W] (gray), each side at least 3.
        low, high: thresholds on the magnitude of the unnormalized Sobel gradient of the image scaled to [0, 1] (a
            sharp black-white step has about 2.6), 0 < low ≤ high. Unlike `cv2.Canny`'s, they are not on 0–255.

    Returns:
        uint8 [H, W]: 255 on edges, 0 elsewhere.

    Raises:
        UserError: an image or threshold outside of these ranges.
    """
    if not 0 < low <= high < math.inf:
        raise UserError(f"canny thresholds must satisfy 0 < low ≤ high, not low {low}, high {high}")
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or min(pixels.shape[:2]) < 3:
        raise UserError(f"canny needs an RGB or gray image of at least 3×3, not one of shape {pixels.shape}")

    image = pixels.astype(np.float32) / np.float32(255)
    gray = _luma(image) if image.ndim == 3 else image
    gx, gy = _sobel(_blur(gray))
    magnitude = _suppress(gx, gy)
    return _hysteresis(magnitude > np.float32(low), magnitude > np.float32(high))


def _fused(a: _Plane, weight: np.float32, total: _Plane) -> _Plane:
    """a·weight + total, rounded once to float32, as a fused multiply-add does (the product is exact in float64)."""
    return (a.astype(np.float64) * np.float64(weight) + total).astype(np.float32)


def _luma(image: _Plane) -> _Plane:
    red, green, blue = np.moveaxis(image, -1, 0)
    return _fused(blue, _GRAY[2], _fused(green, _GRAY[1], red * _GRAY[0]))


def _blur(gray: _Plane) -> _Plane:
    """Separable 5-tap Gaussian of sigma 1: along the rows first, then along the columns. [H, W] → [H, W]."""
    radius = len(_GAUSSIAN) // 2
    for axis in (1, 0):
        size = gray.shape[axis]
        padded = np.pad(gray, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        taps = [padded[:, t : t + size] if axis == 1 else padded[t : t + size] for t in range(len(_GAUSSIAN))]
        gray = taps[0] * _GAUSSIAN[0]
        for tap, weight in zip(taps[1:], _GAUSSIAN[1:], strict=True):
            gray = _fused(tap, weight, gray) if padded.size > _FUSED_ABOVE else tap * weight + gray
    return gray


def _sobel(gray: _Plane) -> tuple[_Plane, _Plane]:
    """Unnormalized 3×3 Sobel derivatives along x and y, summed in the order of the kernel's taps."""
    height, width = gray.shape
    padded = np.pad(gray, 1, mode="edge")

    def at(dy: int, dx: int) -> _Plane:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    gx = -at(-1, -1) + at(-1, 1) - 2 * at(0, -1) + 2 * at(0, 1) - at(1, -1) + at(1, 1)
    gy = -at(-1, -1) - 2 * at(-1, 0) - at(-1, 1) + at(1, -1) + 2 * at(1, 0) + at(1, 1)
    return gx, gy


def _suppress(gx: _Plane, gy: _Plane) -> _Plane:
    """Gradient magnitude where it is a maximum along the gradient's direction, 0 elsewhere."""
    height, width = gx.shape
    # Beyond the image lies a flat pixel of magnitude √eps, which no flat pixel beats.
    padded = np.sqrt(np.pad(gx * gx + gy * gy, 1) + _EPS)
    magnitude = padded[1:-1, 1:-1]
    direction = np.round(np.arctan2(gy, gx) * np.float32(4 / math.pi)).astype(np.int8) % 8

    kept = magnitude > padded[0, 0]
    for k, (dy, dx) in enumerate(_NEIGHBORS):
        neighbor = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        # Of two equal pixels across a step the left (upper) one is kept, so a tie with the right (lower) one is won.
        beats = magnitude >= neighbor if k in (0, 2) else magnitude > neighbor
        kept &= beats | (direction % 4 != k % 4)
    suppressed: _Plane = magnitude * kept
    return suppressed


def _hysteresis(weak: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Weak pixels connected to a strong one: what kornia's loop converges to, in one pass over connected components."""
    import cv2

    count, labels = cv2.connectedComponents(weak.astype(np.uint8), connectivity=8)
    component: NDArray[np.int32] = np.asarray(labels, np.int32)
    is_edge = np.zeros(count, np.uint8)
    is_edge[component[strong]] = 255
    edges: NDArray[np.uint8] = is_edge[component]
    return edges
