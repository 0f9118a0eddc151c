"""`make test-fast` leaves out what was slow when it last ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import time

import pytest


@pytest.fixture(scope="module")
def shared():
    time.sleep(0.5)


def test_quick(shared):
    pass


def test_slow():
    time.sleep(0.5)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_what_was_slow_is_left_out_the_next_time(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "test_two.py").write_text(TESTS, "utf-8")
    line = [sys.executable, "-m", "pytest", "-p", "fast_round", "--rootdir", str(tmp_path), "-rA", *workers]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""}

    def passed(*options: str) -> set[str]:
        ended = subprocess.run([*line, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return {text.partition("::")[2] for text in ended.stdout.splitlines() if text.startswith("PASSED")}

    assert passed("--fast") == {"test_quick", "test_slow"}
    assert passed("--fast") == {"test_quick"}
    assert passed() == {"test_quick", "test_slow"}
