"""Tables and the figure of a search for a faster setting."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..records import Interval
from ..tuning_records import Tried, Tuning
from . import figures
from .document import Block, Figure, Text
from .table import ABSENT, Column, Table, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def confirmed(result: Tuning) -> Table:
    """What was confirmed or refused on fresh prompts."""
    columns = (
        Column(f"{result['condition']}, against {result['exact']}", "text"),
        Column("faster, measured"),
        Column("by the cost model"),
        Column(f"points of {result['metric']} lost"),
        Column("fresh prompts"),
        Column("PSNR, dB"),
        Column(f"within {result['budget']:g}", "text"),
    )
    rows = [
        (
            a["setting"],
            f"{a['measured']['median']:.2f}x ({a['measured']['low']:.2f} to {a['measured']['high']:.2f})",
            f"{a['speedup']:.2f}x",
            interval(a["loss"]),
            str(a["prompts"]),
            _psnr(a),
            "yes" if a["loss"]["high"] <= result["budget"] else "no",
        )
        for a in result["attempts"]
    ]
    return make_table(columns, rows)


def against(result: Tuning) -> Table:
    """The preset beside other systems with the exact setting, in turn."""
    setting = result["attempts"][-1]["setting"]
    columns = (
        Column(f"{result['condition']}: {setting}, times faster than", "text"),
        Column("median"),
        Column("range"),
    )
    rows = [
        (title, f"{ratio['median']:.2f}x", f"{ratio['low']:.2f} to {ratio['high']:.2f}")
        for title, ratio in result["against"].items()
    ]
    return make_table(columns, rows)


def front(result: Tuning) -> Table:
    """What nothing that was tried beats in both speed and loss, on the prompts of the search."""
    return _settings(result, f"{result['condition']}: tried, and beaten in both by none", "prompts", best(result))


def ablation(result: Tuning) -> Table:
    """Levers one by one, on prompts of their own."""
    what = f"{result['condition']}, against {result['exact']}"
    return _settings(result, what, "fresh prompts", result["ablation"])


def _settings(result: Tuning, what: str, prompts: str, settings: Iterable[Tried]) -> Table:
    columns = (
        Column(what, "text"),
        Column("faster, by the cost model"),
        Column(f"points of {result['metric']} lost"),
        Column(prompts),
        Column("PSNR, dB"),
    )
    rows = [(t["setting"], f"{t['speedup']:.2f}x", interval(t["loss"]), str(t["prompts"]), _psnr(t)) for t in settings]
    return make_table(columns, rows)


def best(result: Tuning) -> list[Tried]:
    """The Pareto front of the trials, the fastest last. What had fewer prompts than others is left out."""
    most = max((t["prompts"] for t in result["trials"]), default=0)
    found: list[Tried] = []
    for tried in sorted(result["trials"], key=lambda t: (-t["speedup"], t["loss"]["value"])):
        if tried["prompts"] * 4 >= most and all(tried["loss"]["value"] < t["loss"]["value"] for t in found):
            found.append(tried)
    return found[::-1]


def interval(loss: Interval) -> str:
    """A loss with its interval, as in `0.31 (-0.10 to 0.72)`."""
    return f"{loss['value']:.2f} ({loss['low']:.2f} to {loss['high']:.2f})"


def blocks(result: Tuning, anchor: str) -> Iterable[Block]:
    """The section of a report."""
    yield Text(
        f"Within the budget of {result['budget']:g} points is a setting of which the upper end of the 95 % "
        "interval of the paired loss is, on prompts that nothing was chosen on. A loss below 0 is a gain."
    )
    yield figure(result, anchor)
    yield confirmed(result)
    yield against(result)
    yield front(result)
    yield ablation(result)


def figure(result: Tuning, anchor: str) -> Figure:
    """Speed against loss: every setting that was tried, the front, and what was confirmed."""
    trials = [t for t in result["trials"] if t["loss"]["value"] < _ceiling(result)]
    with figures.plotting(anchor, "times faster than the exact setting", f"points of {result['metric']} lost") as drawn:
        axes = drawn.axes
        axes.scatter(*_places(trials), s=14, color=figures.COLORS[0], alpha=0.55, label="tried")
        axes.plot(*_places(best(result)), color=figures.COLORS[1], marker="o", label="beaten in both by none")
        _bars(axes, result)
        axes.axhline(result["budget"], color=figures.COLORS[2], linestyle="--", label=f"budget, {result['budget']:g}")
        axes.set_ylim(top=_ceiling(result))
        figures.legend(drawn, columns=2)
    caption = (
        "Grey: on the prompts of the search. With bars: on fresh prompts, 95 %. Losses beyond the plot are left out."
    )
    return Figure(f"{anchor}-front", f"Speed and loss, {result['condition']}", caption, drawn.svg)


def _ceiling(result: Tuning) -> float:
    return max(3 * result["budget"], 1.2 * max(a["loss"]["high"] for a in result["attempts"]), 0.5)


def _bars(axes: "Axes", result: Tuning) -> None:
    attempts = result["attempts"]
    losses = [a["loss"] for a in attempts]
    values = [loss["value"] for loss in losses]
    ends = [[loss["value"] - loss["low"] for loss in losses], [loss["high"] - loss["value"] for loss in losses]]
    speedups = [a["speedup"] for a in attempts]
    axes.errorbar(speedups, values, yerr=ends, fmt="D", color=figures.COLORS[3], capsize=3, label="on fresh prompts")


def _places(tried: Sequence[Tried]) -> tuple[list[float], list[float]]:
    return [t["speedup"] for t in tried], [t["loss"]["value"] for t in tried]


def _psnr(tried: Tried) -> str:
    return ABSENT if tried["psnr"] is None else f"{tried['psnr']:.1f}"
