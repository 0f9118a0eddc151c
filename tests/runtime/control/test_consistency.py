"""The paper's metrics against scikit-learn, torchmetrics and their formulas."""

import io
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.control.consistency import MeanIoU, Score, f1, mean_iou, ms_ssim, rmse, score, ssim_scales
from cnpp_trt.runtime.control.palette import colors_from_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

metrics = pytest.importorskip("sklearn.metrics")
torch = pytest.importorskip("torch")
torchmetrics_image = pytest.importorskip("torchmetrics.image")

RNG = np.random.default_rng(0)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, 2)


# --- mIoU -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 150), seed=st.integers(0, 2**32 - 1), noise=st.floats(0, 1))
def test_miou_is_the_mean_jaccard_index(classes: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, (3, 20, 20)).astype(np.uint8)
    guess = np.where(rng.random(truth.shape) < noise, rng.integers(0, classes, truth.shape), truth).astype(np.uint8)
    pooled = MeanIoU()
    for t, g in zip(truth, guess, strict=True):
        pooled.update(t, g)
    # scikit-learn takes the mean over the classes that appear in either map.
    expected = metrics.jaccard_score(truth.ravel(), guess.ravel(), average="macro") * 100
    assert pooled.value() == pytest.approx(expected)
    there = np.unique(truth[0])
    expected = metrics.jaccard_score(truth[0].ravel(), guess[0].ravel(), labels=there, average="macro") * 100
    assert mean_iou(truth[0], guess[0]) == pytest.approx(expected)


def test_miou_pools_and_does_not_average() -> None:
    a, b = np.array([[0, 0, 0, 1]]), np.array([[1, 1, 1, 1]])
    pooled = MeanIoU()
    pooled.update(a, a)
    pooled.update(a, b)
    confusion = metrics.confusion_matrix([*a[0], *a[0]], [*a[0], *b[0]])
    ious = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert pooled.value() == pytest.approx(100 * ious.mean())
    assert pooled.value() != pytest.approx((mean_iou(a, a) + mean_iou(a, b)) / 2)
    assert np.isnan(pooled.per_class()[2:]).all()
    np.testing.assert_allclose(pooled.per_class()[:2], 100 * ious)


def test_miou_corner_cases() -> None:
    zeros, ones, void = (np.full((4, 4), v, np.uint8) for v in (0, 1, 255))
    assert mean_iou(zeros, zeros) == 100
    assert mean_iou(zeros, ones) == 0
    assert mean_iou(void, zeros) == 100  # nothing labeled, nothing wrong
    assert mean_iou(zeros, void) == 0  # labeled, but not found
    half = np.where(np.arange(16).reshape(4, 4) < 8, 0, 255).astype(np.uint8)
    assert mean_iou(half, zeros) == 100  # unlabeled pixels are ignored …
    assert mean_iou(zeros, half) == 50  # … but not unfound ones
    stray = zeros.copy()
    stray[0, 0] = 7
    assert mean_iou(zeros, stray) == 100 * 15 / 16  # one stray pixel is no class of its own
    with pytest.raises(UserError, match="label 150"):
        mean_iou(np.full((2, 2), 150), np.zeros((2, 2), int))
    with pytest.raises(UserError, match="shapes"):
        mean_iou(zeros, zeros[:2])


# --- F1 ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), edges=st.floats(0.01, 0.9), noise=st.floats(0, 1))
def test_f1_is_scikit_learns(seed: int, edges: float, noise: float) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((2, 15, 15)) < edges
    guess = truth ^ (rng.random(truth.shape) < noise)
    expected = metrics.f1_score(truth.ravel(), guess.ravel(), zero_division=1.0) * 100
    assert f1(truth, guess) == pytest.approx(expected)


def test_f1_corner_cases() -> None:
    none, every = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert f1(none, none) == 100 and f1(every, every) == 100
    assert f1(none, every) == 0 and f1(every, none) == 0
    left = np.arange(16).reshape(4, 4) % 4 < 2
    assert f1(left, ~left) == 0
    assert f1(left, every) == pytest.approx(100 * 2 * 0.5 / 1.5)


# --- SSIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((256, 256), 5),
        ((176, 300), 5),
        ((175, 300), 4),
        ((128, 128), 4),
        ((99, 101), 4),
        ((98, 98), 3),
        ((44, 61), 3),
        ((43, 43), 2),
        ((16, 16), 2),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_ms_ssim_is_torchmetrics(shape: tuple[int, int], scales: int, noise: float) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    given = 0.5 + 0.25 * np.sin(x / 9) + 0.25 * np.cos(y / 5)
    extracted = np.clip(given + noise * RNG.standard_normal(shape), 0, 1)
    assert ssim_scales(*shape) == scales
    betas = np.array((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)[:scales])
    metric = torchmetrics_image.MultiScaleStructuralSimilarityIndexMeasure(
        data_range=1.0, betas=tuple(float(b) for b in betas / betas.sum())
    )
    expected = metric(torch.from_numpy(extracted)[None, None], torch.from_numpy(given)[None, None])
    assert ms_ssim(given, extracted) == pytest.approx(float(expected), abs=1e-6)


