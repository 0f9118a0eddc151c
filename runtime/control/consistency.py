"""Consistency: how well the condition re-extracted from a generated image matches the one given.

The metrics of the ControlNet++ paper (arXiv 2404.07987, section 4.1; its `eval/` scripts) in NumPy, on the paper's
scales:

| condition    | metric | scale         | computed on                                              |
|--------------|--------|---------------|----------------------------------------------------------|
| seg          | mIoU ↑ | 0–100 percent | label maps; as mmsegmentation, unlabeled pixels ignored  |
| canny        | F1 ↑   | 0–100 percent | edge / no edge per pixel; an edge is a value above 127    |
| hed, lineart | SSIM ↑ | 0–1           | multi-scale SSIM of gray maps scaled to [0, 1]            |
| depth        | RMSE ↓ | 0–255         | gray maps: the given one stretched from its minimum and   |
|              |        |               | maximum to 0–255, the extracted one divided by its maximum |

Over a data set mIoU is pooled over all images; F1 is pooled over the images of a prompt and averaged over prompts; SSIM
and RMSE are averaged over images.
Where there is nothing to find and nothing is found (no labeled pixel, no edge in either map), the maps agree: 100.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...bundles.bundle import Bundle
from ...bundles.manifest import TypicalScore
from ...conditions import CONDITIONS
from ...errors import UserError
from ...messages import unknown_choice
from .palette import CLASSES, UNLABELED, labels_from_colors

_Floats = NDArray[np.float64]

# Wang, Simoncelli, Bovik: Multi-scale structural similarity for image quality assessment (2003), table 1.
SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_C1, _C2 = 0.01**2, 0.03**2  # (k·L)² with the data range L = 1
_RADIUS = 5
_WINDOW = np.exp(-np.square(np.arange(-_RADIUS, _RADIUS + 1) / 1.5) / 2)
_WINDOW /= _WINDOW.sum()


@dataclass(frozen=True)
class Score:
    """A consistency score: the metric's name, its value on the paper's scale, and which direction is better.

    Attributes:
        grade: in a word, how good that is for the model and condition (see `graded`); empty where that is unknown.
    """

    metric: str
    value: float
    higher_is_better: bool
    grade: str = ""

    def __str__(self) -> str:
        """As the paper prints it: 'mIoU 43.64', 'F1 37.04', 'SSIM 0.8097', 'RMSE 28.32'."""
        return f"{self.metric} {self.value:.{4 if self.metric == 'SSIM' else 2}f}"


def score(condition: str, given: NDArray[np.uint8], extracted: NDArray[np.uint8]) -> Score:
    """Score one image by its condition's metric.

    Args:
        condition: a name in `conditions.CONDITIONS`.
        given: the condition image that steered the generation, uint8 [H, W, 3].
        extracted: the condition image extracted from the generated image, uint8 [H, W, 3].

    Raises:
        UserError: an unknown condition, or images of different or too small size.
    """
    if condition not in CONDITIONS:
        raise unknown_choice("condition", condition, CONDITIONS)
    if given.shape != extracted.shape or given.ndim != 3 or given.shape[2] != 3:
        raise UserError(f"cannot compare condition images of shapes {given.shape} and {extracted.shape}; resize one")
    row = CONDITIONS[condition]
    match row.metric:
        case "mIoU":
            value = mean_iou(labels_from_colors(given)[0], labels_from_colors(extracted)[0])
        case "F1":
            value = f1(edges(given), edges(extracted))
        case "SSIM":
            value = ms_ssim(_gray(given) / 255, _gray(extracted) / 255)
        case "RMSE":
            value = rmse(_gray(given), _gray(extracted))
    return Score(row.metric, value, row.higher_is_better)


def graded(score: Score, typical: TypicalScore | None) -> Score:
    """The score with its grade beside the model's own scores.

    `good` from their median on, `usual` down to what nine of ten of the model's images reach, `weak` below.

    Args:
        typical: the model's own scores on fresh conditions, `median` and `low` (the 10 % quantile on the worse side).
    """
    if typical is None:
        return score
    sign = 1 if score.higher_is_better else -1
    value = sign * score.value
    grade = "good" if value >= sign * typical["median"] else "usual" if value >= sign * typical["low"] else "weak"
    return replace(score, grade=grade)


def graded_score(bundle: Bundle, condition: str, given: NDArray[np.uint8], extracted: NDArray[np.uint8]) -> Score:
    """`score` with its grade beside the scores that the bundle's model typically has."""
    return graded(score(condition, given, extracted), bundle.manifest.conditions[condition].get("typical_score"))


