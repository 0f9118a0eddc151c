"""Image metrics against scikit-image, torchmetrics and the papers' formulas."""

import base64
import importlib.util
import io

import numpy as np
import pytest
import torch
from cnpp_trt.benchmarks.image_metrics import Lpips, difference_map, max_difference, png, psnr, ssim
from cnpp_trt.errors import CnppError
from hints import hint
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr


def picture(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noisy(image: np.ndarray, levels: int, seed: int = 9) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-levels, levels + 1, image.shape)
    return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("levels", [1, 10, 200])
def test_psnr_is_that_of_scikit_image_and_torchmetrics(levels):
    a = picture(0)
    b = noisy(a, levels)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-12)
    wide = torch_psnr(torch.tensor(b).double(), torch.tensor(a).double(), data_range=255.0)
    assert psnr(a, b) == pytest.approx(float(wide), rel=1e-6)


def test_equal_pictures_have_no_psnr():
    assert psnr(picture(0), picture(0)) is None
    assert ssim(picture(0), picture(0)) == 1
    assert max_difference(picture(0), picture(0)) == 0


def test_differences_do_not_wrap_around():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    assert max_difference(black, white) == max_difference(white, black) == 255
    assert psnr(black, white) == psnr(white, black) == 0


@pytest.mark.parametrize("levels", [1, 30, 255])
def test_ssim_is_the_formula(levels):
    """Wang, Bovik, Sheikh, Simoncelli: Image quality assessment (2004), equation 13, with C1 = (0.01 L)² and
    C2 = (0.03 L)²; windows of 7 by 7 that lie within the image, equally weighted, with sample covariances."""
    a = picture(1)
    b = noisy(a, levels)

    def windows(image: np.ndarray) -> np.ndarray:
        slid = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (7, 7), axis=(0, 1))
        return slid.reshape(*slid.shape[:3], 49)

    x, y = windows(a), windows(b)
    mean_x, mean_y = x.mean(-1), y.mean(-1)
    covariance = ((x - mean_x[..., None]) * (y - mean_y[..., None])).sum(-1) / 48
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (x.var(-1, ddof=1) + y.var(-1, ddof=1) + c2)
    assert ssim(a, b) == pytest.approx(similarity.mean(), rel=1e-9)


def test_lpips_says_what_it_needs():
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed: whether LPIPS works depends on a download")
    with pytest.raises(CnppError, match=f"LPIPS needs torchvision, which is not installed: {hint('quality')}"):
        Lpips()


def test_the_map_shows_where_and_how_much():
    a = np.full((2, 3, 3), 100, np.uint8)
    b = a.copy()
    b[0, 1] = (100, 103, 100)  # half of the largest
    b[1, 2] = (94, 100, 101)  # the largest, downwards
    shown, scale = difference_map(a, b)
    assert scale == 6
    assert shown[1, 2].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == [255, 128, 0]  # halfway along black, red, yellow, white
    shown[1, 2] = shown[0, 1] = 0
    assert not shown.any()


def test_the_map_grows_brighter_with_the_difference():
    a = np.zeros((1, 256, 3), np.uint8)
    b = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, -1)
    shown, scale = difference_map(a, b)
    brightness = np.asarray(Image.fromarray(shown).convert("L"))[0].astype(int)
    assert scale == 255
    assert (np.diff(brightness) >= 0).all()
    assert len(np.unique(shown[0], axis=0)) == 256, "two differences look the same"


def test_the_map_of_equal_pictures_is_black():
    shown, scale = difference_map(picture(3), picture(3))
    assert scale == 1
    assert not shown.any()


def test_a_png_holds_the_picture():
    image = Image.open(io.BytesIO(base64.b64decode(png(picture(4)), validate=True)))
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), picture(4))
