"""The waterfall: every optimization generates the same picture in its own way, and nothing else is timed."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cnpp_trt.benchmarks.latency import waterfall as module
from cnpp_trt.benchmarks.latency.host_loop import HostLoop, HostLoopOutput, Sessions
from cnpp_trt.benchmarks.latency.waterfall import OPTIMIZATIONS, waterfall
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.errors import CnppError, UserError
from cnpp_trt.gpu import find_gpu

pytestmark = pytest.mark.slow

ON_HOST = (
    *("naive", "hint_hoisted", "prompt_hoisted", "time_hoisted", "shared_prefix", "update_graph", "session_options"),
    "io_binding",
)


class Counting(Sessions):
    """The runtime's own sessions, which remember what was called how often."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline.bundle, lambda graph: pipeline.backend.load(graph).session)
        self.calls: Counter[str] = Counter()

    def __call__(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        self.calls[graph] += 1
        return super().__call__(graph, feeds)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_inference_steps": 4, "scheduler": "unipc", "guidance_scale": 5.0},
        {"num_inference_steps": 3, "scheduler": "euler", "num_images_per_prompt": 2},
        {"num_inference_steps": 3, "scheduler": "lcm", "guidance_scale": 1.0, "num_images_per_prompt": 2},
    ],
)
def test_the_loop_on_the_host_draws_what_the_pipeline_draws(tiny, fields):
    pipeline = tiny.pipeline
    request = next(make_requests(pipeline, "seg", [3], **fields))
    expected = pipeline(request)
    values = pipeline.prepare(request).tensors
    n, batch = request.num_inference_steps, len(values.prompts.input_ids)
    techniques = ("hoist_hint", "hoist_prompt", "hoist_time", "update_graph")
    for count in range(len(techniques) + 1):
        used = techniques[:count]
        run = Counting(pipeline)
        output = HostLoop(run, "seg", values, **dict.fromkeys(used, True))()
        np.testing.assert_allclose(output.latents, expected.latents, rtol=1e-4, atol=1e-5)
        assert np.abs(output.images.astype(int) - expected.images).max() <= 1
        prompts, times = (1 if technique in used else n for technique in ("hoist_prompt", "hoist_time"))
        assert run.calls == Counter(
            text_encoder=1,
            hint_seg=1 if "hoist_hint" in used else n * batch,
            text_kv=prompts,
            text_kv_seg=prompts,
            time_embeds=times,
            time_embeds_seg=times,
            controlnet_seg=n,
            unet=n,
            vae_decoder=1,
            **({"update": n} if "update_graph" in used else {}),
        )


def test_every_bar_that_works_here_is_measured_and_every_other_has_its_reason(tiny, logged):
    result = waterfall(tiny.pipeline.bundle, "depth", threads=1, rounds=2, num_inference_steps=2, scheduler="ddim")
    optimizations: dict[str, Any] = {t["name"]: t for t in result["optimizations"]}
    assert list(optimizations) == [optimization.name for optimization in OPTIMIZATIONS]
    assert result["case"] == {
        **{"width": tiny.size[0], "height": tiny.size[1], "images": 1, "steps": 2, "scheduler": "ddim"},
        **{"guidance_scale": 7.5, "base": True},
    }
    for name in ON_HOST:
        assert optimizations[name]["reason"] == ""
        assert len(optimizations[name]["seconds"]["samples"]) == 2
        assert optimizations[name]["difference"] < 1e-5
    assert optimizations["naive"]["difference"] == 0
    assert optimizations["naive"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert optimizations["openvino"]["difference"] < 1e-5
    for t in result["optimizations"]:
        assert ("seconds" in t) == ("ratio" in t) == (t["reason"] == "")
    if not find_gpu().gpu:
        assert {
            optimizations[name]["reason"] for name in ("plan", "graph_per_engine", "graph_per_step", "whole_loop")
        } == {find_gpu().reason}
    told = logged()
    assert told and not any("\n" in line for line in told)


def test_only_what_was_asked_for_is_opened(tiny):
    result = waterfall(
        tiny.pipeline.bundle, "seg", threads=1, rounds=1, optimizations=["io_binding"], num_inference_steps=1
    )
    measured = [t["name"] for t in result["optimizations"] if "seconds" in t]
    assert measured == ["io_binding"]
    assert {t["reason"] for t in result["optimizations"] if t["name"] in ON_HOST} == {"", "not asked for"}


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_what_draws_something_else_is_not_timed(tiny, monkeypatch, factor):
    right = OPTIMIZATIONS[0]

    def off(bench: Any) -> Any:
        generate = right.open(bench)
        return lambda: HostLoopOutput((output := generate()).images, output.latents * factor)

    monkeypatch.setattr(module, "OPTIMIZATIONS", (right, replace(right, name="off", open=off)))
    first, second = waterfall(tiny.pipeline.bundle, "seg", threads=1, rounds=1, num_inference_steps=1)["optimizations"]
    assert first["reason"] == ""
    assert second["reason"].startswith(f"its latents differ by {abs(factor - 1):.1e}, more than 1e-03")
    assert "seconds" not in second
    assert ("difference" in second) == np.isfinite(factor)  # a result holds no NaN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizations": ["io_binding", "magic"]}, "unknown optimization 'magic': choose from naive, "),
        ({"rounds": 0}, "rounds must be above 0, not 0"),
        ({"condition": "hed"}, "has no condition 'hed', only seg, depth"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
    ],
)
def test_what_cannot_be_used_is_refused(tiny, arguments, message):
    with pytest.raises(UserError, match=message):
        waterfall(tiny.pipeline.bundle, **{"condition": "seg", **arguments})


@pytest.mark.skipif(find_gpu().gpu is not None, reason="there is a GPU")
def test_where_no_bar_works_each_says_why(tiny):
    with pytest.raises(CnppError, match="no optimization works here: naive: no GPU to run on: "):
        waterfall(tiny.pipeline.bundle, "seg", device="gpu", num_inference_steps=1)


def test_a_damaged_graph_is_told_as_the_bundles(bundle_copy):
    from cnpp_trt.bundles.bundle import Bundle

    bundle = Bundle.open(bundle_copy)
    file = bundle_copy / "unet.onnx"
    file.write_bytes(file.read_bytes()[:1000] + bytes(file.stat().st_size - 1000))
    with pytest.raises(UserError, match=r"is damaged: unet\.onnx changed since the export"):
        waterfall(bundle, "seg", threads=1, num_inference_steps=1)


def test_recordings_draw_the_same_bytes_on_the_simulated_gpu(simulated_gpu, tiny, tmp_path):
    simulated_gpu.program(
        "waterfall_simulated",
        "recordings_draw_the_same_bytes",
        tiny.bundle,
        tmp_path / "plans",
    )
