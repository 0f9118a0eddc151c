"""On a GPU: the loop as one recording: the same bits, one launch, no wait, no growth, one request after the other."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(1800)  # the first test of each backend exports and builds

# A leak of a tenth of a megabyte with each request would show; the driver's own chunks of 2 MiB do not.
SLACK = 8 << 20
# A warm pipeline looks a program up; a cold one reads plans.
WARM_LOAD = 0.05


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)


def nothing(k: int, timestep: float, latents: np.ndarray) -> None:
    """A callback after each step, which the loop must be run launch by launch for."""


@pytest.mark.parametrize(
    ("conditions", "fields"),
    [
        (("seg",), {"steps": 9}),
        (("seg", "depth"), {"steps": 5, "num_images_per_prompt": 2}),
        (("depth",), {"steps": 4, "guidance_scale": 1.0, "scheduler": "lcm"}),
    ],
)
def test_recorded_and_launch_by_launch_are_the_same_to_the_bit(tensorrt, ask, conditions, fields):
    wanted = ask(*conditions, **fields)
    one_by_one = tensorrt(wanted)
    recorded = tensorrt(wanted)
    watched = tensorrt(wanted, nothing)
    assert "unet" in one_by_one.timings
    assert "loop" in recorded.timings
    assert "unet" not in recorded.timings
    assert "unet" in watched.timings
    assert recorded.notes == ()
    assert same(one_by_one, recorded)
    assert same(one_by_one, watched)


def test_values_are_data_in_the_recording(tensorrt, ask):
    tensorrt(ask(steps=7))
    changes = {"prompt": "a tree", "seed": 7, "scale": 0.3, "guidance_scale": 2.0, "image": 2, "scheduler": "ddim"}
    plain = tensorrt(ask(steps=7))
    for changed in [*({name: value} for name, value in changes.items()), changes]:
        recorded = tensorrt(ask(steps=7, **changed))
        assert "loop" in recorded.timings
        assert same(recorded, tensorrt(ask(steps=7, **changed), nothing)), changed
        assert not np.array_equal(recorded.latents, plain.latents), changed
    assert same(tensorrt(ask(steps=7)), plain)


@pytest.mark.parametrize("known", [True, False])
def test_one_launch_for_an_image_and_no_wait_before_the_first_copy_back(tensorrt, ask, known):
    """Also where prompt and condition are new, and encoded first."""
    tensorrt(ask(steps=8))
    tensorrt(ask(steps=8))
    wanted = ask(steps=8, seed=5) if known else ask(steps=8, seed=5, prompt=f"never seen {known}", image=17)
    trace: list[str] = []
    tensorrt.backend.trace = trace
    try:
        tensorrt(wanted)
    finally:
        tensorrt.backend.trace = None
    assert trace.count("launch") == 1, trace
    back = trace.index("cuMemcpyDtoHAsync")
    assert trace.index("launch") < back
    assert "sync" not in trace[:back], trace
    assert not any("Host" in name for name in trace), trace
    if known:
        assert not any("Alloc" in name for name in trace), trace


def test_two_hundred_mixed_requests_do_not_grow(pipeline, ask, report):
    """The same hundred structures twice, with other prompts, images and seeds: the memory at the end is the same."""
    rng = np.random.default_rng(1)
    mixed = [
        {
            "conditions": [["seg"], ["depth"], ["seg", "depth"]][int(rng.integers(3))],
            "steps": int(rng.integers(1, 5)),
            "num_images_per_prompt": int(rng.integers(1, 3)),
            "guidance_scale": float(rng.choice([1.0, 5.0])),
            "scheduler": str(rng.choice(["unipc", "ddim", "lcm"])),
        }
        for _ in range(100)
    ]
    free = []
    for turn in range(2):
        for i, drawn in enumerate(mixed):
            fields: dict[str, Any] = dict(drawn)
            values = {"seed": 100 * turn + i, "prompt": f"prompt {turn} {i % 7}", "image": 10 * turn + i % 5}
            result = pipeline(
                ask(*fields["conditions"], **{k: v for k, v in fields.items() if k != "conditions"}, **values)
            )
            assert result.notes == ()
        gc.collect()
        pipeline.backend.synchronize()
        free.append(pipeline.backend.free_memory())
    report(f"{pipeline.backend.name}: the second hundred mixed requests took {free[0] - free[1]} bytes more")
    assert free[0] - free[1] <= SLACK


class Watched(list):
    """A trace that notes the thread of each call, and tells when a recording was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []
        self.launched = threading.Event()

    def append(self, name: str) -> None:
        super().append(name)
        self.threads.append(threading.get_ident())
        if name == "launch":
            self.launched.set()


