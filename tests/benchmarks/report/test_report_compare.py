"""Two results compared: what moved is found, what did not is left alone, and the bootstrap is scipy's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sample_results as sample
from cnpp_trt.benchmarks.report.compare import LEAST_NOISE, changes, compare_samples, side_by_side
from cnpp_trt.benchmarks.result import RECORDS
from scipy import stats

pytestmark = pytest.mark.slow

OF = ("a contender", "a case", "whole")


def draw(seed: int, count: int = 20, median: float = 1.0, noise: float = 0.05) -> list[float]:
    return list(median * np.exp(noise * np.random.default_rng(seed).standard_normal(count)))


def bench(seed: int, **changed: Any) -> Any:
    return sample.make_result("bench", sample.make_bench(seed, **changed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [5, 9, 20])
def test_interval_is_scipys(seed: int, count: int) -> None:
    """The percentile interval of two independently resampled medians' ratio."""
    before, after = draw(2 * seed, count), draw(2 * seed + 1, count, 1.1)

    def ratio(x: Any, y: Any, axis: int = -1) -> Any:
        return np.median(y, axis=axis) / np.median(x, axis=axis)

    found = compare_samples(OF, before, after)
    expected = stats.bootstrap(
        (before, after), ratio, method="percentile", n_resamples=10_000, rng=np.random.default_rng(seed)
    ).confidence_interval
    assert found.ratio["median"] == pytest.approx(np.median(after) / np.median(before))
    assert found.ratio["low"] == pytest.approx(expected.low, abs=4e-3)
    assert found.ratio["high"] == pytest.approx(expected.high, abs=4e-3)


@pytest.mark.parametrize("seed", range(20))
def test_same_program_has_not_moved(seed: int) -> None:
    assert compare_samples(OF, draw(2 * seed), draw(2 * seed + 1)).moved == ""


@pytest.mark.parametrize("seed", range(20))
def test_a_fifth_slower_is_found(seed: int) -> None:
    found = compare_samples(OF, draw(2 * seed), draw(2 * seed + 1, median=1.2))
    assert found.moved == "slower"
    assert stats.mannwhitneyu(draw(2 * seed), draw(2 * seed + 1, median=1.2)).pvalue < 0.05  # says the same
    assert compare_samples(OF, draw(2 * seed + 1, median=1.2), draw(2 * seed)).moved == "faster"


def test_certain_but_small_has_not_moved() -> None:
    """Two runs of one program are never as alike as their own samples."""
    found = compare_samples(OF, draw(0, noise=1e-4), draw(1, median=1 + LEAST_NOISE / 2, noise=1e-4))
    assert found.ratio["low"] > 1
    assert found.moved == ""


def test_large_but_uncertain_has_not_moved() -> None:
    found = compare_samples(OF, draw(0, 6, noise=0.6), draw(3, 6, 1.1, noise=0.6))
    assert found.ratio["low"] < 1 < found.ratio["high"] and found.moved == ""


def test_three_samples_tell_nothing() -> None:
    """Three are all above three others in 1 of 10 cases by chance; four above four in 1 of 35."""
    few = compare_samples(OF, [1.0, 1.01, 1.02], [2.0, 2.01, 2.02])
    assert few.few and few.moved == ""
    assert stats.mannwhitneyu([1.0, 1.01, 1.02], [2.0, 2.01, 2.02]).pvalue == pytest.approx(0.1)
    assert compare_samples(OF, [1.0, 1.01, 1.02, 1.03], [2.0, 2.01, 2.02, 2.03]).moved == "slower"


@pytest.mark.parametrize("seed", range(3))
def test_every_timing_of_a_bench(seed: int) -> None:
    """Nothing moved between two runs; where one contender is a fifth slower, all of its timings and no other's."""
    before = bench(2 * seed, noise=0.05, count=20)
    same = changes(before, bench(2 * seed + 1, noise=0.05, count=20))
    assert len(same) > 100 and [c.of for c in same if c.moved] == []
    slower = changes(before, bench(2 * seed + 1, slower={"openvino": 1.2}, noise=0.05, count=20))
    moved = [c for c in slower if c.moved]
    expected = [c.of for c in slower if c.of[0] == "cnpp-trt, openvino, fp32" and c.of[1] != "cold start"]
    assert sorted(c.of for c in moved) == sorted(expected)
    assert {c.moved for c in moved} == {"slower"}
    sizes = [abs(np.log(c.ratio["median"])) for c in slower]
    assert sizes == sorted(sizes, reverse=True)


