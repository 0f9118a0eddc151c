"""What recordings are worth, on the simulated GPU; run by tests/benchmarks/latency/test_waterfall.py."""

import sys
from pathlib import Path

import fake_tensorrt
import numpy as np
from cnpp_trt import Pipeline
from cnpp_trt.benchmarks.latency import waterfall as module
from cnpp_trt.bundles.bundle import Bundle

gpu = fake_tensorrt.install()


def recordings_draw_the_same_bytes(bundle_folder: str, plans_folder: str) -> None:
    bundle, plans = Bundle.open(bundle_folder), Path(plans_folder)
    fake_tensorrt.make_plans(bundle, plans)
    bench = module._Bench(bundle, "seg", "gpu", 1, plans, {"num_inference_steps": 3})
    expected = Pipeline.open(bundle, "onnxruntime-cpu", threads=1)(bench.request)
    replays = {"plan": 0, "graph_per_engine": 3 * 3 + 1, "graph_per_step": 3 + 1, "whole_loop": 1}
    for optimization in module.OPTIMIZATIONS:
        if optimization.name in replays:
            generate = optimization.open(bench)
            for _ in range(2):
                gpu.clear()
                fake_tensorrt.launches.clear()
                output = generate()
                assert np.array_equal(output.latents, expected.latents), optimization.name
                assert np.array_equal(output.images, expected.images), optimization.name
                assert gpu.trace().count("cuGraphLaunch") == replays[optimization.name], gpu.trace()
                step = ["controlnet_seg", "unet", "update"]
                assert fake_tensorrt.launches == ["hint_seg", *step * 3, "vae_decoder"], fake_tensorrt.launches

    result = module.waterfall(bundle, "seg", device="gpu", threads=1, plans=plans, rounds=2, num_inference_steps=2)
    found = {t["name"]: t for t in result["optimizations"]}
    assert set(found) == {optimization.name for optimization in module.OPTIMIZATIONS if optimization.device != "cpu"}
    for name in replays:
        measured = found[name]
        assert measured["reason"] == "" and measured.get("difference") == 0 and "ratio" in measured, measured
    assert "CUDA provider" in found["naive"]["reason"] and "seconds" not in found["naive"], found["naive"]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
