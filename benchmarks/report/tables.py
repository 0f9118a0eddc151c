"""Every table by its name, for the pages and the README."""

from collections.abc import Callable
from typing import Any, cast

from ...errors import UserError
from ..records import Bench
from ..result import BenchmarkResult
from . import building, fidelity, speed, tuning
from .table import Table

# By kind of result. Each takes the result's data.
TABLES: dict[str, dict[str, Callable[[Any], Table]]] = {
    "bench": {
        "speed": speed.speed,
        "stages": speed.stages,
        "scaling": speed.scaling,
        "roofline": speed.roofline,
        "cold": speed.cold,
    },
    "waterfall": {"waterfall": speed.waterfall},
    "sweep": {"sweep": speed.sweep},
    "parity": {
        "parity": fidelity.parity,
        "graphs": fidelity.graphs,
        "steps": fidelity.steps,
        "images": fidelity.images,
    },
    "consistency": {
        "consistency": fidelity.consistency,
        "differences": fidelity.differences,
        "quality": fidelity.quality,
    },
    "plans": {"plans": building.plans},
    "end_to_end": {"stages": building.stages, "pictures": building.pictures},
    "first_contact": {"first-contact": building.first_contact},
    "reliability": {"attempts": building.attempts},
    "tuning": {
        "confirmed": tuning.confirmed,
        "against": tuning.against,
        "front": tuning.front,
        "ablation": tuning.ablation,
    },
}


def make(name: str, result: BenchmarkResult) -> Table:
    """A table of a result by its name.

    Raises:
        UserError: results of this kind have no such table.
    """
    if name == "environment":
        return building.environment(result)
    if name not in TABLES[result.kind]:
        names = ", ".join([*TABLES[result.kind], "environment"])
        raise UserError(f"no table {name!r} of the {result.kind} result; there are {names}")
    return TABLES[result.kind][name](result.data)


def markdown_of(result: BenchmarkResult) -> str:
    """Every table that has something to say, for a terminal, and the report's warning where times vary widely."""
    made = [make(name, result) for name in TABLES[result.kind]]
    texts = [table.markdown() for table in made if table.rows]
    if result.kind == "bench" and (warning := noise_text(cast(Bench, result.data))):
        texts.append(warning.strip())
    return "\n\n".join(texts)


def noise_text(bench: Bench) -> str:
    """A sentence that the times are not to be trusted, with a space before it, or nothing."""
    titles = speed.noisy(bench)
    return f" Not to be trusted: the runs of {fidelity.listed(titles)} vary widely; measure again." if titles else ""
