"""The graph `update`: guidance, the sampler's matrix, and the clamp of x0, against their formula in float64."""

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cnpp_trt.runtime.sampling.schedulers import UNLIMITED

Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def session(tiny: Any) -> ort.InferenceSession:
    return ort.InferenceSession(tiny.bundle / "update.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture
def feeds(session: ort.InferenceSession) -> Feeds:
    """Two images with guidance, all of it random."""
    rng = np.random.default_rng(0)
    shapes: dict[str, Any] = {
        i.name: [{"guidance": 2, "images": 2}.get(d, d) for d in i.shape] for i in session.get_inputs()
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def run(session: ort.InferenceSession, feeds: Feeds, **changes: np.ndarray) -> Feeds:
    names = [o.name for o in session.get_outputs()]
    outputs: Any = session.run(names, {**feeds, **changes})
    return dict(zip(names, outputs, strict=True))


def formula(feeds: Feeds, limit: float) -> np.ndarray:
    """The five rows, float64. Row by row and not as one product, so that nothing is shared with the graph."""
    f = {name: array.astype(np.float64) for name, array in feeds.items()}
    guided = np.empty_like(f["noise"])
    for image in range(len(guided)):  # each has its own weights
        guided[image] = sum(f["guidance"][side, image] * f["noise_pred"][side, image] for side in range(2))
    given = [*f["state"], guided, f["noise"]]
    linear = [sum(f["coefficients"][row, i] * given[i] for i in range(6)) for row in range(5)]
    over = np.where(linear[2] > limit, limit - linear[2], np.where(linear[2] < -limit, -limit - linear[2], 0))
    return np.array([linear[row] + f["coefficients"][row, 6] * over for row in range(5)])


@pytest.mark.parametrize("limit", [0.5, 1.0, 3.0, UNLIMITED])
def test_the_formula(session: ort.InferenceSession, feeds: Feeds, limit: float) -> None:
    found = run(session, feeds, x0_limit=np.array([limit], np.float32))
    expected = formula(feeds, limit)
    np.testing.assert_allclose(found["new_state"], expected[:4], rtol=0, atol=2e-5)
    np.testing.assert_allclose(found["model_input"], expected[4], rtol=0, atol=2e-5)
    assert found["magnitude"][0] == pytest.approx(np.abs(expected[:4]).mean(), rel=1e-5)
    share = (np.abs(formula(feeds, UNLIMITED)[2]) > limit).mean()
    assert 0 < share < 1 if limit < UNLIMITED else share == 0


def test_where_nothing_is_clipped_the_last_column_changes_no_bit(session: ort.InferenceSession, feeds: Feeds) -> None:
    unlimited = np.array([UNLIMITED], np.float32)
    without = feeds["coefficients"].copy()
    without[:, 6] = 0
    found, expected = (
        run(session, feeds, x0_limit=unlimited),
        run(session, feeds, x0_limit=unlimited, coefficients=without),
    )
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_what_is_not_a_number_is_not_clamped_away(session: ort.InferenceSession, feeds: Feeds) -> None:
    bad = feeds["noise_pred"].copy()
    bad[1, 0, 0, 0, 0] = np.nan
    found = run(session, feeds, noise_pred=bad, x0_limit=np.ones(1, np.float32))
    assert np.isnan(found["new_state"][2, 0, 0, 0, 0]) and np.isnan(found["magnitude"])
