"""Two results of one kind: what moved beyond noise."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..records import Interval
from ..result import BenchmarkResult
from ..statistics import CONFIDENCE, RESAMPLES, Ratio, percentile_interval
from . import building, fidelity, numbers, speed
from .document import Block, Document, Section, Text
from .load import Loaded
from .table import ABSENT, Column, Table, make_table

# Two processes of one program differ by some percent (memory, clocks), however alike the runs within each are.
LEAST_NOISE = 0.05
_MACHINE = ("cpu", "cpus", "memory", "system", "gpu: name")


@dataclass(frozen=True)
class Change:
    """Seconds of one thing in both results.

    Attributes:
        of: contender or optimization, case, and stage.
        before, after: medians.
        ratio: `after` over `before`, with its 95 % interval by bootstrap over the samples.
        noise: the change that these samples' own spread could make.
        few: whether there are too few samples to tell any two apart.
    """

    of: tuple[str, str, str]
    before: float
    after: float
    ratio: Ratio
    noise: float
    few: bool

    @property
    def moved(self) -> str:
        """`slower` or `faster` where the interval excludes 1 and the change exceeds the noise; else empty."""
        factor = max(self.ratio["median"], 1 / self.ratio["median"])
        if self.few or factor <= 1 + self.noise or self.ratio["low"] <= 1 <= self.ratio["high"]:
            return ""
        return "slower" if self.ratio["median"] > 1 else "faster"


def compare_samples(of: tuple[str, str, str], before: Sequence[float], after: Sequence[float]) -> Change:
    """How far a timing moved between two results.

    Args:
        of: what was timed.
        before: seconds above 0, at least one.
        after: the same of the later result.
    """
    middle = [float(np.median(samples)) for samples in (before, after)]
    low, high = percentile_interval(resampled_medians(after, 1) / resampled_medians(before, 0))
    # A rank test's limit: so few samples are told apart by chance alone too often, however far apart they lie.
    few = 2 / comb(len(before) + len(after), len(before)) > 1 - CONFIDENCE
    noise = max(LEAST_NOISE, _spread(before), _spread(after))
    ratio = Ratio(median=middle[1] / middle[0], low=low, high=high)
    return Change(of, middle[0], middle[1], ratio, noise, few)


def resampled_medians(samples: Sequence[float], seed: int) -> NDArray[np.float64]:
    """The median of each bootstrap resample, float64 [RESAMPLES]; Efron, 1979. Two seeds make two independent sides."""
    drawn = np.random.default_rng(seed).choice(np.asarray(samples, np.float64), (RESAMPLES, len(samples)))
    medians: NDArray[np.float64] = np.median(drawn, axis=1)
    return medians


def _spread(samples: Sequence[float]) -> float:
    """Half of what lies between p10 and p90, as a share of the median."""
    p10, median, p90 = np.percentile(samples, [10, 50, 90])
    return float((p90 - p10) / 2 / median)


def require_alike(before: Loaded, after: Loaded) -> None:
    """Checks that two results can be compared.

    Raises:
        UserError: they are not of one kind.
    """
    if before.result.kind != after.result.kind:
        kinds = f"{before.result.kind} and {after.result.kind}"
        raise UserError(f"cannot compare results of two kinds, {kinds}: give two of one kind")


def changes(before: BenchmarkResult, after: BenchmarkResult) -> list[Change]:
    """Every timing that both results hold, the largest change first."""
    first, second = timings(before), timings(after)
    found = [compare_samples(of, first[of], second[of]) for of in first if of in second]
    return sorted(found, key=lambda c: -abs(np.log(c.ratio["median"])))


def timings(result: BenchmarkResult) -> dict[tuple[str, str, str], list[float]]:
    """Samples in seconds by contender or optimization, case, and stage; empty for kinds that have none."""
    data: Any = result.data
    found: dict[tuple[str, str, str], list[float]] = {}
    if result.kind == "bench":
        named: dict[str, str] = speed.titles(data)
        for case in data["cases"]:
            for name, timed in case["runs"].items():
                summaries: dict[str, Any] = {"whole": timed["whole"], **timed["stages"]}
                for stage, summary in summaries.items():
                    if summary["samples"] and min(summary["samples"]) > 0:
                        key = (named[name], speed.case_text(case["case"]), speed.STAGES.get(stage, stage))
                        found[key] = summary["samples"]
        cold: dict[str, Any] = data["cold"]
        for name, measured in cold.items():
            found[named.get(name, name), "cold start", "whole"] = measured["seconds"]["samples"]
    elif result.kind == "waterfall":
        for optimization in data["optimizations"]:
            if "seconds" in optimization:
                found[optimization["title"], speed.case_text(data["case"]), "whole"] = optimization["seconds"][
                    "samples"
                ]
    elif result.kind == "sweep":
        for row in data["rows"]:
            if "seconds" in row:
                found[row["title"], speed.case_text(data["case"]), "whole"] = row["seconds"]["samples"]
    return found


def environment_differences(before: BenchmarkResult, after: BenchmarkResult) -> list[tuple[str, str, str]]:
    """(what, before, after), of machine, versions and commit."""
    first, second = (building.environment_rows(r.environment) for r in (before, after))
    names = dict.fromkeys([*first, *second])
    return [(n, first.get(n, ABSENT), second.get(n, ABSENT)) for n in names if first.get(n) != second.get(n)]


def different_machines(differences: Sequence[tuple[str, str, str]]) -> bool:
    """Whether any difference of the environments is one of the machine."""
    return any(name in _MACHINE for name, _, _ in differences)


def make_comparison(before: Loaded, after: Loaded, found: Sequence[Change]) -> Document:
    """The document of a comparison.

    Args:
        before: the earlier result.
        after: the later result.
        found: their `changes`.
    """
    one, two = before.result, after.result
    differ = environment_differences(one, two)
    names = (f"A: {before.name}", f"B: {after.name}")
    sections = [Section("Where they were measured", "environment", "", tuple(_environments(differ, names)))]
    if found:
        sections.append(Section("What moved", "moved", _RULE, tuple(_moved(found))))
        sections.append(Section("Every timing", "timings", "", (_changes_table(found),)))
    if values := list(side_by_side(one, two)):
        table = make_table((Column("value", "text"), Column("A"), Column("B"), Column("that is", "text")), values)
        sections.append(Section("Side by side", "values", "", (table,)))
    if lost := _only_one(one, two):
        table = make_table((Column("contender", "text"), Column("case", "text"), Column("only in", "text")), lost)
        sections.append(Section("In one of them alone", "alone", "", (table,)))
    lead = f"{one.kind}: A is {one.title}, of {one.created}; B is {two.title}, of {two.created}."
    return Document(f"{before.name} → {after.name}", lead, (), tuple(sections))


OTHER_MACHINE = "These are different machines: a change may be theirs and not the program's."
_RULE = (
    "B over A: above 1 is slower. Something moved where the 95 % bootstrap interval of the ratio of medians excludes 1 "
    f"and the change is larger than both {100 * LEAST_NOISE:g} % and half of what lies between p10 and p90 of either."
)


def _environments(differ: Sequence[tuple[str, str, str]], names: tuple[str, str]) -> Iterator[Block]:
    if not differ:
        yield Text("The same machine, versions and commit.")
        return
    if different_machines(differ):
        yield Text(OTHER_MACHINE)
    yield make_table((Column("differs", "text"), Column(names[0], "note"), Column(names[1], "note")), differ)


def _moved(found: Sequence[Change]) -> Iterator[Block]:
    moved = [c for c in found if c.moved]
    if few := sum(c.few for c in found):
        yield Text(f"{numbers.plural(few, 'timing has', 'timings have')} too few samples to tell a change.")
    if moved:
        yield _changes_table(moved)
    else:
        yield Text(f"Nothing beyond noise, of {numbers.plural(len(found), 'timing')}.")


def _changes_table(found: Sequence[Change]) -> Table:
    columns = (
        Column("of", "text"),
        Column("case", "text"),
        Column("stage", "text"),
        Column("A"),
        Column("B"),
        Column("B over A (95 %)"),
        Column("noise"),
        Column("that is", "text"),
    )
    return make_table(
        columns,
        (
            (
                *c.of,
                numbers.duration(c.before),
                numbers.duration(c.after),
                f"{numbers.ratio(c.ratio['median'])} ({c.ratio['low']:.2f}–{c.ratio['high']:.2f})",
                f"±{numbers.percent(c.noise)}",
                "too few samples" if c.few else c.moved or "within noise",
            )
            for c in found
        ),
    )


def _only_one(before: BenchmarkResult, after: BenchmarkResult) -> list[tuple[str, str, str]]:
    first, second = ({of[:2] for of in timings(r)} for r in (before, after))
    return [(*of, "A") for of in sorted(first - second)] + [(*of, "B") for of in sorted(second - first)]


def side_by_side(before: BenchmarkResult, after: BenchmarkResult) -> Iterator[tuple[str, str, str, str]]:
    """(what, before, after, verdict) of the values that are not timings, where both results have them."""
    one, two = ({"parity": _parity_values, "consistency": _scores}.get(r.kind, _costs)(r.data) for r in (before, after))
    for what, (text, interval) in one.items():
        if what in two:
            other_text, other = two[what]
            said = ""
            if interval is not None and other is not None:
                apart = interval["low"] > other["high"] or other["low"] > interval["high"]
                said = "intervals apart" if apart else "intervals overlap"
            yield what, text, other_text, said


_Values = dict[str, tuple[str, Interval | None]]


def _parity_values(data: Mapping[str, Any]) -> _Values:
    found: _Values = {"verdict": ("met" if data["passed"] else f"{len(data['missed'])} missed", None)}
    for g in data["graphs"]:
        found[f"{g['graph']}, relative L2"] = numbers.exponent(g["relative_l2"]), None
    for s in data["steps"]:
        if s["free"]:
            found[f"{s['condition']}, latents at the end, relative L2"] = numbers.exponent(s["free"][-1]), None
    for row in fidelity.images(data).rows:  # type: ignore[arg-type]
        found[f"{row[0]}, largest difference"] = row[2], None
    return found


def _scores(data: Mapping[str, Any]) -> _Values:
    found: _Values = {}
    for c in data["conditions"]:
        for side, interval in c["scores"].items():
            title = f"{c['condition']}, {c['metric']}, {data['systems'].get(side, side)}"
            found[title] = fidelity.interval_text(interval, c["metric"]), interval
        for d in c["differences"]:
            title = f"{c['condition']}, {c['metric']}, {d['of']} minus {d['minus']}"
            found[title] = fidelity.difference_text(d, c["metric"]), d
    return found


def _costs(data: Mapping[str, Any]) -> _Values:
    """Of plans: single measurements, whose noise nobody knows."""
    found: _Values = {f"{p['graph']}, seconds": (numbers.number(p["seconds"]), None) for p in data.get("plans", [])}
    if "peak_bytes" in data:
        found["the whole command"] = numbers.duration(data["seconds"]), None
        found["peak memory"] = numbers.memory(data["peak_bytes"]), None
    return found