def test_values_stand_side_by_side() -> None:
    one, two = (sample.make_result("consistency", sample.make_consistency(seed)) for seed in (0, 0))
    row = next(r for r in side_by_side(one, two) if r[0] == "seg, mIoU, PyTorch, fp32")
    assert row[1] == row[2] and row[3] == "intervals overlap"
    for key in ("value", "low", "high"):
        two.data["conditions"][0]["scores"]["reference"][key] -= 10
    row = next(r for r in side_by_side(one, two) if r[0] == "seg, mIoU, PyTorch, fp32")
    assert row[3] == "intervals apart"
    missed = sample.make_result("parity", sample.make_parity(passed=False))
    values = {r[0]: r[1:3] for r in side_by_side(sample.make_result("parity", sample.make_parity()), missed)}
    assert values["verdict"] == ("met", "1 missed") and values["unet, relative L2"] == ("2.4e-6", "2.4e-6")


@pytest.mark.parametrize("kind", RECORDS)
def test_every_kind_compares_with_itself(kind: str, tmp_path: Path, command: Any) -> None:
    result = next(r for r in sample.make_all() if r.kind == kind)
    for name in ("a", "b"):
        result.write(tmp_path / f"{name}.json")
    outcome = command("report", tmp_path / "a.json", tmp_path / "b.json", "--out", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    said = outcome.out.splitlines()
    assert said[-2:] == [str(tmp_path / "comparison.html"), str(tmp_path / "comparison.md")]
    assert said[:-2] == [] or said[0].startswith("nothing moved beyond noise, of ")
    assert "The same machine, versions and commit." in (tmp_path / "comparison.md").read_text("utf-8")
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_what_moved(tmp_path: Path, command: Any) -> None:
    bench(0, count=9).write(tmp_path / "a.json")
    changed = {**sample.ENVIRONMENT, "cpu": "Another processor", "commit": "0123456789"}
    data = sample.make_bench(1, slower={"openvino": 1.5}, count=9)
    sample.make_result("bench", data, environment=changed).write(tmp_path / "b.json")
    pair = [tmp_path / "a.json", tmp_path / "b.json"]
    said = command("report", *pair, "--out", tmp_path).out.splitlines()
    other, *moved = said[:-2]
    assert other.startswith("These are different machines")
    assert moved and all(line.startswith("slower: 1.") and "openvino, fp32" in line for line in moved)
    found = json.loads(command("report", *pair, "--out", tmp_path, "--json").out)
    assert len(found["moved"]) == len(moved) and found["timings"] > 100
    assert [row["what"] for row in found["environment"]] == ["commit", "cpu"]
    text = (tmp_path / "comparison.md").read_text("utf-8")
    assert "These are different machines" in text and "Another processor" in text


def test_which_pairs_are_compared(tmp_path: Path, command: Any, refused: Callable[..., str]) -> None:
    bench(0).write(tmp_path / "a.json")
    sample.make_result("bench", sample.make_bench(1), "another title").write(tmp_path / "b.json")
    sample.make_result("plans", sample.make_plans()).write(tmp_path / "c.json")
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")

    def written(*arguments: Any) -> str:
        return Path(json.loads(command("report", *arguments, "--out", tmp_path, "--json").out)["html"]).name

    assert written(a, b) == "report.html"
    assert written(a, b, "--compare") == "comparison.html"
    bench(1).write(tmp_path / "d.json")
    assert written(a, tmp_path / "d.json") == "comparison.html"
    assert written(a, tmp_path / "d.json", "--no-compare") == "report.html"
    assert refused("report", a, c, "--compare") == (
        "cannot compare results of two kinds, bench and plans: give two of one kind"
    )
    assert refused("report", a, b, c, "--compare") == "--compare takes two results, not 3"
