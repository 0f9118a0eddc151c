"""The backend `tensorrt` where CUDA or TensorRT fail, on the simulated GPU: see tests/programs/gpu_faults.py."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def program(simulated_gpu: Any, tiny: Any, tmp_path: Path) -> Any:
    def run(name: str, *arguments: str, bundle: Path = tiny.bundle, **options: Any) -> list[str]:
        plans = tmp_path / "plans"
        output: str = simulated_gpu.program("gpu_faults", name, bundle, plans, *arguments, **options)
        return output.splitlines()

    return run


@pytest.mark.parametrize("how", ["raises", "returns nothing"])
def test_a_factory_that_fails(program: Any, how: str) -> None:
    refused, reason = program("factory", how)
    assert refused.startswith("tensorrt-rtx 1.7.1.116 cannot start its runtime: ")
    assert "factory function returned nullptr" in refused or how != "raises"
    assert "not tensorrt: tensorrt-rtx 1.7.1.116 cannot start its runtime" in reason


def test_a_driver_that_is_too_old_for_the_package(program: Any) -> None:
    refused, _ = program("factory", "returns nothing", cuda=12020)
    assert "it is built for CUDA 13 and this machine's driver runs CUDA 12.2: update the driver to 580" in refused


def test_auto_survives_whatever_a_library_raises(program: Any) -> None:
    program("auto_survives_anything")


def test_a_portable_plan_for_other_gpus(program: Any) -> None:
    [refused] = program("invalid_plan", "2", capability="9.0")
    assert "cannot run its plan of text_encoder on Simulated GPU (sm90): unsupported cc" in refused
    assert "--compute-capability 90" in refused
    [refused] = program("invalid_plan", "5", cuda=12020)
    assert "version mismatch, old cuda driver" in refused or "old cuda driver, version mismatch" in refused
    assert "update the driver to 580" in refused


def test_a_plan_that_does_not_load_shows_when_opening(program: Any) -> None:
    [refused] = program("plan_that_does_not_load")
    assert "cannot load" in refused


def test_the_callers_context_stays_its_own(program: Any) -> None:
    program("callers_context")


def test_after_a_sticky_error_the_process_must_end(program: Any) -> None:
    first, second = program("after_a_sticky_error")
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in first
    assert "start the process again" in first
    assert "nothing runs on the GPU in this process any more: start it again" in second


def test_a_fork_is_refused(program: Any) -> None:
    [refused] = program("after_a_fork")
    assert "forked after CUDA was initialized" in refused
    assert "spawn" in refused


@pytest.mark.parametrize("kind", ["flipped", "cut", "of another driver"])
def test_a_runtime_cache_that_cannot_be_used(program: Any, kind: str) -> None:
    program("runtime_cache", kind)


@pytest.mark.parametrize("where", ["engine", "context"])
def test_memory_that_runs_out_in_tensorrt(program: Any, where: str) -> None:
    program("memory_runs_out", where)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("Engine.create_runtime_config", "cannot configure"),
        ("Config.create_runtime_cache", "takes no runtime cache for"),
    ],
)
def test_nothing_is_made(program: Any, what: str, said: str) -> None:
    [refused] = program("nothing_made", what)
    assert refused.startswith("tensorrt-rtx 1.7.1.116 ") and said in refused


def test_scratch_of_any_size(program: Any) -> None:
    program("scratch_of_any_size")


def test_no_runtime_cache_to_save(program: Any) -> None:
    program("no_runtime_cache_to_save")


def test_noise_of_an_odd_size_is_aligned(program: Any, v_prediction: Any) -> None:
    program("noise_of_an_odd_size", bundle=v_prediction.bundle)


def test_plans_of_another_gpu(program: Any) -> None:
    program("plans_of_another_gpu")
