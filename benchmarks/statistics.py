"""What is said of repeated measurements: medians, percentiles, ratios, and intervals by bootstrap."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..schema import Meta

RESAMPLES = 10_000
CONFIDENCE = 0.95

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Span = Annotated[float, Meta(ge=-1e12, le=1e12)]
Times = Annotated[float, Meta(gt=0, le=1e12)]


class Summary(TypedDict):
    """Samples in the order in which they were taken, and their percentiles (linearly interpolated), in one unit.

    What no stage accounts for is a difference, and may be below 0.
    """

    median: Span
    p10: Span
    p90: Span
    p99: Span
    samples: Annotated[list[Span], Meta(max_length=1_000_000)]


class Ratio(TypedDict):
    """How many times larger one of two is: the median over rounds of the rounds' own ratios, and their range."""

    median: Times
    low: Times
    high: Times


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles of samples, at least one."""
    median, p10, p90, p99 = (float(v) for v in np.percentile(samples, [50, 10, 90, 99]))
    return Summary(median=median, p10=p10, p90=p90, p99=p99, samples=[float(s) for s in samples])


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Of two that were measured in turn, round by round: what slowed a round down slowed both."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(median=float(np.median(ratios)), low=min(ratios), high=max(ratios))


def resampling_weights(count: int, seed: int = 0, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of `count` units is drawn in each bootstrap resample: int64 [resamples, count], rows sum to count.

    Efron, Bootstrap methods: another look at the jackknife (1979): `count` draws with replacement are a multinomial
    draw of how often each comes up. A statistic that pools counts is then one matrix product.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


def percentile_interval(values: NDArray[np.floating], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """(low, high) of the bootstrap distribution `values` [resamples], as much cut off on either side."""
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
