"""Segmentation maps as pictures: ADE20K labels to colors and back."""

import numpy as np
from numpy.typing import NDArray

from ...conditions import ADE20K_PALETTE
from ...errors import UserError

CLASSES = len(ADE20K_PALETTE)
# ADE20K pixels that belong to no class: label 255 once labels are shifted to 0 = wall, painted black.
UNLABELED = 255

_COLORS = np.zeros((256, 3), np.uint8)
_COLORS[:CLASSES] = ADE20K_PALETTE
# What a pixel may be read as: the palette's colors in order, then black.
_READABLE = np.array([*ADE20K_PALETTE, (0, 0, 0)], np.int32)
_LABELS = np.array([*range(CLASSES), UNLABELED], np.uint8)


def colors_from_labels(labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Paint a label map.

    Args:
        labels: integers [H, W], 0–149, or 255 where unlabeled.

    Returns:
        uint8 [H, W, 3]; unlabeled pixels are black.

    Raises:
        UserError: a label is neither.
    """
    known = ((labels >= 0) & (labels < CLASSES)) | (labels == UNLABELED)
    if not known.all():
        raise UserError(f"label {labels[~known].flat[0]} is not one of ADE20K's 0–{CLASSES - 1}; remap the labels")
    painted: NDArray[np.uint8] = _COLORS[labels]
    return painted


def labels_from_colors(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """Read a painted label map: each pixel gets the label of the nearest palette color (Euclidean, in RGB).

    Exact colors are read back exactly, except that 48 (skyscraper) shares its color with 6 (road) and counts as 6.
    Equally near colors go to the lowest label.

    Args:
        pixels: uint8 [H, W, 3].

    Returns:
        labels: uint8 [H, W], 0–149, or 255 (unlabeled) where the pixel is nearest to black.
        inexact_fraction: share of the pixels, 0–1, whose color is none of these; above 0 the map was resampled,
            stored lossily or painted with another palette.
    """
    nearest, distance, inverse, counts = _nearest(pixels)
    inexact = float(counts[distance > 0].sum() / max(inverse.size, 1))
    return _LABELS[nearest][inverse], inexact


def palette_distance(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each pixel of uint8 [H, W, 3] is from the nearest palette color or black: Euclidean, in RGB, [H, W]."""
    _, distance, inverse, _ = _nearest(pixels)
    return np.sqrt(distance.astype(np.float64))[inverse]


def _nearest(
    pixels: NDArray[np.uint8],
) -> tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.intp], NDArray[np.intp]]:
    """The distinct colors of an image and the nearest readable ones.

    For each distinct color the index of the nearest readable one and the squared distance to it; then for each pixel
    its color's number [H, W], and for each color its number of pixels.
    """
    wide = pixels.astype(np.uint32)
    packed = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    # Neighbors in a label map have one color: what is sorted are its runs.
    flat = packed.ravel()
    starts = np.flatnonzero(np.concatenate((np.ones(min(1, flat.size), bool), flat[1:] != flat[:-1])))
    lengths = np.diff(starts, append=flat.size)
    # Distances are taken once per distinct color: a clean map of 512×512 has a few dozen.
    colors, numbers = np.unique(flat[starts], return_inverse=True)
    inverse = np.repeat(numbers, lengths)
    counts = np.bincount(inverse, minlength=len(colors))
    rgb = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], -1).astype(np.int32)
    nearest = np.empty(len(rgb), np.intp)
    distance = np.empty(len(rgb), np.int32)
    chunk = 8192  # bounds the memory when every pixel differs, as in a photograph
    for start in range(0, len(rgb), chunk):
        part = slice(start, start + chunk)
        # |c − p|² without the term |c|², which no choice of p changes
        reduced = (_READABLE**2).sum(-1) - 2 * (rgb[part].astype(np.float64) @ _READABLE.T.astype(np.float64))
        nearest[part] = reduced.argmin(-1)
        distance[part] = ((rgb[part] - _READABLE[nearest[part]]) ** 2).sum(-1)
    return nearest, distance, inverse.reshape(packed.shape), counts