def test_ms_ssim_corner_cases() -> None:
    noise, flat = RNG.random((128, 128)), np.zeros((128, 128))
    assert ms_ssim(noise, noise) == pytest.approx(1) and ms_ssim(flat, flat) == pytest.approx(1)
    assert 0 <= ms_ssim(noise, 1 - noise) < 0.01  # anticorrelated: negative terms count as 0
    assert 0 < ms_ssim(flat, flat + 1) < 0.7  # only the luminance differs, and only the last scale sees it
    assert ms_ssim(flat, noise) == ms_ssim(noise, flat)
    with pytest.raises(UserError, match="12 pixels"):
        ms_ssim(noise[:11], noise[:11])


# --- RMSE -------------------------------------------------------------------------------------------------------------


def official_rmse(label: np.ndarray, predicted_depth: np.ndarray) -> float:
    """What the official scripts come to, step by step: eval/eval.py writes two 8-bit images, eval/eval_depth.py scores.

    Args:
        label: of the data set; predicted_depth: of the depth network, of any scale.
    """
    label = (label - label.min()) / (label.max() - label.min())
    annotation = io.BytesIO()
    Image.fromarray((label * 255).astype("uint8")).save(annotation, "PNG")
    predicted = torch.from_numpy(predicted_depth).float()
    found = io.BytesIO()
    # torchvision's to_pil_image of a float tensor, then as the script: RGB, and gray again.
    Image.fromarray((predicted / predicted.max()).mul(255).byte().numpy()).convert("RGB").convert("L").save(
        found, "PNG"
    )
    read = [torch.from_numpy(np.array(Image.open(file).convert("L"))).float() for file in (annotation, found)]
    return float(torch.sqrt(torch.nn.functional.mse_loss(read[1], read[0])))


@pytest.mark.parametrize("low, high", [(0, 256), (40, 200), (0, 90), (255, 256), (254, 256)])
def test_rmse_is_the_official_scripts(low: int, high: int) -> None:
    given = RNG.integers(0, 200, (30, 30)).astype(np.uint8) + np.uint8(17)
    extracted = RNG.integers(low, high, (30, 30))
    expected = official_rmse(given, extracted)
    assert rmse(given, extracted) == pytest.approx(expected, abs=0.02)
    assert rmse(given, extracted.astype(np.uint8)) == pytest.approx(expected, abs=0.02)
    assert rmse(given, extracted * 0.01) == pytest.approx(official_rmse(given, extracted * 0.01), abs=0.02)


def test_rmse_by_the_maximum_is_the_formula() -> None:
    given, extracted = RNG.integers(0, 200, (2, 30, 30))
    total = 0.0
    for a, b in zip(given.ravel().tolist(), extracted.ravel().tolist(), strict=True):
        total += (255 * a / given.max() - 255 * b / extracted.max()) ** 2
    assert rmse(given, extracted, "maximum") == pytest.approx(math.sqrt(total / 900))
    assert rmse(given.astype(np.uint8), extracted.astype(np.uint8), "maximum") == pytest.approx(math.sqrt(total / 900))
    assert rmse(given, given * 0.1, "maximum") == pytest.approx(0)  # depth is known up to a scale


@pytest.mark.parametrize("scaling", ["official", "maximum"])
def test_rmse_corner_cases(scaling: Literal["official", "maximum"]) -> None:
    black, white = np.zeros((5, 5)), np.full((5, 5), 255)
    assert rmse(black, black, scaling) == 0 and rmse(white, white, scaling) == 0
    assert rmse(black, white, scaling) == 255 and rmse(white * 0 + 3, black, scaling) == 255


def test_rmse_of_a_map_that_does_not_reach_0() -> None:
    """Stretched, it is at a distance from itself, as in the official scripts: half of it by 127.5 here."""
    given = np.repeat(np.array([[51, 255]], np.uint8), 8, 0)
    assert rmse(given, given) == pytest.approx(51 / math.sqrt(2)) == official_rmse(given, given)
    assert rmse(given, given, "maximum") == 0


# --- a photo with its true depth --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motorcycle() -> tuple[np.ndarray, np.ndarray]:
    """A photo uint8 [500,741,3] of the Middlebury stereo data and its true disparity, float32, from scikit-image.

    Disparity is inverse depth up to a factor, which is what DPT predicts. It is infinite where it is not known.
    """
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    with np.load(data / "motorcycle_disp.npz") as file:
        disparity = file["arr_0"]
    assert 59.9 < disparity[np.isfinite(disparity)].max() < 60 and 7.1 < disparity.min() < 7.2
    return np.asarray(Image.open(data / "motorcycle_left.png").convert("RGB")), disparity


