"""Plots as SVG: narrow and with large type, so that they can be read on a phone.

They are drawn in the colors of a light page. On the HTML page `themed` puts CSS variables in their place, which the
page sets for light and dark; a file by itself keeps them.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from ...errors import CnppError
from ...install import REPORT_MODULES, cannot_import
from ..records import Bench, Case, Consistency, Parity
from . import fidelity, numbers, speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# Okabe and Ito's colors, which the color-blind can tell apart; the first is for what the others are compared with.
COLORS = ("#6f7378", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
INK, FAINT, RULE, PAPER = "#202326", "#63686e", "#dcdcd6", "#fdfdfb"
_VARIABLES = {INK: "ink", FAINT: "faint", RULE: "rule", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(COLORS)}
_WIDTH = 4.6  # inches; 331 of SVG's units, so that type of 10.5 is 10.5 pixels high on a phone
_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": FAINT,
    "axes.labelsize": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "font.size": 10.5,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "xtick.labelsize": 10,
    "ytick.color": FAINT,
    "ytick.labelsize": 10,
}


@dataclass
class _Plot:
    """An axes to draw on, and its SVG once the `with` block has ended."""

    axes: "Axes"
    figure: "Drawing"
    svg: str = ""


@contextmanager
def plotting(name: str, x: str, y: str, height: float = 3.4) -> Iterator[_Plot]:
    """A plot that becomes an SVG.

    Args:
        name: makes the ids inside the SVG unique on a page that holds several.
        x: title of the axis.
        y: title of the axis.
        height: in inches.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Drawing
    except ImportError as e:
        raise CnppError(cannot_import("a report", e, *REPORT_MODULES)) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's own matplotlibrc says
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": name})
        figure = Drawing(figsize=(_WIDTH, height), layout="constrained")
        plot = _Plot(figure.add_subplot(), figure)
        plot.axes.set_axisbelow(True)
        plot.axes.set_xlabel(x)
        plot.axes.set_ylabel(y)
        yield plot
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plot.svg = _tidied(buffer.getvalue(), name)


