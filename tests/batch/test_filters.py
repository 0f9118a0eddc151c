"""The filter's small language."""

import pytest
from cnpp_trt.batch.drawing import further_seed
from cnpp_trt.batch.filters import Filter
from cnpp_trt.errors import UserError


def test_comparisons() -> None:
    for text, score, expected in (
        ("score.seg >= 80", 80.0, True), ("score.seg >= 80", 79.9, False), ("score.seg>80", 80.0, False),
        ("score.seg <= -1.5", -2.0, True), ("score.seg < 80", 80.0, False),
    ):  # fmt: skip
        assert Filter.parse(text).passes({"seg": score}) is expected, (text, score)


def test_all_must_hold_of_what_there_is() -> None:
    both = Filter.parse(" score.seg >= 80  and score.depth <= 30 ")
    assert both.passes({"seg": 90, "depth": 20})
    assert not both.passes({"seg": 90, "depth": 40})
    assert both.passes({"seg": 90}) and both.passes({}) and not both.passes({"depth": 31})
    assert Filter().passes({"seg": 0})


def test_the_better_of_two() -> None:
    both = Filter.parse("score.seg >= 80 and score.depth <= 30")
    ordered = [{"seg": 50, "depth": 50}, {"seg": 60, "depth": 40}, {"seg": 90, "depth": 40}, {"seg": 81, "depth": 31}]
    assert sorted(ordered, key=both.rank) == ordered


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read --filter"),
        ("score.seg", "cannot read --filter"),
        ("score.seg == 80", "cannot read --filter"),
        ("seg >= 80", "cannot read --filter"),
        ("score.seg >= 80 or score.depth <= 3", "cannot read --filter"),
        ("score.sge >= 80", "did you mean 'seg'"),
        (" and ".join(["score.seg >= 1"] * 17), "more than 16"),
        ("__import__('os')", "cannot read --filter"),
    ],
)
def test_what_is_no_filter(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Filter.parse(text)


def test_further_seeds_are_the_same_everywhere() -> None:
    """Recorded: another function would draw other images for jobs that were begun."""
    assert [further_seed(7, n) for n in (2, 3)] == [2234373400, 1335425380]  # printf "cnpp-trt 7 2" | sha256sum
    assert len({further_seed(s, n) for s in range(50) for n in range(2, 12)}) == 500
