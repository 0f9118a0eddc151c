"""Tables of how fast: `bench` and `waterfall`."""

from collections.abc import Iterator

from .. import records
from ..records import Bench, Case, CompetitorResult, OptimizationResult, Sweep, SweepRow, Timed, TimedCase, Waterfall
from . import numbers
from .table import ABSENT, Column, Table, make_table

STAGES = {
    "text_encoder": "text encoder",
    "text_kv": "keys and values of the prompt",
    "time_embeds": "time embeddings",
    "hint": "hint",
    "controlnet": "ControlNet",
    "unet": "UNet",
    "update": "update",
    "vae_decoder": "decoder",
    "extraction": "extraction",
    "host": "host",
}


# A p90 that many times the median is the machine's doing: something else ran on it.
NOISY = 1.3


def base_case(bench: Bench) -> TimedCase:
    """The case that every other one varies."""
    return next(c for c in bench["cases"] if c["case"]["base"])


def case_text(case: Case) -> str:
    """As in `512×512, 20 steps (ddim), guidance 7.5`."""
    return ", ".join(_case_parts(case))


def _case_parts(case: Case) -> list[str]:
    parts = [numbers.size(case["width"], case["height"])]
    if case["images"] > 1:
        parts.append(f"{case['images']} images")
    steps = f"{numbers.plural(case['steps'], 'step')} ({case['scheduler']})"
    return [*parts, steps, f"guidance {case['guidance_scale']:g}"]


def change_text(case: Case, base: Case) -> str:
    """What sets a case apart from the base case."""
    known = _case_parts(base)
    return ", ".join(part for part in _case_parts(case) if part not in known) or case_text(case)


def contender_title(contender: CompetitorResult) -> str:
    """With its precision, where the title does not say it."""
    title, precision = contender["title"], contender["precision"]
    return title if precision in title or not precision else f"{title}, {precision}"


def titles(bench: Bench) -> dict[str, str]:
    """The title of each competitor, by its name."""
    return {c["name"]: contender_title(c) for c in bench["contenders"]}


def ratio_text(timed: Timed | OptimizationResult | SweepRow) -> str:
    """A ratio with its interval, or a dash."""
    if "ratio" not in timed:
        return ABSENT
    r = timed["ratio"]
    return f"{numbers.ratio(r['median'])} ({numbers.factor(r['low'])}–{numbers.factor(r['high'])})"


def noisy(bench: Bench) -> list[str]:
    """Titles of the contenders whose runs of the base case differed so much that no figure of theirs can be trusted."""
    runs = base_case(bench)["runs"]
    whole = {title: runs[name]["whole"] for name, title in titles(bench).items() if name in runs}
    return [title for title, summary in whole.items() if summary["p90"] > NOISY * summary["median"]]


def difference_text(timed: Timed) -> str:
    """Of 255 levels, with the PSNR."""
    if "max_difference" not in timed:
        return ABSENT
    psnr = timed.get("psnr")
    return f"{timed['max_difference']} of 255" + (f", {psnr:.1f} dB" if psnr is not None else "")


def speed(bench: Bench) -> Table:
    """The base case, a row for each contender, also those that could not run."""
    base = base_case(bench)
    columns = (
        Column(case_text(base["case"]), "text"),
        Column("median"),
        Column("p10–p90"),
        Column("p99"),
        Column("runs"),
        Column("images/s"),
        Column("it/s"),
        Column("faster by (range)"),
        Column("image differs by"),
        Column("did not run", "note"),
    )
    return make_table(columns, (_speed_row(c, base) for c in bench["contenders"]), "Each contender")


def _speed_row(contender: CompetitorResult, base: TimedCase) -> tuple[str, ...]:
    timed = base["runs"].get(contender["name"])
    reason = contender["reason"] or ("" if timed else "not measured")
    if timed is None:
        figures: tuple[str, ...] = (ABSENT,) * 8
    else:
        whole, case = timed["whole"], base["case"]
        figures = (
            numbers.duration(whole["median"]),
            numbers.durations(whole["p10"], whole["p90"]),
            numbers.duration(whole["p99"]),
            str(len(whole["samples"])),
            numbers.number(case["images"] / whole["median"]),
            numbers.number(case["steps"] / whole["median"]),
            ratio_text(timed),
            difference_text(timed),
        )
    return (contender_title(contender), *figures, reason)


