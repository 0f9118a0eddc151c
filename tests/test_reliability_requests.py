"""Mixed requests on one pipeline: a few here, hundreds in the reliability program."""

import json
import sys
from typing import Any

import pytest
from cnpp_trt import Pipeline
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from reliability_requests import mixed_requests


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_where_it_is(tiny: Any) -> None:
    """The same requests a second time find every cache full: nothing is left to grow."""
    pipeline = Pipeline.open(tiny.bundle, "onnxruntime-cpu", threads=1)
    first = mixed_requests(pipeline, 20, seed=1)
    second = mixed_requests(pipeline, 20, seed=1)
    assert first.outcomes == second.outcomes
    assert set(first.outcomes) == {"drawn", "refused", "interrupted"} and sum(first.outcomes.values()) == 20
    assert max(second.resident) - first.resident[-1] < 16 << 20


def test_marks_in_the_miniatures_readme() -> None:
    """The table shows what the examples carry."""
    readme = (MINIATURE.parent / "README.md").read_text("utf-8")
    examples = json.loads((MINIATURE / "examples" / "examples.json").read_text())["examples"]
    for condition, example in examples.items():
        [row] = [line for line in readme.splitlines() if line.startswith(f"| {condition} |") and line.count("|") == 5]
        assert [float(cell) for cell in row.split("|")[3:5]] == list(example["typical_score"].values())
