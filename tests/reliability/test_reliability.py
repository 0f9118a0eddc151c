"""The program itself: what it counts, what it keeps, what it writes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.benchmarks.result import BenchmarkResult, read_result
from fuzz.kinds import KINDS
from fuzz.run import Failure, Outcome

from reliability.page import page_of
from reliability.parts import COUNTS, PARTS, _fuzz_row

TESTS = Path(__file__).parent.parent


def program(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    files = ["--result", str(tmp_path / "result.json"), "--page", str(tmp_path / "page.md")]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "reliability", *files, *options],
        capture_output=True, text=True, timeout=500, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.slow
def test_a_part_is_measured_kept_and_written(tmp_path: Path, tiny: Any) -> None:
    """With a hundredth of the commands. A second call measures nothing; a part that is asked for is measured again."""
    ended = program(tmp_path, "--only", "command", "--share", "0.01")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = read_result(tmp_path / "result.json")
    [part] = result.data["parts"]
    [row] = part["rows"]
    assert (part["name"], row["tried"]) == ("command", 3)
    assert sum(row["outcomes"].values()) == 3 and set(row["wrong"].values()) == {0}
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| The real command | the installed command, a process each | 3 |" in page
    assert 'make reliability FLAGS="--only command --share 0.01"' in page
    versions = result.environment["versions"]
    assert isinstance(versions, Mapping)
    assert str(versions["onnxruntime"]) in page


def test_every_kind_of_input_counts() -> None:
    assert set(COUNTS) | {"command", "bit"} == set(KINDS)
    assert sum(COUNTS.values()) >= 10_000
    assert set(PARTS) == {"fuzz", "command", "bits", "kills", "signals", "requests"}


@pytest.mark.parametrize(
    ("what", "message", "way"),
    [
        ("KeyError at runtime/loop.py:287", "", "tracebacks"),
        ("hang", "", "hangs"),
        ("raw control characters in a message", "", "raw control characters"),
        ("raw control characters on a stream", "", "raw control characters"),
        ("process ended with -11", "", "other"),
        ("written outside", "", "other"),
        ("Wrong at commands.py:9", "a traceback: ValueError", "tracebacks"),
        ("Wrong at commands.py:9", "a hang: no end after 60 s", "hangs"),
        ("Wrong at commands.py:9", "raw control characters {'x'}", "raw control characters"),
        ("Wrong at commands.py:9", "an error of 5000 characters at x", "other"),
    ],
)
def test_failures_are_counted_by_sort(what: str, message: str, way: str) -> None:
    row = _fuzz_row("manifest", Outcome("manifest", 10, 6, 3, (Failure(what, message, ""),), 1.0))
    assert row["wrong"] == {"tracebacks": 0, "hangs": 0, "raw control characters": 0} | {way: 1}
    assert row["outcomes"] == {"refused in one line": 6, "accepted": 3}


def test_the_page_shows_what_went_wrong_and_what_was_not_measured() -> None:
    row = {"what": "a|b", "tried": 10, "outcomes": {"refused": 9}, "wrong": {"hangs": 1}, "seconds": 60.0, "reason": ""}
    left_out = {"what": "kills", "tried": 0, "outcomes": {}, "wrong": {}, "seconds": 0.0, "reason": "no module"}
    part = {"name": "x", "title": "X", "command": "make x", "measured": "today", "rows": [row, left_out]}
    page = page_of(BenchmarkResult("reliability", "t", "c", {"parts": [part]}, {"cpu": "a processor"}, "today"))
    assert "10 attempts in 1.0 minutes: 1 hangs." in page
    assert "Not measured: kills." in page
    assert "| X | a\\|b | 10 | 9 refused | 1 hangs | 60 |" in page
    assert "| X | kills | 0 | not measured: no module | – | – |" in page
    assert "| cpu | a processor |" in page
