"""What this machine can do, measured: its rate of matrix products and its memory bandwidth.

    python -m cnpp_trt.benchmarks.latency.machine_peak [--device cpu|gpu] [--threads N] [--precision fp32 bf16 int8]

Measured in a process of its own, so that thread settings and memory go with it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict, cast

from ...bundles.bundle import Bundle
from ...errors import CnppError
from ...install import cannot_import
from ...runtime.shape import LoopShape, Schedule
from ..records import Roofline

Device = Literal["cpu", "gpu"]
# A product, a copy: done once by a call, when it returns or, on a GPU, when the GPU gets there.
_Work = Callable[[], Any]

PRECISIONS: dict[str, tuple[str, ...]] = {"cpu": ("fp32", "bf16", "int8"), "gpu": ("fp32", "bf16", "fp16")}
# Sides of the matrices. What is too small does not fill the machine, what is too large overflows its caches.
_SIDES = {"cpu": (1024, 2048, 4096), "gpu": (4096, 8192, 16384)}
# Of each array that is copied: many times the last-level cache.
_COPIED_BYTES = {"cpu": 2**29, "gpu": 2**31}
_SECONDS = 0.5
_REPEATS = 5


class MachinePeak(TypedDict):
    """As in `records.Roofline`."""

    flop_per_second: dict[str, float]
    bytes_per_second: float


def measure_roofline(
    bundle: Bundle,
    shape: LoopShape,
    schedule: Schedule,
    device: Device,
    threads: int | None,
    precisions: Sequence[str] = (),
) -> Roofline:
    """What a request of this loop shape asks for, and what this machine can do.

    Args:
        bundle: whose graphs are counted.
        shape, schedule: of the request.
        device: that is measured.
        threads: of the CPU; None is the libraries' default.
        precisions: that are measured; none are all of the device's.

    Raises:
        CnppError: either cannot be found out.
    """
    from .flop_count import request_op_counts

    op_counts, launches = request_op_counts(bundle, shape, schedule)
    machine = measure_machine(device, threads, precisions)
    return Roofline(**machine, op_counts=op_counts, launches=launches)


def measure_machine(device: Device, threads: int | None, precisions: Sequence[str] = ()) -> MachinePeak:
    """Measures in a new process. Takes some ten seconds.

    Raises:
        CnppError: PyTorch is missing, or finds no GPU.
    """
    command = [sys.executable, "-m", "cnpp_trt.benchmarks.latency.machine_peak", "--device", device]
    command += ["--precision", *(precisions or PRECISIONS[device])]
    command += [] if threads is None else ["--threads", str(threads)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise CnppError(f"cannot measure what this machine can do: {said.removeprefix('error: ')}")
    return cast(MachinePeak, json.loads(ended.stdout.splitlines()[-1]))


def matrix_rate(precision: str, threads: int | None, device: Device) -> float:
    """Operations/s of the fastest of several large matrix products, each of 2 n³ operations (a multiply-add is two).

    In fp32 on a CPU the faster of PyTorch's product and ONNX Runtime's: which library is slow depends on the CPU, and
    on an AMD EPYC the first reached less than half of the second. On a GPU without TF32.

    Raises:
        CnppError: the message says what is wrong and what to do.
    """
    torch = _torch(threads, device)
    rates: list[float] = []
    for side in _SIDES[device]:
        flop = 2 * side**3
        # A machine so slow that the next size would take all the time has shown its best already.
        if rates and flop / max(rates) > _SECONDS:
            break
        products = _products(torch, precision, side, threads, device)
        rates += [flop / _fastest(torch, product, device) for product in products]
    return max(rates)


def bandwidth(threads: int | None, device: Device) -> float:
    """Bytes/s of the fastest copy between two arrays in the device's memory, what is read and written both counted.

    On a CPU a write may cost a read of the same line as well, which is not counted (as STREAM counts: McCalpin 1995).

    Raises:
        CnppError: the message says what is wrong and what to do.
    """
    torch = _torch(threads, device)
    source, target = (torch.ones(_COPIED_BYTES[device], dtype=torch.uint8, device=_place(device)) for _ in range(2))
    return 2 * _COPIED_BYTES[device] / _fastest(torch, lambda: target.copy_(source), device)


def _products(torch: Any, precision: str, side: int, threads: int | None, device: Device) -> Iterator[_Work]:
    if precision == "int8":
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
        yield lambda: torch._int_mm(a, b)  # sums in int32
        return
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.randn(side, side, device=_place(device)).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    yield lambda: torch.mm(a, b, out=out)
    if device == "cpu" and precision == "fp32" and (product := _onnxruntime_product(side, threads)):
        yield product


def _onnxruntime_product(side: int, threads: int | None) -> _Work | None:
    """A product with a constant matrix, as ONNX Runtime packs it once; None where it is not installed."""
    try:
        import numpy as np
        import onnx
        import onnxruntime
        from onnx import helper
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [side, side]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", tensors[:1], tensors[1:], [onnx.numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _fastest(torch: Any, work: _Work, device: Device) -> float:
    """Seconds of the fastest of at least `_REPEATS` calls, after one that warms up."""
    work()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _REPEATS or time.perf_counter() < end:
        seconds.append(_timed(torch, work, device))
    return min(seconds)


def _timed(torch: Any, work: _Work, device: Device) -> float:
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _torch(threads: int | None, device: Device) -> Any:
    try:
        import torch
    except ImportError as e:
        raise CnppError(cannot_import("measuring the machine", e)) from None
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "gpu" and not torch.cuda.is_available():
        raise CnppError(f"PyTorch {torch.__version__} finds no CUDA device")
    torch.set_float32_matmul_precision("highest")
    return torch


def _place(device: Device) -> str:
    return "cuda" if device == "gpu" else "cpu"


def main() -> None:
    """Measures the rates of this machine and prints them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m cnpp_trt.benchmarks.latency.machine_peak")
    parser.add_argument("--device", choices=sorted(PRECISIONS), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16", "int8"))
    given = parser.parse_args()
    try:
        precisions = given.precision or PRECISIONS[given.device]
        rates = {precision: matrix_rate(precision, given.threads, given.device) for precision in precisions}
        measured = MachinePeak(flop_per_second=rates, bytes_per_second=bandwidth(given.threads, given.device))
    except CnppError as e:
        sys.exit(f"error: {e}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
