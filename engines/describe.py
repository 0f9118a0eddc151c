"""Plans as text and JSON, for people and for `--json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..messages import printable
from .build import Engines
from .plan import Plan


def engines_table(engines: Engines) -> str:
    """One line for each plan of a build, and what all took."""
    rows = [
        (
            plan.key.graph,
            f"{plan.size / 2**20:.1f} MiB",
            f"{plan.seconds:.1f} s" if plan.key.graph in engines.built else "cached",
            str(plan.fusion),
        )
        for plan in engines.plans
    ]
    total = sum(plan.size for plan in engines.plans)
    weights = sum(plan.weights for plan in engines.plans) / 2**20
    activations = max(plan.activations for plan in engines.plans) / 2**20
    last = (
        f"{len(engines.plans)} plans, {total / 2**20:.0f} MiB, {len(engines.built)} built in {engines.seconds:.1f} s; "
        f"{_kind(engines.plans[0])}\n"
        f"on the device: weights {weights:.0f} MiB if all are loaded, activations {activations:.0f} MiB, shared by all"
    )
    return "\n".join([*_columns(rows), last])


def engines_json(engines: Engines) -> dict[str, Any]:
    """What a build made, JSON-able."""
    return {
        "plans": [plan_json(plan) for plan in engines.plans],
        "built": list(engines.built),
        "seconds": round(engines.seconds, 3),
    }


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan's record and its folder, JSON-able."""
    return {**asdict(plan), "folder": str(plan.folder)}


def plans_table(plans: Sequence[Plan]) -> str:
    """Plans as a table of text."""
    rows = [
        (plan.folder.name, printable(plan.model), _kind(plan), f"{plan.size / 2**20:.1f} MiB", str(plan.fusion))
        for plan in plans
    ]
    return "\n".join(_columns(rows))


def plan_details(plan: Plan) -> str:
    """Everything known of one plan; its engine file is read whole to compare its digest."""
    error = plan.integrity_error()
    lines = [
        printable(plan.folder),
        f"graph      {plan.key.graph} of {printable(plan.model)} (source {plan.key.source[:16]})",
        f"for        {_kind(plan)}, {printable(plan.key.system)}",
        f"settings   {printable(', '.join(f'{k}={v}' for k, v in plan.key.settings.items()))}",
        f"built      in {plan.seconds:.1f} s, peak memory {plan.peak / 2**30:.1f} GiB",
        f"engine     {plan.size / 2**20:.1f} MiB, sha256 {plan.sha256[:16]}: {error or 'whole'}",
        f"device     {plan.weights / 2**20:.1f} MiB weights, {plan.activations / 2**20:.1f} MiB activations",
        f"fusion     {plan.fusion}",
    ]
    lines += [f"  unfused  {printable(node)}" for node in plan.fusion.unfused]
    for i, profile in enumerate(plan.key.profiles):
        for name, r in profile.items():
            sizes = {str(tuple(r[bound])) for bound in ("min", "opt", "max")}
            shape = sizes.pop() if len(sizes) == 1 else f"{tuple(r['min'])} … {tuple(r['opt'])} … {tuple(r['max'])}"
            lines.append(f"profile {i}  {printable(name)} {shape}")
    return "\n".join(lines)


def _kind(plan: Plan) -> str:
    return printable(f"{plan.key.flavor} {plan.key.version}, {plan.key.target}")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
