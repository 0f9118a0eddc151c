"""The simulated GPU itself: real cuda-python code in a child process sees a GPU, and its errors are found."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def child(simulated_gpu: Any) -> Any:
    """`child(function, argument, …)`: what a function of tests/programs/simulated_gpu_calls.py prints."""

    def run(function: str, *arguments: str, **options: Any) -> str:
        printed: str = simulated_gpu.program("simulated_gpu_calls", function, *arguments, **options)
        return printed

    return run


def test_this_process_sees_no_simulated_gpu(simulated_gpu: Any) -> None:
    loaded = Path("/proc/self/maps").read_text()
    assert str(simulated_gpu.folder) not in loaded


def test_the_device(child: Any) -> None:
    assert child("the_device").split() == ["Simulated", "GPU", "12", "0", str(8 << 30), "1", "13000"]
    assert child("the_device", capability="8.6", memory=1 << 20).split()[2:5] == ["8", "6", str(1 << 20)]


def test_what_is_not_simulated_says_so(child: Any) -> None:
    assert "cuModuleLoad is not found" in child("what_is_not_simulated_says_so")


def test_streams_and_events(child: Any) -> None:
    child("streams_and_events")


def test_memory(child: Any) -> None:
    child("memory_calls")


def test_buffers_of_cuda_core(child: Any) -> None:
    child("buffers_of_cuda_core")


def test_out_of_memory(child: Any) -> None:
    child(
        "out_of_memory",
        memory=1000,
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_a_graph_builder(child: Any, lazy: bool) -> None:
    child(
        "a_graph_builder",
        lazy=lazy,
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_a_raw_capture(child: Any, lazy: bool) -> None:
    child(
        "a_raw_capture",
        lazy=lazy,
    )


def test_what_a_capture_forbids(child: Any) -> None:
    child("what_a_capture_forbids")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_replay_with_a_freed_pointer(child: Any, lazy: bool) -> None:
    child("a_replay_with_a_freed_pointer", "lazy" if lazy else "eager", lazy=lazy)


def test_lazy_work_waits_for_a_synchronization(child: Any) -> None:
    child(
        "lazy_work_waits_for_a_synchronization",
        lazy=True,
    )


def test_a_callback_may_not_call_the_driver(child: Any) -> None:
    child("a_callback_may_not_call_the_driver")


def test_a_thread_without_a_context(child: Any) -> None:
    child("a_thread_without_a_context")


def test_the_trace(child: Any) -> None:
    child("the_trace")


def test_a_failing_kernel_fails_the_test(child: Any) -> None:
    with pytest.raises(AssertionError, match="exit status 70"):
        child("a_failing_kernel_fails_the_test")