class MeanIoU:
    """Mean intersection over union, with the confusion pooled over all images seen.

    As mmsegmentation's `IoUMetric`: pixels that are unlabeled (255) in the given map are ignored; a class that
    appears in neither map is left out of the mean. A labeled pixel that the extractor leaves unlabeled is a miss.
    """

    def __init__(self, classes: int = CLASSES) -> None:
        self._classes = classes
        self._intersection = np.zeros(classes, np.int64)
        self._union = np.zeros(classes, np.int64)

    def update(self, given: NDArray[np.integer], extracted: NDArray[np.integer]) -> None:
        """Add a pair of label maps of equal shape, each label below `classes`, or 255 for unlabeled."""
        if given.shape != extracted.shape:
            raise UserError(f"cannot compare label maps of shapes {given.shape} and {extracted.shape}; resize one")
        labeled = given != UNLABELED
        truth, guess = given[labeled], extracted[labeled]
        matched = self._areas(truth[truth == guess])
        self._intersection += matched
        self._union += self._areas(truth) + self._areas(guess[guess != UNLABELED]) - matched

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pixels in the intersection and in the union of each class, [classes] each: sums over all images seen."""
        return self._intersection.copy(), self._union.copy()

    def per_class(self) -> _Floats:
        """IoU of each class, float64 [classes], 0–100; NaN where a class appears in neither map."""
        return _ious(self._intersection, self._union)

    def value(self) -> float:
        """mIoU in percent; 100 when nothing labeled has been seen."""
        return float(mean_iou_of_counts(self._intersection, self._union))

    def _areas(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        areas = np.bincount(labels, minlength=self._classes)
        if len(areas) > self._classes:
            raise UserError(f"label {len(areas) - 1} is not one of the {self._classes} classes; remap the labels")
        return areas.astype(np.int64)


def mean_iou(given: NDArray[np.integer], extracted: NDArray[np.integer]) -> float:
    """mIoU, in percent, of one pair of label maps [H, W]: the mean over the classes of the given map.

    A class that only the extracted map has counts by what it takes from the others. Were it counted itself, as the
    paper's protocol does over a whole data set (`MeanIoU`), a few stray pixels would weigh as much as the sky.
    """
    metric = MeanIoU()
    metric.update(given, extracted)
    classes = np.unique(given[given != UNLABELED])
    return float(metric.per_class()[classes].mean()) if classes.size else 100.0


def mean_iou_of_counts(intersection: NDArray[np.number], union: NDArray[np.number]) -> _Floats:
    """mIoU in percent of `MeanIoU.counts`, or of sums of them: [..., classes] each → [...]; 100 for no label at all."""
    ious = _ious(intersection, union)
    present = np.isfinite(ious)
    number = present.sum(-1)
    total = np.where(present, ious, 0).sum(-1)
    mean: _Floats = np.divide(total, number, out=np.full(number.shape, 100.0), where=number > 0)
    return mean


def _ious(intersection: NDArray[np.number], union: NDArray[np.number]) -> _Floats:
    ious: _Floats = np.divide(100.0 * intersection, union, out=np.full(union.shape, np.nan), where=union > 0)
    return ious


def f1(given: NDArray[np.bool_], extracted: NDArray[np.bool_]) -> float:
    """F1 = 2·TP / (2·TP + FP + FN) of edge pixels, in percent.

    Args:
        given, extracted: bool, of one shape; [H, W], or several maps stacked to pool their pixels.

    Returns:
        0–100; 100 for two maps without any edge, 0 if only one of them has none.
    """
    return f1_of_counts(*f1_counts(given, extracted))


def f1_counts(given: NDArray[np.bool_], extracted: NDArray[np.bool_]) -> tuple[int, int]:
    """(TP, 2·TP + FP + FN): edge pixels that both have, and edge pixels in either map, added up."""
    return int(np.count_nonzero(given & extracted)), int(np.count_nonzero(given)) + int(np.count_nonzero(extracted))


def f1_of_counts(hits: int, marked: int) -> float:
    """F1 in percent of `f1_counts`, or sums of them."""
    return 200.0 * hits / marked if marked else 100.0


def ssim_scales(height: int, width: int) -> int:
    """The number of scales that multi-scale SSIM can use: 5 from 176 pixels, 4 from 99, 3 from 44, 2 from 12.

    The limits are torchmetrics': side // (scales − 1)² must exceed the window's 10 pixels.
    """
    side = min(height, width)
    if side < 12:
        raise UserError(f"multi-scale SSIM needs sides of at least 12 pixels, not {height}×{width}; use larger images")
    return max(scales for scales in range(2, len(SSIM_BETAS) + 1) if side // (scales - 1) ** 2 > 2 * _RADIUS)


def ms_ssim(given: NDArray[np.floating], extracted: NDArray[np.floating]) -> float:
    """Multi-scale structural similarity.

    With the settings of torchmetrics' `MultiScaleStructuralSimilarityIndexMeasure`, which the paper uses: Gaussian
    window of 11×11 and sigma 1.5 with reflected borders, k₁ = 0.01, k₂ = 0.03, data range 1; contrast terms averaged
    without the outer 5 pixels, negative terms set to 0, 2×2 average pooling between scales.

    Images too small for five scales (a side below 176) use as many as `ssim_scales` says, with the betas of these
    scales divided by their sum: 128×128 uses four. Such values compare with each other, not with values over five.

    Args:
        given, extracted: [H, W] in [0, 1].

    Returns:
        0–1; 1 for identical maps.
    """
    if given.shape != extracted.shape:
        raise UserError(f"cannot compare maps of shapes {given.shape} and {extracted.shape}; resize one")
    scales = ssim_scales(*given.shape)
    betas = np.array(SSIM_BETAS[:scales])
    betas /= betas.sum()
    x, y = given.astype(np.float64), extracted.astype(np.float64)
    result = 1.0
    for scale, beta in enumerate(betas):
        similarity, contrast = _similarity(x, y)
        result *= max(similarity if scale == scales - 1 else contrast, 0.0) ** beta
        x, y = _halve(x), _halve(y)
    return float(result)


def rmse(
    given: NDArray[np.number], extracted: NDArray[np.number], scaling: Literal["official", "maximum"] = "official"
) -> float:
    """Root mean squared error of two depth maps [H, W] (values ≥ 0), each first brought to 0–255.

    Args:
        given: the map that steered the generation.
        extracted: that of the generated image.
        scaling: `official`: as the scripts of the ControlNet++ repository do it (`eval/eval.py`, which writes both maps
            as 8-bit images, and `eval/eval_depth.py`). The given map is stretched so that its minimum is 0 and its
            maximum 255, the extracted one is divided by its maximum, and what is after the point is cut off. A given
            map whose minimum is not 0 is then at a distance from itself. One that is flat cannot be stretched, and is
            divided by its maximum. `maximum`: both are divided by their maximum and nothing is cut off, as the paper
            describes it: depth networks predict up to an unknown scale.

    Returns:
        0–255. A map of zeros stays zero.
    """
    if scaling == "maximum":
        label, prediction = _by_maximum(given), _by_maximum(extracted)
    else:
        label, prediction = _stretched(given), _levels(extracted)
    return float(np.sqrt(np.mean(np.square(label - prediction))))


def edges(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where an edge map uint8 [H, W, 3] has an edge: bool [H, W]."""
    return _gray(pixels) > 127


