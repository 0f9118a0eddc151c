"""The fuzzers notice what they are there for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.errors import CnppError
from hypothesis import find, given, settings
from hypothesis import strategies as st

from fuzz import mutations, worker
from fuzz.commands import Wrong, _judge
from fuzz.run import fuzz


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("no bundle at x: export one", ""),
        ("", "an empty message"),
        ("a\nb", "a message of several lines"),
        ("a\x1b[31m", "raw control characters in a message"),
        ("a\u202eb", "raw control characters in a message"),
        ("x" * 1_001, "a message of over 1000 characters"),
    ],
)
def test_lines(message: str, wrong: str) -> None:
    assert worker._wrong_line(message) == wrong


@pytest.mark.parametrize(
    ("status", "out", "err"),
    [
        (1, "", "Traceback (most recent call last):\n  File\nValueError: x\n"),
        (0, "\x1b[31mred", ""),
        (2, "", "error: \u202e\n"),
        (2, "", ""),
        (1, "", "error: a\nerror: b\n"),
        (2, "", "error: " + "x" * 1_000),
        (139, "", ""),
        (-11, "", ""),
    ],
)
def test_commands_that_end_wrongly(status: int, out: str, err: str) -> None:
    with pytest.raises(Wrong):
        _judge(["run"], status, out, err)


def test_commands_that_end_rightly() -> None:
    _judge(["run"], 0, "image-0.png\n", "note: x\n")
    with pytest.raises(CnppError, match="error: no such option"):
        _judge(["run"], 2, "", "error: no such option\n")


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [b"NaN", b"[[[[[[[[", b"\\u001b", b"../..", b"null", b"1" + b"0" * 400])
def test_changed_documents_reach_everything(wanted: bytes) -> None:
    """Every sort of value comes at any depth; what is valid is still JSON."""
    document = {"a": [{"b": 1}, {"c": "text"}], "d": {"e": {"f": True}}}
    found = find(
        mutations.documents(document), lambda content: wanted in content, settings=settings(max_examples=20_000)
    )
    assert wanted in found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.data())
def test_damaged_bytes_are_bounded(content: bytes, data: Any) -> None:
    assert len(data.draw(mutations.damaged(content))) <= 64 * len(content) + 2_000


def test_a_process_that_breaks_is_a_failure(tmp_path: Path) -> None:
    """Here, as there is no bundle to begin with."""
    outcome = fuzz("manifest", 0, 3, tmp_path / "none", tmp_path / "none")
    assert [f.what for f in outcome.failures] == ["process ended with 1"]
    assert "No such file or directory" in outcome.failures[0].message
    assert outcome.inputs == 0 and "process ended with 1" in outcome.text()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    first, again, other = (fuzz("thresholds", seed, 60, tmp_path, tmp_path) for seed in (3, 3, 4))
    assert (first.inputs, first.refused, first.accepted) == (again.inputs, again.refused, again.accepted)
    assert (first.failures, other.failures) == ((), ())
    assert json.dumps([first.inputs, other.inputs]) == "[60, 60]"


def test_what_does_not_end_is_a_hang(tmp_path: Path) -> None:
    """The worker itself, with a kind that computes for ever on one of its inputs."""
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, str(tests / "programs" / "endless_fuzz.py"), "loop", "0", "2", *[str(tmp_path)] * 3]
    subprocess.run(line, check=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    found = json.loads((tmp_path / "outcome.json").read_text())
    assert (found["inputs"], found["accepted"]) == (2, 1)
    assert [(f["what"], f["example"]) for f in found["failures"]] == [("hang", "True")]