def as_map(disparity: np.ndarray, unknown: float) -> np.ndarray:
    """As an extractor would draw it: uint8 [H,W,3], 255 is the nearest."""
    known = np.where(np.isfinite(disparity), disparity, unknown)
    return gray(np.floor(known * (255 / known.max())))


def test_the_score_of_a_true_depth(motorcycle: tuple[np.ndarray, np.ndarray]) -> None:
    _, disparity = motorcycle
    true, shifted = as_map(disparity, 0), as_map(np.roll(disparity, 20, 1), 0)
    assert score("depth", true, true).value == 0  # what is not known is 0: nothing to stretch
    found = score("depth", true, shifted)
    assert found.value == pytest.approx(official_rmse(true[..., 0], shifted[..., 0]), abs=0.02)
    assert 20 < found.value < 60
    known = disparity[np.isfinite(disparity)].astype(np.float64)
    # With the farthest for what is not known, stretching moves d by (max - d) / (max - min) * min / max of 255.
    distance = (known.max() - np.where(np.isfinite(disparity), disparity, known.min())) / (known.max() - known.min())
    expected = math.sqrt(np.mean((255 * distance * known.min() / known.max()) ** 2))
    far = as_map(disparity, known.min())
    assert score("depth", far, far).value == pytest.approx(expected, abs=0.6)  # of whole levels
    assert expected > 15 and rmse(far[..., 0], far[..., 0], "maximum") == 0


def test_the_score_of_an_extracted_depth(miniature: Any, motorcycle: tuple[np.ndarray, np.ndarray]) -> None:
    """The extractor's map of the photo against the truth, at the bundle's size, as the official scripts score it."""
    photo, disparity = motorcycle
    truth = np.asarray(Image.fromarray(as_map(disparity, 0)).resize(miniature.size, Image.Resampling.NEAREST))
    extracted = miniature.pipeline.extract("depth", photo)
    expected = official_rmse(truth[..., 0], extracted[..., 0])
    assert score("depth", truth, extracted).value == pytest.approx(expected, abs=0.6)
    assert 0 < expected < 255


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS)
def test_score_of_each_condition(condition: str) -> None:
    if condition == "seg":
        given, other = (colors_from_labels(RNG.integers(0, 5, (64, 64))) for _ in range(2))
    elif condition == "canny":
        given, other = (gray(255 * (RNG.random((64, 64)) < 0.2)) for _ in range(2))
    else:
        given, other = (gray(RNG.integers(0, 256, (64, 64))) for _ in range(2))
    same, different = score(condition, given, given), score(condition, given, other)
    row = CONDITIONS[condition]
    assert (same.metric, same.higher_is_better) == (row.metric, row.higher_is_better)
    assert same.value == pytest.approx({"mIoU": 100, "F1": 100, "SSIM": 1, "RMSE": 0}[row.metric])
    assert different.value < same.value if row.higher_is_better else different.value > same.value
    gray_maps = [torch.from_numpy(m[..., 0] / 255)[None, None] for m in (other, given)]
    ssim = torchmetrics_image.MultiScaleStructuralSimilarityIndexMeasure(
        data_range=1.0, betas=tuple(float(b) for b in np.array((0.0448, 0.2856, 0.3001)) / 0.6305)
    )
    expected = {
        "mIoU": lambda: (
            100
            * metrics.jaccard_score(
                *(colors.reshape(-1, 3) @ (1, 256, 65536) for colors in (given, other)), average="macro"
            )
        ),
        "F1": lambda: 100 * metrics.f1_score(given[..., 0].ravel() > 0, other[..., 0].ravel() > 0),
        "SSIM": lambda: float(ssim(*gray_maps)),
        "RMSE": lambda: official_rmse(given[..., 0], other[..., 0]),
    }[row.metric]()
    assert different.value == pytest.approx(expected, rel=1e-3)


def test_score_of_label_maps_reads_colors() -> None:
    labels, guess = RNG.integers(0, 7, (2, 32, 32))
    expected = metrics.jaccard_score(labels.ravel(), guess.ravel(), average="macro") * 100
    assert score("seg", colors_from_labels(labels), colors_from_labels(guess)).value == pytest.approx(expected)


def test_score_refuses() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="unknown condition 'pose': choose from seg"):
        score("pose", image, image)
    with pytest.raises(UserError, match="shapes"):
        score("seg", image, image[:16])


def test_score_prints_as_the_paper() -> None:
    assert str(Score("SSIM", 0.80971, True)) == "SSIM 0.8097"
    assert str(Score("mIoU", 43.641, True)) == "mIoU 43.64"