def _tidied(svg: str, name: str) -> str:
    """With ids that no other figure has, and the reader's own sans-serif type."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, 'DejaVu Sans', sans-serif", svg)


def themed(svg: str) -> str:
    """For the HTML page, whose variables `--ink`, `--c0` and so on are the colors."""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg role="img"', 1)
    return re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", svg)


def legend(plot: _Plot, columns: int = 1, **options: Any) -> None:
    """Puts the legend below a plot."""
    plot.figure.legend(loc="outside lower left", ncols=columns, handlelength=1.4, columnspacing=1.2, **options)


def _short(text: str, limit: int = 46) -> str:
    """What fits into a figure."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _ticks(axis: Any, text: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    """A power of ten, as in 10⁻⁶."""
    digits = str(round(log10(value))) if value > 0 else "0"
    return "10" + digits.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# ---- speed

_AXES = {"size": "image size, pixels", "images": "images per prompt", "steps": "steps"}


def scaling_values(bench: Bench, axis: str) -> list[tuple[float, str, Any]]:
    """(position, label, case) of the cases that differ from the base case in nothing but this."""
    base = speed.base_case(bench)["case"]

    def rest(case: Case) -> list[Any]:
        varied = {"size": ("width", "height")}.get(axis, (axis,))
        return [value for key, value in case.items() if key not in (*varied, "base")]

    found = {}
    for timed in bench["cases"]:
        case = timed["case"]
        if rest(case) == rest(base):
            pixels = case["width"] * case["height"]
            side = (
                str(case["width"]) if case["width"] == case["height"] else numbers.size(case["width"], case["height"])
            )
            position, label = (pixels, side) if axis == "size" else (case[axis], str(case[axis]))  # type: ignore[literal-required]
            found[position] = (float(position), label, timed)
    return [found[position] for position in sorted(found)]


def scaling(name: str, bench: Bench, axis: str, colors: dict[str, int]) -> str | None:
    """Seconds against image size, images or steps; None where there is but one value."""
    values = scaling_values(bench, axis)
    if len(values) < 2:
        return None
    slowest = max(t["whole"]["median"] for _, _, case in values for t in case["runs"].values())
    scale, unit = numbers.time_unit(slowest)
    with plotting(name, _AXES[axis], f"a request, {unit}", 3.6) as plot:
        for contender in bench["contenders"]:
            who = contender["name"]
            points = [(x, case["runs"][who]["whole"]) for x, _, case in values if who in case["runs"]]
            if len(points) < 2:
                continue
            middle = [p["median"] * scale for _, p in points]
            reach = [
                [(p["median"] - p["p10"]) * scale for _, p in points],
                [(p["p90"] - p["median"]) * scale for _, p in points],
            ]
            plot.axes.errorbar(
                [x for x, _ in points], middle, reach, color=COLORS[colors[who]], marker=MARKERS[colors[who]],
                elinewidth=1, label=_short(speed.contender_title(contender)),
            )  # fmt: skip
        plot.axes.set_xticks([x for x, _, _ in values], [label for _, label, _ in values])
        plot.axes.set_xlim(left=0)
        # One bad run must not flatten all others.
        plot.axes.set_ylim(0, min(1.05 * plot.axes.dataLim.ymax, 1.4 * slowest * scale))
        legend(plot)
    return plot.svg


def roofline(name: str, bench: Bench, colors: dict[str, int]) -> str | None:
    """Operations a second of each stage against its operations a byte, under what the machine can do.

    Williams, Waterman and Patterson, Roofline, CACM 2009. None where the floor was not measured.
    """
    measured = bench["roofline"]
    contenders = speed.staged(bench)
    if measured is None or not contenders:
        return None
    shown = sorted(measured["op_counts"], key=speed.stage_order)
    shown = [s for s in shown if measured["op_counts"][s]["flop"] > 0 and measured["op_counts"][s]["bytes"] > 0]
    if not shown:
        return None
    at = {s: measured["op_counts"][s]["flop"] / measured["op_counts"][s]["bytes"] for s in shown}
    from matplotlib.lines import Line2D

    with plotting(name, "operations a byte", "operations a second", 4.9) as plot:
        axes = plot.axes
        axes.set_xscale("log")
        axes.set_yscale("log")
        left, right = min(at.values()) / 3, max(at.values()) * 3
        bandwidth = measured["bytes_per_second"]
        for precision, rate in measured["flop_per_second"].items():
            if precision not in {c["precision"] for c, _ in contenders} or rate <= 0:
                continue
            ridge = rate / bandwidth
            axes.plot([left, ridge, max(right, ridge * 3)], [left * bandwidth, rate, rate], color=FAINT, linewidth=1.2)
            axes.annotate(
                precision, (max(right, ridge * 3), rate), (0, 3), textcoords="offset points", ha="right", color=FAINT
            )
        for contender, timed in contenders:
            for i, stage in enumerate(shown):
                seconds = timed["stages"].get(stage, {"median": 0.0})["median"]
                if seconds > 0:
                    reached = measured["op_counts"][stage]["flop"] * measured["launches"].get(stage, 1) / seconds
                    axes.plot(at[stage], reached, MARKERS[i % len(MARKERS)], color=COLORS[colors[contender["name"]]])
        _whole_decades(axes)
        _ticks(axes.xaxis, lambda v: f"{v:g}")
        _ticks(axes.yaxis, _rate)
        marks = [
            Line2D([], [], color=COLORS[colors[c["name"]]], linewidth=4, label=_short(speed.contender_title(c)))
            for c, _ in contenders
        ]
        kinds = [
            Line2D([], [], color=INK, marker=MARKERS[i % len(MARKERS)], linestyle="", label=speed.STAGES.get(s, s))
            for i, s in enumerate(shown)
        ]
        legend(plot, handles=marks)
        plot.figure.legend(handles=kinds, loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1)
    return plot.svg


def _rate(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


# ---- fidelity


def drift(name: str, parity: Parity) -> str | None:
    """How far the latents are from the reference's after each step; None where they never are."""
    if not any(v > 0 for s in parity["steps"] for v in (*s["free"], *s["forced"])):
        return None
    from matplotlib.lines import Line2D

    with plotting(name, "step", "relative L2 of the latents", 3.9) as plot:
        for i, s in enumerate(parity["steps"]):
            color = COLORS[1 + i % (len(COLORS) - 1)]
            for values, style in ((s["free"], "-"), (s["forced"], ":")):
                shown = [v if v > 0 else float("nan") for v in values]
                marker = "o" if len(values) < 3 else ""
                plot.axes.plot(range(1, len(values) + 1), shown, style, color=color, marker=marker)
        plot.axes.set_yscale("log")
        _whole_decades(plot.axes)
        _whole_steps(plot.axes)
        _ticks(plot.axes.yaxis, _power)
        handles = [
            Line2D([], [], color=COLORS[1 + i % (len(COLORS) - 1)], label=_short(s["condition"]))
            for i, s in enumerate(parity["steps"])
        ]
        handles.append(Line2D([], [], color=INK, linestyle="-", label="by itself"))
        handles.append(Line2D([], [], color=INK, linestyle=":", label="each step from PyTorch's"))
        legend(plot, 3, handles=handles)
    return plot.svg


