"""Tables of what export and plans cost, and of where a result was measured."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..check_records import Attempts, FirstContact, Reliability
from ..records import EndToEnd, PlanRow, Plans
from ..result import BenchmarkResult
from . import numbers
from .table import ABSENT, Column, Table, make_table


def plans(result: Plans) -> Table:
    """A row for each plan; those of several conditions that are alike in one."""
    columns = (
        Column(f"plan, {result['flavor']}, {numbers.size(result['width'], result['height'])}", "code"),
        Column("seconds"),
        Column("MiB"),
        Column("kernels"),
        Column("attention fused"),
        Column("norms fused"),
    )
    ordered = sorted(result["plans"], key=lambda p: p["bytes"])
    groups = [list(alike) for _, alike in groupby(ordered, key=_alike)]
    count, total = len(result["plans"]), sum(p["bytes"] for p in result["plans"])
    whole = (f"all {count}", f"{result['seconds']:.0f}", f"{total / 2**20:.0f}", "", "", "")
    return make_table(columns, [*map(_plan_cells, groups), whole], total=True)


def _alike(plan: PlanRow) -> tuple[Any, ...]:
    """Graphs of one family, as in `hint_seg` and `hint_depth`, whose plans differ in nothing but their weights."""
    family = plan["graph"].rpartition("_")[0] if plan["graph"].startswith(("hint_", "controlnet_")) else plan["graph"]
    shape = (round(plan["bytes"] / 2**20), plan["kernels"], plan["attentions_fused"], plan["norms_fused"])
    return family, shape


def _plan_cells(alike: list[PlanRow]) -> tuple[str, ...]:
    first = alike[0]
    low, high = (f"{f(p['seconds'] for p in alike):.1f}" for f in (min, max))
    name = first["graph"] if len(alike) == 1 else f"{first['graph'].rpartition('_')[0]}_…, each of {len(alike)}"
    fused = [(first["attentions_fused"], first["attentions"]), (first["norms_fused"], first["norms"])]
    return (
        name,
        low if low == high else f"{low}–{high}",
        f"{first['bytes'] / 2**20:.0f}",
        str(first["kernels"]),
        *(f"{done}/{all_}" if all_ else ABSENT for done, all_ in fused),
    )


def stages(result: EndToEnd) -> Table:
    """The commands of a run, one after the other."""
    columns = (Column("command", "text"), Column("seconds"), Column("peak memory"))
    rows = [(s["stage"], f"{s['seconds']:.0f}", numbers.memory(s["peak_bytes"])) for s in result["stages"]]
    return make_table(columns, rows)


def pictures(result: EndToEnd) -> Table:
    """Whole processes, from their start to the picture and its score."""
    what = f"{numbers.size(result['width'], result['height'])}, {result['steps']} steps"
    columns = (
        Column(what, "text"),
        Column("seconds"),
        Column("peak memory"),
        Column("diffusers, seconds"),
        Column("diffusers, peak memory"),
        Column("largest difference"),
        Column("values that differ"),
    )
    rows = [
        (
            p["condition"],
            f"{p['seconds']:.0f}",
            numbers.memory(p["peak_bytes"]),
            f"{p['reference_seconds']:.0f}",
            numbers.memory(p["reference_peak_bytes"]),
            f"{p['max_difference']} of 255",
            f"{p['differing']:.2%}",
        )
        for p in result["pictures"]
    ]
    return make_table(columns, rows)


def first_contact(result: FirstContact) -> Table:
    """Every stage with its verdict and numbers."""
    columns = (
        Column("stage", "text"),
        Column("what is found out", "text"),
        Column("verdict", "text"),
        Column("seconds"),
        Column("numbers", "note"),
        Column("words", "note"),
    )
    rows = [
        (
            stage["name"],
            stage["title"],
            stage["verdict"],
            f"{stage['seconds']:.1f}",
            ", ".join(f"{name} {value}" for name, value in stage["numbers"].items()) or ABSENT,
            stage["words"] or ABSENT,
        )
        for stage in result["stages"]
    ]
    return make_table(columns, rows)


def attempts(result: Reliability) -> Table:
    """Every part, a row for each kind of attempt."""
    columns = (
        Column("tried to break", "text"),
        Column("by", "text"),
        Column("attempts"),
        Column("ended", "note"),
        Column("wrong", "note"),
        Column("seconds"),
    )
    rows = [_attempts_row(part["title"], row) for part in result["parts"] for row in part["rows"]]
    return make_table(columns, rows)


def _attempts_row(title: str, row: Attempts) -> tuple[str, ...]:
    if row["reason"]:
        return (title, row["what"], "0", f"not measured: {row['reason']}", ABSENT, ABSENT)
    return (
        title,
        row["what"],
        f"{row['tried']:,}",
        ", ".join(f"{count:,} {name}" for name, count in row["outcomes"].items() if count),
        ", ".join(f"{count:,} {name}" for name, count in row["wrong"].items()),
        f"{row['seconds']:.0f}",
    )


def environment(result: BenchmarkResult) -> Table:
    """Where, when and with what a result was measured, and the command that measures it again."""
    return environment_table({**result.environment, "measured": result.created, "again": result.command})


def environment_table(known: Mapping[str, Any], header: str = "environment") -> Table:
    """The environment of a result, a row each."""
    return make_table((Column(header, "text"), Column("", "note")), environment_rows(known).items())


def environment_rows(known: Mapping[str, Any]) -> dict[str, str]:
    """What is known, by name; nested groups, as of package versions, one after the other."""
    rows: dict[str, str] = {}
    for key, value in known.items():
        if isinstance(value, Mapping):
            prefix = "" if key == "versions" else f"{key}: "
            rows |= {f"{prefix}{inner}": str(text) for inner, text in value.items() if text}
        elif key == "memory_bytes" and isinstance(value, int):
            rows["memory"] = numbers.memory(value)
        elif value is not None:
            rows[key.replace("_", " ")] = str(value)
    return rows
