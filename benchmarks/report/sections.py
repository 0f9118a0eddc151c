"""A report from results: the answers at a glance, a section for each result, what was not measured, and where."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..records import Bench, Consistency, Parity, Sweep, Waterfall
from ..statistics import Summary
from . import building, fidelity, figures, numbers, speed, tables, tuning
from .document import Answer, Bar, Bars, Block, Document, Figure, Picture, Pictures, Section, Text
from .load import Loaded
from .table import Column, Table, make_table

# Levels of 255 up to which two pictures are called the same: rounding, which no eye sees.
SAME = 2
TITLES = {
    "bench": "Speed",
    "waterfall": "Waterfall",
    "sweep": "Builder settings",
    "parity": "Parity",
    "consistency": "Consistency",
    "plans": "Plans",
    "end_to_end": "A whole model",
    "first_contact": "First contact",
    "reliability": "Reliability",
    "tuning": "Tuning",
}
_LEADS = {
    "bench": "A whole request, from prompt and control image to pixels, warm; the contenders in turn.",
    "waterfall": "The same request with each optimization switched on in turn, denoising and decoding.",
    "sweep": "TensorRT's plans with one builder setting changed at a time, in turn with those of the default ones.",
    "parity": "The deployed side against diffusers' own pipeline: graph by graph, step by step, and as pictures.",
    "consistency": "How well the condition found again in the image matches the one given, as the ControlNet++ paper "
    "measures it; 95 % bootstrap intervals over prompts.",
    "plans": "Every plan built anew.",
    "end_to_end": "Every command that a model takes, from its repositories to plans and pictures.",
    "first_contact": "What a GPU does with this package, stage by stage, each in a process of its own.",
    "tuning": "The fastest setting whose pictures still follow their condition, and what else was tried.",
    "reliability": "What was tried to break it, and what came of that.",
}
_LEAD = (
    "cnpp-trt runs ControlNet++ as ONNX graphs and TensorRT plans, without PyTorch. This page shows what was measured "
    "of it: how fast it is, whether its pictures are PyTorch's, and whether they still follow their condition."
)


def make_document(loaded: Sequence[Loaded]) -> Document:
    """The report of results, at least one."""
    loaded = sorted(loaded, key=_rank)
    colors = contender_colors(loaded)
    anchors = anchors_of(loaded)
    sections = [_section(one, anchor, colors) for one, anchor in zip(loaded, anchors, strict=True)]
    missing = not_measured(loaded)
    if missing.rows:
        sections.append(Section("What was not measured, and why", "not-measured", "", (missing,)))
    sections.append(_environment(loaded))
    return Document("cnpp-trt, measured", _LEAD, tuple(_answers(loaded)), tuple(sections))


def _rank(one: Loaded) -> tuple[int, bool]:
    """Those of a kind together, and what is exact before what is not."""
    return [*TITLES].index(one.result.kind), one.result.data.get("precision", "fp32") != "fp32"


def contender_colors(loaded: Sequence[Loaded]) -> dict[str, int]:
    """The same contender has one color on the whole page; baselines have the first."""
    benches = [one.result.data for one in loaded if one.result.kind == "bench"]
    colors = {bench["contenders"][0]["name"]: 0 for bench in benches}
    ran = [c["name"] for bench in benches for c in bench["contenders"] if c["available"] and c["name"] not in colors]
    others = len(figures.COLORS) - 1
    colors |= {name: 1 + i % others for i, name in enumerate(dict.fromkeys(ran))}
    return {c["name"]: 0 for bench in benches for c in bench["contenders"]} | colors


def anchors_of(loaded: Sequence[Loaded]) -> list[str]:
    """One for each, of letters, digits and dashes: they name files too."""
    found: list[str] = []
    for one in loaded:
        plain = re.sub(r"[^a-z0-9]+", "-", f"{one.result.kind} {one.result.title}".lower()).strip("-")[:60]
        found.append(plain if plain not in found else f"{plain}-{len(found)}")
    return found


def _section(one: Loaded, anchor: str, colors: dict[str, int]) -> Section:
    kind, data = one.result.kind, one.result.data
    make = _SECTIONS.get(kind)
    plain = [tables.make(name, one.result) for name in tables.TABLES[kind]]
    made: Iterable[Block] = plain if make is None else make(data, anchor, colors)
    blocks = tuple(b for b in made if not isinstance(b, Table) or b.rows)
    return Section(f"{TITLES[kind]}: {one.result.title}", anchor, _LEADS[kind], blocks, one.result.command)


# ---- at a glance


def _answers(loaded: Sequence[Loaded]) -> Iterator[Answer]:
    for one in loaded:
        data: Any = one.result.data
        if one.result.kind == "bench":
            yield _how_fast(data)
        elif one.result.kind == "parity":
            yield _same_picture(data)
        elif one.result.kind == "consistency":
            answer = _still_follows(data)
            if answer:
                yield answer


def _how_fast(bench: Bench) -> Answer:
    question, base = "How fast?", speed.base_case(bench)
    runs = [(c, base["runs"][c["name"]]) for c in bench["contenders"] if c["name"] in base["runs"]]
    faster = sorted(
        ((c, timed, timed["ratio"]) for c, timed in runs if "ratio" in timed), key=lambda r: -r[2]["median"]
    )
    case = speed.case_text(base["case"])
    if not faster:
        only = numbers.duration(runs[0][1]["whole"]["median"]) if runs else "not measured"
        return Answer(question, only, f"{bench['contenders'][0]['title']}; nothing to compare it with. {case}")
    # Faster, but another picture, is no answer to somebody who wants this one.
    exact = next((r for r in faster if r[1].get("max_difference", 0) <= SAME), faster[0])
    contender, timed, ratio = exact
    baseline = speed.contender_title(bench["contenders"][0])
    line = (
        f"{speed.contender_title(contender)} takes {numbers.duration(timed['whole']['median'])} where {baseline} takes "
    )
    line += f"{numbers.duration(runs[0][1]['whole']['median'])}: {speed.ratio_text(timed)}. {case}."
    if faster[0] is not exact:
        title = speed.contender_title(faster[0][0])
        line += f" Faster, with another picture: {title}, {numbers.ratio(faster[0][2]['median'])}."
    return Answer(question, numbers.ratio(ratio["median"]), line + tables.noise_text(bench))


def _same_picture(parity: Parity) -> Answer:
    """`yes` is for pictures that are the same, `close` for others that meet their thresholds."""
    question = "Is it the same picture?"
    line = f"{parity['backend']}, {parity['precision']}, against {parity['reference']}: "
    line += f"{fidelity.images_text(parity['images'])}."
    if not parity["passed"]:
        return Answer(question, "no", f"{line} Missed: {'; '.join(parity['missed'])}.", False)
    if not parity["images"]:
        return Answer(question, "not measured", "No images were compared.")
    if fidelity.largest_difference(parity["images"]) <= SAME:
        return Answer(question, "yes", line, True)
    half = f" PyTorch's own fp16: {fidelity.images_text(parity['half'])}." if parity["half"] else ""
    return Answer(question, "close", f"{line} Within its thresholds.{half}")


def _still_follows(result: Consistency) -> Answer | None:
    """The figure is of the first comparison, which is with the reference; a sentence for each."""
    counts, lines, everything = [], [], result["conditions"]
    for minus in fidelity.compared(result):
        verdicts = [
            (c["condition"], fidelity.verdict(d, c))
            for c in result["conditions"]
            for d in c["differences"]
            if d["minus"] == minus
        ]
        kept = [name for name, found in verdicts if found != "worse"]
        said = []
        for v in ("no difference", "better", "worse"):
            if names := [name for name, found in verdicts if found == v]:
                said.append(
                    f"{v} for {'all conditions' if len(names) == len(everything) > 1 else fidelity.listed(names)}"
                )
        counts.append((len(kept), len(verdicts)))
        lines.append(f"Against {result['systems'].get(minus, minus)}: {'; '.join(said)}.")
    if not counts:
        return None
    kept_count, count = counts[0]
    figure = "yes" if kept_count == count else f"{kept_count} of {count}"
    line = " ".join([f"{next(iter(result['systems'].values()))}, {result['data']}.", *lines])
    return Answer("Does it still follow the condition?", figure, line, kept_count == count)


# ---- sections


def _bench(bench: Bench, anchor: str, colors: dict[str, int]) -> Iterator[Block]:
    yield _speed_bars(bench, colors)
    yield speed.speed(bench)
    yield speed.cold(bench)
    yield speed.stages(bench)
    captions = {
        "size": "Time against image size. The axis counts pixels: a straight line through 0 is in proportion to them.",
        "images": "Time against images per prompt.",
        "steps": "Time against steps: the slope is a step, what remains at 0 is paid once.",
    }
    titles = {"size": "Image size", "images": "Batch", "steps": "Steps"}
    for axis, caption in captions.items():
        svg = figures.scaling(f"{anchor}-{axis}", bench, axis, colors)
        if svg:
            yield Figure(f"{anchor}-{axis}", titles[axis], f"{caption} Whiskers: p10 to p90.", svg)
    svg = figures.roofline(f"{anchor}-roofline", bench, colors)
    if svg:
        caption = (
            "Each mark is a stage, as fast as a contender computes it; the line is the most that this machine did when "
            "measured: its bandwidth on the slope, its matrix rate on the roof. Stages under the roof compute, stages "
            "under the slope wait for memory; the nearer to the line, the less there is to gain."
        )
        yield Figure(f"{anchor}-roofline", "Roofline", caption, svg)
    if len(bench["cases"]) > 1:
        yield speed.scaling(bench)
    yield speed.roofline(bench)


def _speed_bars(bench: Bench, colors: dict[str, int]) -> Bars:
    base = speed.base_case(bench)
    longest = _longest([t["whole"] for t in base["runs"].values()])
    bars = []
    for contender in bench["contenders"]:
        timed = base["runs"].get(contender["name"])
        title, color = speed.contender_title(contender), colors[contender["name"]]
        if timed is None:
            bars.append(Bar(title, "did not run", None, 0, 0, color, contender["reason"]))
            continue
        whole = timed["whole"]
        shares = _shares(whole, longest)
        note = f"{numbers.ratio(timed['ratio']['median'])} as fast" if "ratio" in timed else "baseline"
        bars.append(Bar(title, numbers.duration(whole["median"]), *shares, color, note))
    caption = f"{speed.case_text(base['case'])}. Median; the thin line spans p10 to p90. Shorter is faster."
    return Bars("Time of a request", caption + tables.noise_text(bench), tuple(bars))


def _longest(summaries: Sequence[Summary]) -> float:
    """What fills the track: room for p90, but not so much that one bad run shrinks all bars."""
    most = max((s["median"] for s in summaries), default=1.0)
    return min(max((s["p90"] for s in summaries), default=1.0), 1.3 * most)


def _shares(summary: Summary, longest: float) -> tuple[float, float, float]:
    """Median, p10 and p90."""
    median, low, high = (min(summary[key] / longest, 1.0) for key in ("median", "p10", "p90"))
    return median, low, high


def _waterfall(result: Waterfall, anchor: str, colors: dict[str, int]) -> Iterator[Block]:
    longest = _longest([t["seconds"] for t in result["optimizations"] if "seconds" in t])
    bars = []
    for optimization, step in speed.steps_of(result):
        if "seconds" not in optimization:
            bars.append(Bar(optimization["title"], "not measured", None, 0, 0, 1, optimization["reason"]))
            continue
        s = optimization["seconds"]
        note = f"step {numbers.ratio(step)}" if step else "start"
        shares = _shares(s, longest)
        bars.append(Bar(optimization["title"], numbers.duration(s["median"]), *shares, 1 if step else 0, note))
    caption = "Each bar has every optimization above it. Median; the thin line spans p10 to p90. Shorter is faster."
    yield Bars("One optimization after the other", caption, tuple(bars))
    yield speed.waterfall(result)


def _sweep(result: Sweep, anchor: str, colors: dict[str, int]) -> Iterator[Block]:
    yield speed.sweep(result)


def _parity(parity: Parity, anchor: str, colors: dict[str, int]) -> Iterator[Block]:
    verdict = "Every threshold is met." if parity["passed"] else f"Missed: {'; '.join(parity['missed'])}."
    yield Text(f"{parity['backend']}, {parity['precision']}, against {parity['reference']}. {verdict}")
    yield fidelity.parity(parity)
    yield fidelity.images(parity)
    svg = figures.drift(f"{anchor}-drift", parity)
    if svg:
        caption = (
            "Solid: the deployed loop by itself, its errors and what becomes of them. Dotted: each step started from "
            "PyTorch's own latents, its error alone. Exact steps are not drawn."
        )
        yield Figure(f"{anchor}-drift", "Drift", caption, svg)
    elif parity["steps"]:
        yield Text("The latents are PyTorch's, to the bit, after every step.")
    yield fidelity.steps(parity)
    yield fidelity.graphs(parity)
    pictures = [
        Picture(f"{anchor}-{i}-{side}", png, f"{h['condition']}, seed {h['seed']}: {title}")
        for i, h in enumerate(parity["heatmaps"])
        for side, png, title in (
            ("reference", h["reference"], "PyTorch"),
            ("deployed", h["deployed"], "deployed"),
            ("difference", h["difference"], f"difference, white = {h['scale']} of 255"),
        )
    ]
    if pictures:
        yield Pictures("Difference heatmaps", "The largest of the three channels' differences.", tuple(pictures), True)


def _consistency(result: Consistency, anchor: str, colors: dict[str, int]) -> Iterator[Block]:
    yield Text(f"{result['data']}; {numbers.plural(result['images_per_prompt'], 'image')} a prompt.")
    yield fidelity.consistency(result)
    yield fidelity.differences(result)
    for i, minus in enumerate(fidelity.compared(result)):
        svg = figures.differences(f"{anchor}-against-{i}", result, minus)
        if svg:
            sides = next(iter(result["systems"].values())), result["systems"].get(minus, minus)
            caption = "Paired: the same prompts, seeds and conditions. An interval that holds 0 shows no difference."
            yield Figure(f"{anchor}-against-{i}", f"{sides[0]} minus {sides[1]}", caption, svg)
    yield fidelity.quality(result)
    pictures = tuple(Picture(f"{anchor}-{i}", s["png"], s["condition"]) for i, s in enumerate(result["sheets"]))
    if pictures:
        yield Pictures(
            "Sheets", "From top to bottom: the condition given, the images, the condition found in them.", pictures
        )


# Those that are more than their one table.
_SECTIONS: dict[str, Callable[[Any, str, dict[str, int]], Iterable[Block]]] = {
    "bench": _bench,
    "waterfall": _waterfall,
    "sweep": _sweep,
    "parity": _parity,
    "consistency": _consistency,
    "tuning": lambda data, anchor, _: tuning.blocks(data, anchor),
}

# ---- the end


def not_measured(loaded: Sequence[Loaded]) -> Table:
    """Every reason that any result gives."""
    rows = []
    for one in loaded:
        data: Any = one.result.data
        where = f"{TITLES[one.result.kind]}: {one.result.title}"
        for what, reason in _reasons(one.result.kind, data):
            if reason:
                rows.append((what, reason, where))
    return make_table((Column("what", "text"), Column("why", "note"), Column("of", "text")), rows)


def _reasons(kind: str, data: Any) -> Iterator[tuple[str, str]]:
    if kind == "bench":
        yield from ((speed.contender_title(c), c["reason"]) for c in data["contenders"])
        yield "roofline", data["roofline_reason"]
    elif kind == "waterfall":
        yield from ((t["title"], t["reason"]) for t in data["optimizations"])
    elif kind == "sweep":
        yield from ((row["title"], row["reason"]) for row in data["rows"])
    elif kind == "parity":
        yield from data["unavailable"].items()
    elif kind == "first_contact":
        yield from ((s["name"], s["words"]) for s in data["stages"] if s["verdict"] not in ("ok", "degraded"))
    elif kind == "reliability":
        yield from ((row["what"], row["reason"]) for part in data["parts"] for row in part["rows"])


def _environment(loaded: Sequence[Loaded]) -> Section:
    """What was measured when and by which command; then each machine or set of versions once."""
    distinct: list[dict[str, Any]] = []
    rows = []
    for one in loaded:
        known = {k: v for k, v in one.result.environment.items() if k != "commit"}
        if known not in distinct:
            distinct.append(known)
        commit = str(one.result.environment.get("commit") or "")
        title = f"{TITLES[one.result.kind]}: {one.result.title}"
        rows.append((title, one.result.created, commit, str(distinct.index(known) + 1), one.result.command))
    columns = (
        Column("result", "text"),
        Column("measured", "text"),
        Column("commit", "code"),
        Column("environment"),
        Column("again", "code"),
    )
    blocks = [make_table(columns, rows)]
    for i, known in enumerate(distinct, 1):
        blocks.append(building.environment_table(known, f"environment {i}" if len(distinct) > 1 else "environment"))
    return Section("Where", "environment", "What the figures depend on.", tuple(blocks))
