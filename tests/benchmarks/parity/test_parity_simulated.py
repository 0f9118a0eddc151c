"""Graphs and steps of plans on a simulated GPU: recorded inputs reach the device's buffers, and what it wrote is read.

Real cuda-python, a simulated driver, ONNX Runtime in TensorRT's place: what is compared must be the CPU's to the byte.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="a PyTorch for CUDA would look for the simulated GPU"
)


@pytest.fixture
def simulate(simulated_gpu: Any, tiny: Any, tmp_path: Path) -> Any:
    """`simulate(function)`: what a function of tests/programs/parity_simulated.py prints."""

    def run(function: str, **options: Any) -> str:
        places = tiny.bundle, tiny.checkpoint, tmp_path / "plans"
        return simulated_gpu.program("parity_simulated", function, *places, timeout=300, **options)

    return run


@pytest.mark.slow
def test_plans_are_checked_at_every_size(simulate):
    simulate("plans_are_checked_at_every_size")


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_graphs_and_steps_are_those_of_the_cpu(simulate, lazy):
    """Lazily, nothing runs before something waits for it: a forgotten wait would show as stale data."""
    simulate(
        "graphs_and_steps_are_those_of_the_cpu",
        lazy=lazy,
    )