def cold(bench: Bench) -> Table:
    """Whole processes: from their start to the first image, and what they took at the most."""
    columns = (
        Column("process start to first image", "text"),
        Column("median"),
        Column("range"),
        Column("peak memory"),
        Column("peak GPU memory"),
    )
    rows = []
    for name, title in titles(bench).items():
        if name in bench["cold"]:
            measured = bench["cold"][name]
            seconds, device = measured["seconds"], measured["device_bytes"]
            rows.append(
                (
                    title,
                    numbers.duration(seconds["median"]),
                    numbers.durations(min(seconds["samples"]), max(seconds["samples"])),
                    numbers.memory(measured["host_bytes"]),
                    ABSENT if device is None else numbers.memory(device),
                )
            )
    return make_table(columns, rows, "Cold start and memory")


def stage_order(stage: str) -> int:
    """In the order in which they run; one that this table does not know comes last."""
    return [*STAGES].index(stage) if stage in STAGES else len(STAGES)


def staged(bench: Bench) -> list[tuple[CompetitorResult, Timed]]:
    """The contenders of the base case that tell their stages apart."""
    runs = base_case(bench)["runs"]
    found = [(c, runs[c["name"]]) for c in bench["contenders"] if c["name"] in runs]
    return [(contender, timed) for contender, timed in found if timed["stages"]]


def stages(bench: Bench) -> Table:
    """Seconds of a request by stage, and their share of the whole, a column for each contender."""
    found = staged(bench)
    columns = [Column("all launches of a request", "text"), *(Column(contender_title(c)) for c, _ in found)]
    names = sorted({name for _, timed in found for name in timed["stages"]}, key=stage_order)
    rows = [(STAGES.get(name, name), *(_stage_cell(timed, name) for _, timed in found)) for name in names]
    if rows:
        rows.append(("whole", *(numbers.duration(timed["whole"]["median"]) for _, timed in found)))
    return make_table(columns, rows, "Stages, and their share of the whole", total=bool(rows))


def _stage_cell(timed: Timed, stage: str) -> str:
    if stage not in timed["stages"]:
        return ABSENT
    seconds = timed["stages"][stage]["median"]
    # A request has its control image: extracting it is timed by itself, and is no part of the whole.
    share = "" if stage == "extraction" else f" · {numbers.percent(seconds / timed['whole']['median'])}"
    return numbers.duration(seconds) + share


def scaling(bench: Bench) -> Table:
    """Every case: the contenders' medians, and how many times faster than the baseline."""
    named, base = titles(bench), base_case(bench)["case"]
    measured = [name for name in named if any(name in c["runs"] for c in bench["cases"])]
    columns = [Column("case", "text"), *(Column(named[name]) for name in measured)]
    rows = []
    for case in bench["cases"]:
        cells = [_scaling_cell(case["runs"].get(name)) for name in measured]
        rows.append((change_text(case["case"], base), *cells))
    return make_table(columns, rows, "Every case, and how many times faster than the baseline")


def _scaling_cell(timed: Timed | None) -> str:
    if timed is None:
        return ABSENT
    faster = f" · {numbers.ratio(timed['ratio']['median'])}" if "ratio" in timed else ""
    return numbers.duration(timed["whole"]["median"]) + faster


def roofline_seconds(bench: Bench, stage: str, precision: str) -> float | None:
    """The least that a request's launches of a stage can take here; of `int8-bf16`, if all of it were in int8."""
    measured = bench["roofline"]
    rate = rates(bench).get(precision.partition("-")[0])
    if measured is None or stage not in measured["op_counts"] or not rate:
        return None
    work = measured["op_counts"][stage]
    return records.roofline_seconds(work, rate, measured["bytes_per_second"]) * measured["launches"].get(stage, 1)


