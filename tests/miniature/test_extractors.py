"""The extractors: fixed filters against SciPy, shapes and ranges, and what a folder holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cnpp_trt.developer.miniature.data import FILTERS
from cnpp_trt.developer.miniature.extractor_training import save_extractor
from cnpp_trt.developer.miniature.muon import orthogonal
from cnpp_trt.export.extractors.miniature import LineArt, SoftEdges, gaussian, load_extractor, make_extractor
from scipy import ndimage
from skimage import data as photos

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return photos.astronaut()[:128, :160].astype(np.float64) / 255


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


def smooth(plane: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(plane, sigma, mode="nearest", radius=int(np.ceil(3 * sigma)))


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((values - low) / (high - low), 0, 1)


def test_soft_edges_are_scipys(photo: np.ndarray) -> None:
    module = SoftEdges(1.2, 0.01, 0.12)
    squares = np.zeros(photo.shape[:2])
    for c in range(3):
        blurred = smooth(photo[..., c], 1.2)
        for axis in (0, 1):
            squares += (ndimage.sobel(blurred, axis, mode="nearest") / 8) ** 2
    expected = ramp(np.sqrt(squares + 1e-8), 0.01, 0.12)
    assert np.abs(module(as_batch(photo))[0].numpy() - expected).max() < 1e-4
    assert expected.max() == 1 and np.median(expected) < 0.5, "the photo has edges and flat parts"


def test_line_art_is_scipys(photo: np.ndarray) -> None:
    module = LineArt(1.0, 0.006, 0.035)
    darker = [smooth(photo[..., c], 1.6) - smooth(photo[..., c], 1.0) for c in range(3)]
    expected = ramp(np.max(darker, axis=0), 0.006, 0.035)
    assert np.abs(module(as_batch(photo))[0].numpy() - expected).max() < 1e-4
    assert expected.max() == 1 and np.median(expected) < 0.5


def test_line_art_draws_dark_lines_white_on_black() -> None:
    page = np.ones((64, 64, 3))
    page[:, 30:32] = 0.0
    settings: dict[str, Any] = {k: v for k, v in FILTERS["lineart"].items() if k != "type"}
    lines = LineArt(**settings)(as_batch(page))[0].numpy()
    assert lines[:, 30:32].min() == 1 and lines[:, :20].max() == 0


def test_gaussian_is_normalized() -> None:
    kernel = gaussian(1.0)
    assert kernel.shape == (7,) and kernel.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("condition", ["seg", "depth"])
def test_networks_survive_their_folder(tmp_path: Path, condition: str) -> None:
    torch.manual_seed(0)
    config = {"type": "depth_network", "width": 8}
    if condition == "seg":
        config = {"type": "segmentation_network", "width": 8, "labels": [2, 16, 9]}
    module = make_extractor(config).eval()
    save_extractor(module, config, tmp_path)
    image = torch.rand(2, 3, 64, 96)
    found = load_extractor(tmp_path)(image)
    assert found.shape == (2, 64, 96)
    if condition == "seg":
        assert found.dtype == torch.uint8 and set(found.unique().tolist()) <= {2, 16, 9}
    else:
        assert found.min() >= 0 and found.max() <= 1
        assert torch.allclose(found, module(image), atol=2e-3), "weights are kept in fp16"


def test_unknown_extractor_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": "midas"}))
    with pytest.raises(ValueError, match="midas"):
        load_extractor(tmp_path)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_muons_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    singular = torch.linalg.svdvals(orthogonal(torch.randn(*shape, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.6 and singular.max() < 1.3
