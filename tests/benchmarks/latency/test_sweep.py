"""Builder settings as a measured choice."""

from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.benchmarks.latency.sweep import CHOICES, folder_of, require_gpu
from cnpp_trt.engines.plan import BuilderSettings
from cnpp_trt.errors import CnppError
from cnpp_trt.gpu import find_gpu


def test_choices_are_the_default_ones_changed_in_one_setting() -> None:
    for choice in CHOICES:
        given = [name for name in vars(choice) if getattr(choice, name) is not None]
        assert len(given) == 1
    folders = [folder_of(choice) for choice in (BuilderSettings(), *CHOICES)]
    assert len(set(folders)) == len(folders)


@pytest.mark.skipif(find_gpu().gpu is not None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_why_not(command: Any) -> None:
    with pytest.raises(CnppError) as raised:
        require_gpu()
    assert "\n" not in str(raised.value)
    outcome = command("bench", "--sweep", "--cond", "seg")
    assert outcome.status == 1 and outcome.out == ""
    assert outcome.err.strip() == f"error: {raised.value}"


@pytest.mark.slow
def test_every_choice_is_measured_or_has_its_reason(simulated_gpu: Any, tiny: Any, tmp_path: Path) -> None:
    simulated_gpu.program(
        "sweep_simulated", "every_choice_is_measured_or_has_its_reason", tiny.bundle, tmp_path / "sweep", timeout=300
    )
