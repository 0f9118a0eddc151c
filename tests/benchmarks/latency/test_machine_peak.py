"""What a machine can do: that products and copies are real, counted right and timed as said."""

import sys
from itertools import count

import numpy as np
import pytest
import torch
from cnpp_trt.benchmarks.latency import machine_peak as machine
from cnpp_trt.errors import CnppError
from cnpp_trt.runtime.shape import LoopShape, Schedule
from hints import hint

pytestmark = pytest.mark.slow


@pytest.fixture
def seconds(monkeypatch):
    """`seconds(s)`: every product and copy is done, once, and is said to have taken s."""
    done = []

    def say(taken):
        def fastest(torch_, work, device):
            done.append(work())
            return taken

        monkeypatch.setattr(machine, "_fastest", fastest)
        return done

    monkeypatch.setitem(machine._SIDES, "cpu", (8, 16))
    monkeypatch.setitem(machine._COPIED_BYTES, "cpu", 1000)
    return say


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_a_product_of_n_by_n_is_two_n_cubed_operations(seconds, precision):
    done = seconds(1e-3)
    assert machine.matrix_rate(precision, None, "cpu") == pytest.approx(2 * 16**3 / 1e-3)
    shapes = [tuple(np.shape(out[0] if isinstance(out, list) else out)) for out in done]
    each = 2 if precision == "fp32" else 1  # ONNX Runtime's beside PyTorch's
    assert shapes == [(8, 8)] * each + [(16, 16)] * each


def test_products_in_int8_are_summed_in_int32():
    (product,) = machine._products(torch, "int8", 32, 1, "cpu")
    found = product()
    assert found.dtype == torch.int32 and found.abs().max() > 127


def test_a_slow_machine_is_spared_the_larger_products(seconds):
    done = seconds(1.0)
    assert machine.matrix_rate("bf16", None, "cpu") == 2 * 8**3
    assert len(done) == 1


def test_a_copy_counts_what_is_read_and_what_is_written(seconds):
    done = seconds(0.5)
    assert machine.bandwidth(None, "cpu") == 2 * 1000 / 0.5
    assert [copied.nbytes for copied in done] == [1000]


def test_onnxruntime_is_given_a_real_product():
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((32, 32), np.float32) for _ in range(2))
    product = machine._onnxruntime_product(32, 1)
    assert product is not None
    np.testing.assert_allclose(product()[0], x @ w, rtol=1e-4, atol=1e-5)


def test_the_fastest_of_the_repeats_counts_and_the_first_call_only_warms_up(monkeypatch):
    taken = iter([3.0, 1.5, 2.0, 4.0, 1.75])
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    monkeypatch.setattr(machine, "_timed", lambda *_: next(taken))
    calls = count()
    assert machine._fastest(torch, lambda: next(calls), "cpu") == 1.5
    assert next(calls) == 1


def test_floor_of_a_request_on_this_machine(tiny):
    threads = torch.get_num_threads()
    shape = LoopShape(images=1, guided=True, controls=("seg",), uncontrolled=False)
    schedule = Schedule(((True, True),), (False, False))
    found = machine.measure_roofline(tiny.pipeline.bundle, shape, schedule, "cpu", 1, ["fp32"])
    assert set(found["flop_per_second"]) == {"fp32"}
    assert found["flop_per_second"]["fp32"] > 0
    assert found["bytes_per_second"] > 0
    assert found["launches"]["unet"] == 2
    assert set(found["op_counts"]) == set(found["launches"])
    assert torch.get_num_threads() == threads  # it was measured in a process of its own


def test_what_is_missing_is_told_in_one_line(monkeypatch):
    with pytest.raises(CnppError, match=r"^cannot measure what this machine can do: .*invalid choice: 'fp8'") as e:
        machine.measure_machine("cpu", 1, ["fp8"])
    assert "\n" not in str(e.value)
    if not torch.cuda.is_available():
        with pytest.raises(CnppError, match=r"^cannot measure .*: PyTorch \S+ finds no CUDA device$"):
            machine.measure_machine("gpu", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CnppError, match=f"measuring the machine needs torch, which is not installed: {hint('export')}"):
        machine.bandwidth(1, "cpu")