def _gray(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _by_maximum(depth: NDArray[np.number]) -> _Floats:
    top = float(depth.max())
    return depth.astype(np.float64) * (255 / top if top > 0 else 0)


def _stretched(label: NDArray[np.number]) -> _Floats:
    """As `eval/eval.py` brings a label to 0–255: in float64, cut to whole levels."""
    low, high = label.min(), label.max()
    return np.floor((label - low) / (high - low) * 255) if high > low else _levels(label)


def _levels(prediction: NDArray[np.number]) -> _Floats:
    """As `eval/eval.py` brings a network's output to 0–255: in float32, cut to whole levels."""
    top = np.float32(prediction.max())
    if top <= 0:
        return np.zeros(prediction.shape)
    if top == 255 and np.issubdtype(prediction.dtype, np.integer):
        return prediction.astype(np.float64)  # an extractor has done it
    levels: _Floats = np.floor(prediction.astype(np.float32) / top * np.float32(255)).astype(np.float64)
    return levels


def _similarity(x: _Floats, y: _Floats) -> tuple[float, float]:
    """Mean SSIM over the whole map, and mean contrast-structure term without its border. Both arguments [H, W]."""
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = np.maximum(_smooth(x * x) - mean_x**2, 0)
    variance_y = np.maximum(_smooth(y * y) - mean_y**2, 0)
    covariance = _smooth(x * y) - mean_x * mean_y
    contrast = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    inner = contrast[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
    # The last scale may be too small to have an inner part; its contrast is not used.
    return float((luminance * contrast).mean()), float(inner.mean()) if inner.size else 0.0


def _smooth(x: _Floats) -> _Floats:
    import cv2

    smoothed = cv2.sepFilter2D(x, cv2.CV_64F, _WINDOW, _WINDOW, borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(smoothed, np.float64)


def _halve(x: _Floats) -> _Floats:
    """2×2 average pooling; an odd last row or column is dropped."""
    height, width = x.shape[0] // 2, x.shape[1] // 2
    pooled: _Floats = x[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3))
    return pooled
