"""docs/reliability.md, from a result alone."""

from collections import Counter
from typing import Any

from cnpp_trt.benchmarks.report import tables
from cnpp_trt.benchmarks.report.table import code, escape
from cnpp_trt.benchmarks.result import BenchmarkResult

_HEAD = """# Reliability

What was tried to break cnpp-trt, and what came of it. `make reliability` measures it and writes this page; a part is
measured again with the command beside it. Everything runs on the tiny model with random weights: what is read, checked,
written and interrupted is the same as with real ones.

A fuzzed input is a valid file, picture, prompt or command line that was changed (tests/fuzz). It must be accepted or
refused in one printable line; a traceback, a hang or a raw control character is a failure. A damaged bundle must be
refused or draw the very same picture."""


def page_of(result: BenchmarkResult) -> str:
    """Every figure is one of the result's, or a sum of them."""
    data: Any = result.data
    rows = [row for part in data["parts"] for row in part["rows"]]
    wrong: Counter[str] = Counter()
    for row in rows:
        wrong.update(row["wrong"])
    tried = sum(row["tried"] for row in rows)
    summary = ", ".join(f"{count:,} {way}" for way, count in wrong.items())
    minutes = sum(row["seconds"] for row in rows) / 60
    lines = [f"{tried:,} attempts in {minutes:.1f} minutes: {summary or 'nothing measured'}."]
    if missing := [row["what"] for row in rows if row["reason"]]:
        lines.append(f"Not measured: {', '.join(map(escape, missing))}.")
    again = [
        f"- {escape(part['title'])}, measured {escape(part['measured'])}: {code(part['command'])}"
        for part in data["parts"]
    ]
    sections = [
        _HEAD,
        "\n".join(lines),
        tables.make("attempts", result).markdown(),
        "## Again",
        "\n".join(again),
        "## Where",
        tables.make("environment", result).markdown(),
    ]
    return "\n\n".join(sections) + "\n"
