"""The types that a user's project sees of the installed package, by the checkers that such projects run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).with_name("user_project.py")
# A line that is wrong each, below the first two: the checkers do read the package's types.
MISUSE = """from cnpp_trt import Control, Pipeline, Request
pipeline = Pipeline.open("bundle")
pipeline("a house", lambda step: None)
pipeline.batch(Request("a house"))
Control("seg")
pipeline("a house").pill()
"""
WRONG = [3, 4, 5, 6]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder outside the checkout, with a right module and a wrong one."""
    shutil.copy(PROJECT, tmp_path)
    (tmp_path / "misuse.py").write_text(MISUSE)
    return tmp_path


def output_of(project: Path, *line: str) -> str:
    return subprocess.run([sys.executable, "-m", *line], cwd=project, capture_output=True, text=True).stdout


def test_mypy_strict(project: Path) -> None:
    pytest.importorskip("mypy")
    text = output_of(project, "mypy", "--strict", "--no-error-summary", "--cache-dir", "cache", "--no-pretty", ".")
    errors = [line.split(":")[:2] for line in text.splitlines() if " error: " in line]
    assert errors == [["misuse.py", str(number)] for number in WRONG], text


def test_basedpyright_strict(project: Path) -> None:
    pytest.importorskip("basedpyright")
    (project / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    text = output_of(project, "basedpyright", "--pythonpath", sys.executable, "--outputjson")
    errors = [
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1)
        for found in json.loads(text)["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    assert sorted(set(errors)) == [("misuse.py", number) for number in WRONG], text
