"""Images that come from the GPU's memory and stay there, on the simulated GPU."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def simulate(simulated_gpu: Any, tiny: Any, tmp_path: Path) -> Any:
    """`simulate(function)`: runs a function of tests/programs/device_arrays.py."""

    def run(function: str, **options: Any) -> str:
        return simulated_gpu.program("device_arrays", function, tiny.bundle, tmp_path / "plans", **options)

    return run


def test_images_stay_on_the_device(simulate):
    simulate("images_stay_on_the_device")


@pytest.mark.parametrize("lazy", [False, True])
def test_control_images_are_read_on_the_device(simulate, lazy):
    """Lazily, another library's stream has written nothing before something waits for it."""
    simulate("control_images_are_read_on_the_device", lazy=lazy)


def test_dlpack_lets_the_consumer_wait(simulate):
    simulate("dlpack_lets_the_consumer_wait", lazy=True)


def test_requests_are_submitted(simulate):
    simulate("requests_are_submitted")
