"""A UNet in two graphs on the simulated GPU; run by tests/runtime/backends/test_split_simulated.py."""

import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.runtime.backends.interface import aligned

gpu = fake_tensorrt.install()

split, whole, plans = Bundle.open(sys.argv[2]), Bundle.open(sys.argv[3]), Path(sys.argv[4])
fake_tensorrt.make_plans(split, plans)
m = split.manifest
IMAGE = np.random.default_rng(0).integers(0, 256, (m.height, m.width, 3), np.uint8)
cpu = Pipeline.open(whole, "onnxruntime-cpu", threads=1)

streams: list[tuple[str, int]] = []
_execute = fake_tensorrt.Context.execute_async_v3


def _noted(context: Any, stream: int) -> bool:
    streams.append((context.engine.name, stream))
    return _execute(context, stream)


fake_tensorrt.Context.execute_async_v3 = _noted  # pyright: ignore[reportAttributeAccessIssue]


def request(*conditions: str, end: float = 1.0, **fields: Any) -> Request:
    controls = [Control(c, IMAGE, 1.0, 0.0, end) for c in conditions]
    return Request("a house", controls=controls, num_inference_steps=4, seed=1, **fields)


def same(a: Any, b: Any) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)


def draws_what_the_whole_unet_draws() -> None:
    for rung in ("off", "launch", "step", "loop"):
        pipeline = Pipeline.open(split, "tensorrt", plans=plans, cuda_graphs=rung)
        # The last two have steps at which no control applies.
        for wanted in (
            request("seg"),
            request("seg", "depth", num_images_per_prompt=2),
            request("seg", end=0.5),
            request(),
        ):
            expected = cpu(wanted)
            for result in (pipeline(wanted), pipeline(wanted), pipeline(wanted)):
                assert same(result, expected) and result.notes == (), (rung, result.notes)
        assert {programs.rung for programs in pipeline._preparation.programs.programs.values()} == {rung}


def the_encoder_has_a_stream_and_a_scratch_of_its_own() -> None:
    pipeline = Pipeline.open(split, "tensorrt", plans=plans)
    pipeline(request("seg"))
    [main] = {stream for name, stream in streams if name != "unet_encoder"}
    [side] = {stream for name, stream in streams if name == "unet_encoder"}
    assert side != main
    backend: Any = pipeline.backend
    held, needed = backend.held(), pipeline.memory_needed(request("seg"))
    assert held["activations"] == 2 * aligned(fake_tensorrt.SCRATCH), held
    assert needed["activations"] == 0, needed
    assert sum(held.values()) == gpu.live_bytes()
    # Where no control applies there is nothing to run beside.
    streams.clear()
    pipeline(request())
    assert {stream for _, stream in streams} == {main}


def a_recording_holds_the_fork_and_the_join() -> None:
    pipeline = Pipeline.open(split, "tensorrt", plans=plans, warm=request("seg"))
    streams.clear()
    gpu.clear()
    assert same(pipeline(request("seg")), cpu(request("seg")))
    trace = gpu.trace()
    assert streams == [] and trace.count("cuGraphLaunch") == 4 + 1, trace
    assert not any(call.startswith("cuStreamWaitEvent") for call in trace), trace


def what_cannot_be_captured_leaves_nothing_to_join() -> None:
    fake_tensorrt.uncapturable.add("unet_encoder")
    pipeline = Pipeline.open(split, "tensorrt", plans=plans)
    first, second, third = (pipeline(request("seg")) for _ in range(3))
    assert same(first, cpu(request("seg"))) and same(second, first) and same(third, first)
    assert "capture unet_encoder" in second.notes[0], second.notes


if __name__ == "__main__":
    globals()[sys.argv[1]]()
