"""`bench`, `consistency` and `report`: what their options take, and what they find out before they measure."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "text", "most"),
    [("--steps", "1001", 1000), ("--steps", "20,x", 1000), ("--num-images", "1-17", 16), ("-n", "4-1", 16)],
)
def test_bench_names_the_option_that_it_cannot_read(tiny: Any, refused: Any, option: str, text: str, most: int) -> None:
    said = refused("bench", "--bundle", tiny.bundle, option, text)
    assert said.startswith(f"cannot read {'--num-images' if option == '-n' else option} '{text}': ")
    assert said.endswith(f"up to {most}")


@pytest.mark.slow
def test_bench_measures_every_condition(tiny: Any, command: Any, here: Path) -> None:
    outcome = command(
        "bench", "--bundle", tiny.bundle, "--cond", "all", "--contender", "onnxruntime-cpu", "--steps", 1, "-n", 1,
        "--rounds", 1, "--seconds", 1, "--no-waterfall", "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert sorted(data["condition"] for data in found.values()) == ["depth", "seg"]
    assert sorted(Path(path).parent.name for path in found) == ["cnpp-trt-results"] * 2
    assert all((here / path).is_file() for path in found)


@pytest.mark.parametrize("cond", ["sge", "all,seg"])
def test_bench_knows_its_conditions_first(tiny: Any, refused: Any, cond: str) -> None:
    assert refused("bench", "--bundle", tiny.bundle, "--cond", cond).startswith(f"unknown condition '{cond}'")


def test_consistency_looks_at_its_place_first(tiny: Any, refused: Any, here: Path) -> None:
    (here / "records").touch()
    said = refused("consistency", "--bundle", tiny.bundle, "--cond", "seg", "--out", here / "records")
    assert f"cannot write to {here / 'records'}" in said
    (here / "cnpp-trt-results").touch()
    assert "cannot write to cnpp-trt-results" in refused("consistency", "--bundle", tiny.bundle, "--cond", "seg")