def share_of_roofline(bench: Bench, contender: CompetitorResult, stage: str) -> float | None:
    """Floor over measured seconds: 1 is as fast as this machine can be."""
    timed = base_case(bench)["runs"].get(contender["name"])
    least = roofline_seconds(bench, stage, contender["precision"])
    if timed is None or least is None or not timed["stages"].get(stage, {"median": 0})["median"]:
        return None
    return least / timed["stages"][stage]["median"]


def roofline(bench: Bench) -> Table:
    """What a request asks of the machine by stage, the least it can take, and the share of that which is reached."""
    measured = bench["roofline"]
    contenders = [c for c, _ in staged(bench)]
    precisions = [p for p in dict.fromkeys(c["precision"] for c in contenders) if p in rates(bench)]
    columns = [
        Column("stage", "text"),
        Column("launches"),
        Column("GFLOP a launch"),
        Column("MiB a launch"),
        *(Column(f"floor, {p}") for p in precisions),
        *(Column(contender_title(c)) for c in contenders),
    ]
    if measured is None:
        return make_table(columns, ())
    rows = []
    for stage in sorted(measured["op_counts"], key=stage_order):
        work, launches = measured["op_counts"][stage], measured["launches"].get(stage, 1)
        asked = (str(launches), numbers.number(work["flop"] / 1e9), numbers.number(work["bytes"] / 2**20))
        least = (roofline_seconds(bench, stage, p) for p in precisions)
        shares = (share_of_roofline(bench, c, stage) for c in contenders)
        floors = (ABSENT if s is None else numbers.duration(s) for s in least)
        reached = (ABSENT if s is None else numbers.percent(s) for s in shares)
        rows.append((STAGES.get(stage, stage), *asked, *floors, *reached))
    return make_table(columns, rows, "The least a request can take here, and the share of it that is reached")


def rates(bench: Bench) -> dict[str, float]:
    """The matrix rate in floating-point operations a second, by precision."""
    return bench["roofline"]["flop_per_second"] if bench["roofline"] else {}


def steps_of(waterfall: Waterfall) -> Iterator[tuple[OptimizationResult, float | None]]:
    """Each optimization with how many times faster it made the last measured one before it."""
    before: float | None = None
    for optimization in waterfall["optimizations"]:
        if "seconds" not in optimization:
            yield optimization, None
            continue
        now = optimization["seconds"]["median"]
        yield optimization, before / now if before else None
        before = now


def waterfall(result: Waterfall) -> Table:
    """The table of optimizations, in their order."""
    columns = (
        Column(case_text(result["case"]), "text"),
        Column("median"),
        Column("p10–p90"),
        Column("step"),
        Column("faster than the first (range)"),
        Column("latents differ by"),
        Column("not measured", "note"),
    )
    rows = []
    for optimization, step in steps_of(result):
        summary = optimization.get("seconds")
        rows.append(
            (
                optimization["title"],
                numbers.duration(summary["median"]) if summary else ABSENT,
                numbers.durations(summary["p10"], summary["p90"]) if summary else ABSENT,
                numbers.ratio(step) if step else ABSENT,
                ratio_text(optimization) if step else ABSENT,
                numbers.exponent(optimization["difference"]) if "difference" in optimization else ABSENT,
                optimization["reason"],
            )
        )
    return make_table(columns, rows, "Each optimization")


def sweep(result: Sweep) -> Table:
    """The table of builder settings, in their order."""
    columns = (
        Column(case_text(result["case"]), "text"),
        Column("build"),
        Column("median"),
        Column("p10–p90"),
        Column("faster than the default (range)"),
        Column("image differs by"),
        Column("not measured", "note"),
    )
    rows = []
    for row in result["rows"]:
        summary = row.get("seconds")
        rows.append(
            (
                row["title"],
                numbers.duration(row["build_seconds"]) if "build_seconds" in row else ABSENT,
                numbers.duration(summary["median"]) if summary else ABSENT,
                numbers.durations(summary["p10"], summary["p90"]) if summary else ABSENT,
                ratio_text(row) if "ratio" in row else ABSENT,
                f"{row['difference']} of 255" if "difference" in row else ABSENT,
                row["reason"],
            )
        )
    return make_table(columns, rows)
