"""What is drawn: each graph, every way of recording, ONNX Runtime's CUDA provider, memory, threads, and speed."""

import gc
import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BackendError, DeviceMemoryError
from ...runtime.pipeline import Pipeline
from ...runtime.result import Result
from ...runtime.settings.options import CUDA_GRAPHS
from ..image_metrics import max_difference, psnr
from ..parity.launch_comparison import Tally, compare_graphs
from .stage import Finding, Setup, WrongResult

# fp16 graphs on real inputs: rounding leaves some 1e-3 (parity/thresholds.toml), a wrong kernel 0.1 and more.
_GRAPH_TOLERANCE = 5e-2
# Two fp16 images of one request in dB: rounding leaves 40 and more, another image 10 to 20.
_IMAGE_PSNR = 30.0
_REPLAYS = 30
_LEAK = 8 << 20


def graphs(setup: Setup) -> Finding:
    """Every graph of a request on the inputs that ONNX Runtime's CPU backend gives it."""
    reference, deployed = setup.pipeline("onnxruntime-cpu"), setup.pipeline()
    tallies: dict[str, Tally] = {}
    compare_graphs(reference, deployed, setup.request(reference, num_inference_steps=2), tallies)
    found = Finding()
    found.numbers["backend"] = deployed.backend.name
    found.numbers.update({name: float(f"{tally.relative_l2:.1e}") for name, tally in tallies.items()})
    bad = [
        f"{name} by {tally.relative_l2:.1e}" for name, tally in tallies.items() if tally.relative_l2 > _GRAPH_TOLERANCE
    ]
    if bad:
        raise WrongResult(f"relative L2 differences to ONNX Runtime's CPU provider: {', '.join(bad)}")
    return found


def ladder(setup: Setup) -> Finding:
    """Images of every way of recording against those of plain launches, byte for byte."""
    found = Finding()
    plain = setup.pipeline(cuda_graphs="off")
    requests = [setup.request(plain, i, num_inference_steps=n) for i, n in enumerate((4, 4, 7))]
    expected = [_pixels(plain(request)) for request in requests]
    for rung in CUDA_GRAPHS[:-1]:
        pipeline = setup.pipeline(cuda_graphs=rung)
        for request in requests:
            pipeline(request)
        results = [pipeline(request) for request in requests]
        if not all(np.array_equal(_pixels(r), e) for r, e in zip(results, expected, strict=True)):
            raise WrongResult(f"with CUDA graphs of each {rung} the images are not those of plain launches")
        for note in {note for result in results for note in result.notes if note.startswith("CUDA graphs")}:
            found.degrade(note)
        recordings = pipeline.backend.memory().get("recordings", 0)
        found.numbers[f"{rung}: recordings KiB"] = recordings // 1024
        if rung == "step":
            for _ in range(_REPLAYS):
                if not np.array_equal(_pixels(pipeline(requests[0])), expected[0]):
                    raise WrongResult(f"one of {_REPLAYS} replays drew another image")
        pipeline.close()
    found.numbers["replays"] = _REPLAYS
    return found


def eviction(setup: Setup) -> Finding:
    """Two conditions in turn where device memory is for one: what was unloaded is loaded again."""
    roomy = setup.pipeline()
    conditions = [setup.condition, *[c for c in roomy.bundle.manifest.conditions if c != setup.condition][:1]]
    if len(conditions) < 2:
        return Finding("skipped", "the bundle has one condition: nothing would be unloaded")
    requests = [setup.request(roomy, 0, num_inference_steps=2)]
    other = Setup(setup.work, setup.bundle, conditions[1], setup.device)
    requests.append(other.request(roomy, 1, num_inference_steps=2))
    expected = [_pixels(roomy(request)) for request in requests]
    both = sum(roomy.backend.memory().values())
    roomy.close()
    gc.collect()
    tight = setup.pipeline(vram_budget=both - 1)
    found = Finding(numbers={"budget MiB": round((both - 1) / 2**20, 1)})
    for i in (0, 1, 0, 1):
        try:
            drawn = _pixels(tight(requests[i]))
        except DeviceMemoryError as e:
            raise BackendError(f"one condition does not fit where two nearly do: {e}") from e
        if not np.array_equal(drawn, expected[i]):
            raise WrongResult("after its engines were unloaded and loaded again a condition drew another image")
    return found