def _whole_decades(axes: "Axes") -> None:
    """A logarithmic y axis from one power of ten to another: less than a decade would have no labels."""
    low, high = axes.dataLim.intervaly
    axes.set_ylim(10 ** floor(log10(low) - 0.01), 10 ** ceil(log10(high) + 0.01))


def _whole_steps(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def differences(name: str, result: Consistency, minus: str) -> str | None:
    """Paired differences to one side with their intervals, as shares of that side's score; right is better."""
    rows = [
        (c, d, c["scores"][minus]["value"])
        for c in result["conditions"]
        for d in c["differences"]
        if d["minus"] == minus and minus in c["scores"] and c["scores"][minus]["value"]
    ]
    if not rows:
        return None
    labels, middle, reach = [], [], []
    for c, d, score in rows:
        better = (100 if c["higher_is_better"] else -100) / abs(score)
        low, high = sorted((better * d["low"], better * d["high"]))
        labels.append(_short(f"{c['condition']} · {c['metric']}", 20))
        middle.append(better * d["value"])
        reach.append((max(0.0, middle[-1] - low), max(0.0, high - middle[-1])))
    with plotting(name, "difference, % of the score; right is better", "", 1.2 + 0.36 * len(rows)) as plot:
        positions = range(len(rows), 0, -1)
        plot.axes.axvline(0, color=INK, linewidth=1)
        for position, (c, d, _), value, span in zip(positions, rows, middle, reach, strict=True):
            color = COLORS[{"no difference": 0, "better": 3, "worse": 2}[fidelity.verdict(d, c)]]
            plot.axes.errorbar(value, position, xerr=[[span[0]], [span[1]]], color=color, marker="o", capsize=3)
        plot.axes.set_yticks(list(positions), labels)
        plot.axes.set_ylim(0.4, len(rows) + 0.6)
        plot.axes.grid(axis="y", visible=False)
        plot.axes.tick_params(axis="y", length=0, labelcolor=INK)
        plot.axes.spines["left"].set_visible(False)
        widest = max(max(abs(v - a), abs(v + b)) for v, (a, b) in zip(middle, reach, strict=True)) or 1e-3
        plot.axes.set_xlim(
            min(-0.15 * widest, *_edges(middle, reach, -1)), max(0.15 * widest, *_edges(middle, reach, 1))
        )
        _ticks(plot.axes.xaxis, lambda v: f"{v:.3g}".replace("-", "−"))
    return plot.svg


def _edges(middle: Sequence[float], reach: Sequence[tuple[float, float]], side: int) -> list[float]:
    """The ends of the intervals on one side, with some room beyond."""
    return [1.12 * (v + b if side > 0 else v - a) for v, (a, b) in zip(middle, reach, strict=True)] + [0.0]
