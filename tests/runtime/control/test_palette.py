"""Segmentation colors."""

import numpy as np
import pytest
from cnpp_trt.conditions import ADE20K_PALETTE
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.control.palette import colors_from_labels, labels_from_colors


def test_exact_colors_round_trip() -> None:
    labels = np.random.default_rng(0).integers(0, 151, (512, 512)).astype(np.uint8)
    labels[labels == 150] = 255
    colors = colors_from_labels(labels)
    assert colors.shape == (512, 512, 3) and colors.dtype == np.uint8
    for label, color in enumerate(ADE20K_PALETTE):
        assert (colors[labels == label] == color).all()
    assert not colors[labels == 255].any()
    labels[labels == 48] = 6  # skyscraper shares its color with road
    back, inexact = labels_from_colors(colors)
    assert back.dtype == np.uint8 and inexact == 0
    np.testing.assert_array_equal(back, labels)


def test_nearest_color_by_brute_force() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    pixels[0, :50] = ADE20K_PALETTE[:50]
    colors = [*ADE20K_PALETTE, (0, 0, 0)]
    distance = [((pixels.astype(int) - color) ** 2).sum(-1) for color in colors]
    nearest = np.argmin(distance, axis=0)  # the first of equally near ones
    labels, inexact = labels_from_colors(pixels)
    np.testing.assert_array_equal(labels, np.where(nearest == 150, 255, nearest))
    assert inexact == pytest.approx((np.min(distance, axis=0) > 0).mean())


def test_unknown_labels_are_refused() -> None:
    for label in (150, 254, -1, 1000):
        with pytest.raises(UserError, match=f"label {label} "):
            colors_from_labels(np.array([[0, label]]))