def images(setup: Setup) -> Finding:
    """A whole request on TensorRT against the CPU backend."""
    return _against_cpu(setup, "tensorrt")


def onnxruntime_cuda(setup: Setup) -> Finding:
    """A whole request on ONNX Runtime's CUDA provider against the CPU backend."""
    said = _Warnings()
    logging.getLogger("cnpp_trt").addHandler(said)
    found = _against_cpu(setup, "onnxruntime-cuda")
    partly = [line.partition(":")[0] for line in said.lines if "some of its nodes on the CPU" in line]
    found.numbers["graphs with nodes on the CPU"] = ", ".join(partly) or "none"
    for line in said.lines[:2]:
        found.degrade(line)
    return found


def _against_cpu(setup: Setup, backend: str) -> Finding:
    reference, deployed = setup.pipeline("onnxruntime-cpu"), setup.pipeline(backend)
    request = setup.request(reference, num_inference_steps=4)
    want, got = reference(request).images[0], deployed(request).images[0]
    decibels, most = psnr(want, got), max_difference(want, got)
    found = Finding(numbers={"largest difference of 255": most})
    if decibels is not None:
        found.numbers["PSNR dB"] = round(decibels, 1)
        if decibels < _IMAGE_PSNR:
            raise WrongResult(f"the image differs from the CPU backend's: {decibels:.1f} dB, up to {most} of 255")
    return found


def leaks(setup: Setup) -> Finding:
    """Device memory over many requests, and the same images from several threads."""
    pipeline = setup.pipeline()
    requests = [setup.request(pipeline, i, num_inference_steps=2 + i % 3) for i in range(6)]
    expected = [_pixels(pipeline(request)) for request in requests]
    for request in requests:
        pipeline(request)
    backend: Any = pipeline.backend
    before = backend.free_memory()
    count = 200 if setup.full else 50
    for i in range(count):
        pipeline(requests[i % len(requests)])
    gc.collect()
    taken = before - backend.free_memory()
    found = Finding(numbers={"requests": count, "device KiB more": taken // 1024})
    if taken > _LEAK:
        raise WrongResult(f"{count} requests took {taken / 2**20:.0f} MiB of device memory that they did not give back")
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda i: _pixels(pipeline(requests[i % 6])), range(24)))
    if not all(np.array_equal(pixels, expected[i % 6]) for i, pixels in enumerate(drawn)):
        raise WrongResult("requests of several threads drew other images than one after the other")
    return found


def speed(setup: Setup) -> Finding:
    """Seconds of a request, warm, by what CUDA graphs record."""
    found, rounds = Finding(), 20 if setup.full else 5
    runs: dict[str, Callable[[], Result]] = {}
    steps = 0
    for rung in CUDA_GRAPHS:
        pipeline = setup.pipeline(cuda_graphs=rung)
        request = setup.request(pipeline)
        steps = request.num_inference_steps
        runs[rung] = _drawing(pipeline, request)
        for _ in range(2):
            runs[rung]()
    seconds: dict[str, list[float]] = {rung: [] for rung in runs}
    for _ in range(rounds):
        for rung, draw in runs.items():
            start = time.perf_counter()
            draw()
            seconds[rung].append(time.perf_counter() - start)
    found.numbers["steps"] = steps
    found.numbers.update({f"{rung}: ms": round(1e3 * statistics.median(s), 2) for rung, s in seconds.items()})
    return found


def _drawing(pipeline: Pipeline, request: Any) -> Callable[[], Result]:
    return lambda: pipeline(request)


def _pixels(result: Result) -> NDArray[np.uint8]:
    return result.images


class _Warnings(logging.Handler):
    """Keeps what the package warns of: nodes that fell back to the CPU, say."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
