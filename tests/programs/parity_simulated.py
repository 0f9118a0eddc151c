"""Parity of plans on the simulated GPU; run by tests/benchmarks/parity/test_parity_simulated.py."""

import sys
from pathlib import Path

import fake_tensorrt
import torch
from cnpp_trt import Pipeline
from cnpp_trt.benchmarks.parity.check_plans import check_plans
from cnpp_trt.benchmarks.parity.graph_parity import compare_launches
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.build import Sizes
from cnpp_trt.export.checkpoint import Checkpoint

gpu = fake_tensorrt.install()

torch.set_num_threads(1)
bundle, checkpoint, plans = Bundle.open(sys.argv[2]), Checkpoint(sys.argv[3]), Path(sys.argv[4])
fake_tensorrt.make_plans(bundle, plans)
sizes = Sizes((1, 2), (True, False))


def plans_are_checked_at_every_size() -> None:
    found = check_plans(bundle, checkpoint, ["seg", "depth"], sizes, plans)
    assert (found["backend"], found["note"], found["passed"]) == ("tensorrt-rtx", "", True), found
    launches = {g["graph"]: g["launches"] for g in found["graphs"]}
    # Four sizes, of each two conditions and both together, in four steps.
    assert launches["unet"] == launches["update"] == 4 * 3 * 4 and launches["add_residuals"] == 4 * 4, launches
    assert launches["text_encoder"] == launches["vae_decoder"] == 4 * 3, launches

    fake_tensorrt.poison["controlnet_depth"] = lambda name, value: value * 1.01 if name == "mid" else value
    found = check_plans(bundle, checkpoint, ["seg", "depth"], sizes, plans)
    (line,) = found["missed"]
    assert line.startswith("graph controlnet_depth, worst at controlnet_depth step ") and "mid: 0.01," in line, line
    assert not found["passed"]


def graphs_and_steps_are_those_of_the_cpu() -> None:
    def compared(pipeline):
        requests = list(make_requests(pipeline, "seg", [0], num_inference_steps=3))
        return compare_launches(pipeline, checkpoint, requests)

    on_gpu = compared(Pipeline.open(bundle, "tensorrt", plans=plans))
    assert on_gpu == compared(Pipeline.open(bundle, "onnxruntime-cpu", threads=1))
    assert all(0 < step < 1e-4 for step in on_gpu[1][0]["free"] + on_gpu[1][0]["forced"])


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[5:])