def test_a_request_during_a_replay_waits_for_its_end(tensorrt, ask):
    long, short = ask(steps=50), ask("depth", steps=2, seed=8)
    expected = []
    for wanted in (long, short):
        tensorrt(wanted)
        expected.append(tensorrt(wanted))
    tensorrt.backend.trace = trace = Watched()
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(tensorrt, long)
            assert trace.launched.wait(60)
            second = pool.submit(tensorrt, short)
            found = [first.result(), second.result()]
    finally:
        tensorrt.backend.trace = None
    assert trace.count("launch") == 2
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    changes = sum(a != b for a, b in zip(trace.threads, trace.threads[1:], strict=False))
    assert changes <= 1, "calls of two requests were mixed"


def test_requests_of_several_threads_are_drawn_as_if_alone(pipeline, ask):
    wanted = [ask(seed=i, prompt=f"p{i % 3}", image=i % 4, steps=2 + i % 2) for i in range(24)]
    alone = [pipeline(w) for w in wanted]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(pipeline, wanted))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_after_warming_the_first_request_loads_nothing(open_any, ask, report):
    wanted = ask("depth", steps=3)
    cold = open_any()(wanted)
    warm = open_any(warm=ask("depth", steps=3, seed=None, prompt="something else", image=4))
    name = warm.backend.name
    first = warm(wanted)
    report(
        f"{name}: first request cold: load {cold.timings['load']:.3f} s of {cold.timings['total']:.3f} s; "
        f"warm: {first.timings['load']:.6f} s of {first.timings['total']:.3f} s"
    )
    assert same(cold, first)
    assert first.timings["load"] < min(WARM_LOAD, cold.timings["load"] / 5)
    assert ("loop" in first.timings) == (name != "onnxruntime-cuda")


def test_garbage_is_not_collected_into_a_recording(open_tensorrt, tensorrt, ask, monkeypatch):
    """To free device memory while its thread captures ends the capture: what is gone must wait until the end."""
    record, threshold = tensorrt.backend.record, gc.get_threshold()

    def collect() -> None:
        gc.set_threshold(1, 1, 1)
        assert [[] for _ in range(5000)]  # containers: what the collector counts

    monkeypatch.setattr(tensorrt.backend, "record", lambda launches: record([launches[0], collect, *launches[1:]]))
    gc.set_threshold(0)
    try:
        gone = open_tensorrt()
        gone(ask())
        del gone  # backend and graphs refer to each other: it stays until the collector finds it
        tensorrt(ask(steps=11))
        recorded = tensorrt(ask(steps=11))
    finally:
        gc.set_threshold(*threshold)
    assert "loop" in recorded.timings
    assert recorded.notes == ()


def test_a_pipeline_that_is_gone_gives_its_memory_back(open_tensorrt, tensorrt, ask):
    """A first pipeline pays for CUDA's own things; from then on what one takes is given back."""
    free = []
    for _ in range(4):
        pipeline = open_tensorrt()
        pipeline(ask())
        pipeline(ask())
        del pipeline
        gc.collect()
        tensorrt.backend.synchronize()
        free.append(tensorrt.backend.free_memory())
    assert free[1] - free[-1] <= SLACK
