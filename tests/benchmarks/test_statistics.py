"""Percentiles and bootstrap against NumPy's definition and SciPy's."""

import statistics as standard

import numpy as np
import pytest
from cnpp_trt.benchmarks.statistics import paired_ratio, percentile_interval, resampling_weights, summarize
from scipy.stats import bootstrap


def test_summary():
    samples = list(np.random.default_rng(0).exponential(size=101))
    found = summarize(samples)
    deciles = standard.quantiles(samples, n=100, method="inclusive")
    assert found["samples"] == samples
    expected = (standard.median(samples), deciles[9], deciles[89], deciles[98])
    assert (found["median"], found["p10"], found["p90"], found["p99"]) == pytest.approx(expected)
    assert summarize([2.0])["p99"] == 2.0


def test_ratio_is_of_rounds():
    # A round that was slow for both says nothing about either.
    found = paired_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert found == {"median": 2.0, "low": 2.0, "high": pytest.approx(2.2)}


@pytest.mark.parametrize("count", [5, 60])
def test_bootstrap_of_a_mean_is_scipys(count: int):
    values = np.random.default_rng(count).gamma(2.0, size=count)
    weights = resampling_weights(count)
    assert weights.shape == (10_000, count) and (weights.sum(1) == count).all()
    low, high = percentile_interval(weights @ values / count)
    other = bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1))
    width = other.confidence_interval.high - other.confidence_interval.low
    assert low == pytest.approx(other.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(other.confidence_interval.high, abs=0.05 * width)
