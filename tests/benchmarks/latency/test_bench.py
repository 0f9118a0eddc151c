"""The contest itself, on the tiny model: who takes part, what is measured, and what becomes of one that fails."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cnpp_trt import Pipeline, Request
from cnpp_trt.benchmarks.environment import environment, physical_cores
from cnpp_trt.benchmarks.latency import bench
from cnpp_trt.benchmarks.latency import competitors as contenders
from cnpp_trt.benchmarks.latency import timing as latency
from cnpp_trt.benchmarks.latency import worker as contend
from cnpp_trt.benchmarks.records import Case
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.bundles.manifest import Manifest
from cnpp_trt.errors import BackendError, CnppError, UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.gpu import find_gpu
from requested import controls_of

pytestmark = pytest.mark.slow

STAGES = {"text_encoder", "text_kv", "hint", "controlnet", "unet", "update", "vae_decoder", "host"}


@pytest.fixture
def request_of(tiny: Any):
    def make(case: dict[str, Any], index: int) -> Request:
        sampling = {"num_inference_steps": case["steps"], "num_images_per_prompt": case["images"]}
        sampling |= {"scheduler": case["scheduler"], "guidance_scale": case["guidance_scale"]}
        return next(make_requests(tiny.pipeline, "seg", [index], **sampling))

    return make


@pytest.fixture
def config(tiny: Any):
    def make(name: str) -> contenders.WorkerConfig:
        size = "{}x{}".format(*tiny.size)
        return contenders.WorkerConfig(name, {size: tiny.bundle}, {"model": str(tiny.checkpoint)}, 1)

    return make


def test_cases_vary_one_thing_of_the_base():
    request = Request(scheduler="euler", guidance_scale=4.0).resolve(SamplingDefaults())
    made = latency.cases([(64, 64), (96, 64)], [1, 2], [20, 4, 50], request)
    base, *others = made
    assert base == {
        "width": 64, "height": 64, "images": 1, "steps": 20, "scheduler": "euler", "guidance_scale": 4.0, "base": True
    }  # fmt: skip
    # Few steps are LCM without guidance, which is one thing.
    sampling = ("steps", "scheduler", "guidance_scale")
    given: dict[str, Any] = dict(base)
    varied = [{k for k, value in case.items() if value != given[k]} - {"base"} for case in others]
    assert varied == [{"images"}, set(sampling), {"steps"}, {"width"}]
    assert (others[1]["scheduler"], others[1]["guidance_scale"]) == ("lcm", 1.0)
    assert latency.cases([(64, 64)], [1], [4], request, few_step=False)[0]["scheduler"] == "euler"


def test_memory_decides_who_is_measured_together():
    peaks = {"a": (5, 0), "b": (7, 0), "c": (7, 0), "d": (1, 0)}
    assert latency.groups("abcd", peaks, (100, 0)) == [["a", "b", "c", "d"]]
    assert latency.groups("abcd", peaks, (20, 0)) == [["a", "b"], ["a", "c", "d"]]
    # Two that do not fit are tried all the same: a lone baseline compares with nothing.
    assert latency.groups("abcd", peaks, (1, 0)) == [["a", "b"], ["a", "c"], ["a", "d"]]
    assert latency.groups("a", peaks, (100, 0)) == [["a"]]
    # And the GPU's: it is shared only by those that fit into it together.
    on_gpu = {name: (host, host) for name, (host, _) in peaks.items()}
    assert latency.groups("abcd", on_gpu, (100, 20)) == [["a", "b"], ["a", "c", "d"]]


@pytest.mark.slow
def test_the_condition_is_encoded_once_for_each_request(tiny: Any):
    import torch
    from cnpp_trt.benchmarks.latency.torch_settings import SETTINGS, Adapter
    from cnpp_trt.benchmarks.pytorch import PyTorch

    checkpoint = Checkpoint(str(tiny.checkpoint))
    plain, hoisted = (PyTorch(checkpoint, adapt=Adapter(torch, SETTINGS[n])) for n in ("pytorch", "pytorch-hint"))
    calls: list[int] = []
    for request in make_requests(tiny.pipeline, "seg", [0, 1], num_inference_steps=3):
        expected = plain.images(request)
        if not calls:
            hoisted.images(request)
            embedding = hoisted.pipeline(request).controlnet.controlnet_cond_embedding.embedding
            embedding.register_forward_hook(lambda *_: calls.append(1))
            calls.append(0)
        np.testing.assert_array_equal(hoisted.images(request), expected)
    assert calls == [0, 1, 1]


def test_contest(request_of: Any, config: Any, tiny: Any):
    names = ("pytorch", "onnxruntime-cpu", "openvino")
    configs = [(contenders.BY_NAME[name], config(name)) for name in names]
    configs.insert(0, (contenders.BY_NAME["tensorrt"], "no GPU here"))
    cases = latency.cases([tiny.size], [1, 2], [3], request_of({"steps": 3, "images": 1, "scheduler": "ddim",
                                                                "guidance_scale": 3.0}, 0), few_step=False)  # fmt: skip
    found = latency.time_competitors(configs, latency.TimingPlan(cases, rounds=4, cold_rounds=1), request_of)

    # Those that could not run are listed last: the first is the baseline.
    assert [c["name"] for c in found.contenders] == [*names, "tensorrt"]
    assert [c["available"] for c in found.contenders] == [True, True, True, False]
    assert found.contenders[-1]["reason"] == "no GPU here"
    assert set(found.cold) == set(names)
    for cold in found.cold.values():
        assert cold["host_bytes"] > 30 * 2**20 and cold["device_bytes"] is None
    assert found.cold["pytorch"]["host_bytes"] > found.cold["onnxruntime-cpu"]["host_bytes"]

    base, pair = found.cases
    assert (base["case"]["images"], pair["case"]["images"]) == (1, 2)
    assert len(base["runs"]["pytorch"]["whole"]["samples"]) == 4
    assert len(pair["runs"]["pytorch"]["whole"]["samples"]) == 3
    assert "ratio" not in base["runs"]["pytorch"]
    for name in names:
        run = base["runs"][name]
        # diffusers computes keys and values within its UNet.
        own = STAGES - ({"text_kv"} if name == "pytorch" else set())
        assert set(run["stages"]) == own and not pair["runs"][name]["stages"]
        assert all(min(stage["samples"]) > 0 for stage in run["stages"].values())
        if name != "pytorch":
            samples = zip(base["runs"]["pytorch"]["whole"]["samples"], run["whole"]["samples"], strict=True)
            assert "ratio" in run and "max_difference" in run
            assert run["ratio"]["median"] == pytest.approx(np.median([a / b for a, b in samples]))
            assert run["max_difference"] <= 1, "the same weights and request, or the times mean nothing"


def test_one_that_cannot_be_opened_is_listed(request_of: Any, config: Any, tiny: Any, tmp_path: Path):
    case = Case(width=1, height=1, images=1, steps=1, scheduler="ddim", guidance_scale=1.0, base=True)
    nowhere = contenders.WorkerConfig("openvino", {"64x64": tmp_path / "none"}, {}, 1)
    plan = latency.TimingPlan((case,), rounds=1, cold_rounds=1)
    configs = [
        (contenders.BY_NAME["openvino"], nowhere),
        (contenders.BY_NAME["onnxruntime-cpu"], config("onnxruntime-cpu")),
    ]
    found = latency.time_competitors(configs, plan, request_of)
    assert [c["name"] for c in found.contenders] == ["onnxruntime-cpu", "openvino"]
    assert "none" in found.contenders[1]["reason"]
    with pytest.raises(CnppError, match="no contender works here: openvino"):
        latency.time_competitors(configs[:1], plan, request_of)


def test_a_process_that_dies_is_an_error(config: Any):
    process = latency.Process(config("onnxruntime-cpu"))
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(BackendError, match="its process died"):
        process.ask({"do": "generate", "request": {}})
    process.close()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_contender_ends_amid_a_drawing_when_who_asked_is_gone(tiny: Any, tmp_path: Path, kind: signal.Signals):
    """Whatever way the benchmark ends, also one in which it can tell nobody."""
    line = ["bench", "--bundle", tiny.bundle, "--contender", "onnxruntime-cpu", "--steps", 500, "--num-images", 16]
    process = subprocess.Popen(
        [sys.executable, "-m", "cnpp_trt", *map(str, line), "--no-waterfall", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        watched, deadline = psutil.Process(process.pid), time.monotonic() + 120
        # It draws, for minutes, once it has used more time than loading takes.
        while not any(child.cpu_times().user > 4 for child in watched.children()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        drawing = watched.children()
        process.send_signal(kind)
        process.wait(timeout=10)
        _, alive = psutil.wait_procs(drawing, timeout=3)
        assert alive == []
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_of_the_terminal_is_left_to_who_asked(config: Any):
    process = latency.Process(config("onnxruntime-cpu"))
    os.kill(process._process.pid, signal.SIGINT)
    assert process.peak_bytes() > 0
    assert process._process.poll() is None
    process.close()
    assert process._process.returncode == -signal.SIGKILL


def test_an_order_that_fails_is_answered(config: Any):
    process = latency.Process(config("onnxruntime-cpu"))
    with pytest.raises(BackendError, match="KeyError"):
        process.ask({"do": "generate"})
    assert process.peak_bytes() > 0
    process.close()


def test_requests_survive_the_way(tiny: Any):
    request = next(make_requests(tiny.pipeline, "seg", [7], num_inference_steps=5, scheduler="lcm", guidance_scale=1.5))
    again = contend._request(json.loads(json.dumps(contend.request_to_json(request))))
    assert np.array_equal(controls_of(again)[0].pixels, controls_of(request)[0].pixels)
    for name in ("prompt", "seed", "num_inference_steps", "scheduler", "guidance_scale", "num_images_per_prompt"):
        assert getattr(again, name) == getattr(request, name)


def test_every_contender_has_a_reason_or_a_chance():
    reasons = {name: contenders.unavailable_reason(spec) for name, spec in contenders.BY_NAME.items()}
    assert not reasons["pytorch"] and not reasons["onnxruntime-cpu"] and not reasons["openvino"]
    search = find_gpu()
    if search.gpu is None:
        assert search.reason
        assert all(reasons[name] == search.reason for name, spec in contenders.BY_NAME.items() if spec.device == "gpu")


def test_settings_are_checked():
    with pytest.raises(UserError, match="unknown contender 'tensorflow'"):
        bench.BenchSettings(contenders=("tensorflow",))
    with pytest.raises(UserError, match="give more than 0"):
        bench.BenchSettings(rounds=0)


def test_sizes_for_a_benchmark_stay_out_of_the_users_bundles(tiny: Any, monkeypatch: Any, tmp_path: Path):
    """Or `run` would find several bundles of the model from then on."""
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    checkpoint = Checkpoint(str(tiny.checkpoint))
    own, other = checkpoint.size(None), (96, 96)
    usual = tmp_path / "bundles"
    assert bench.folder_of(checkpoint, "fp32", own).parent == usual
    assert bench.folder_of(checkpoint, "fp32", other).parent == tmp_path / "bench"
    there = usual / bench.folder_of(checkpoint, "fp32", other).name
    there.mkdir(parents=True)
    assert bench.folder_of(checkpoint, "fp32", other) == there  # the user has that size: it is measured


def test_a_child_loads_no_pytorch_for_the_runtime():
    """Or cold starts and memory would be PyTorch's."""
    code = "import sys, cnpp_trt.benchmarks.latency.worker; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_environment_tells_nothing_private():
    found = environment(2)
    text = json.dumps(found)
    assert platform.node() not in text or len(platform.node()) < 4
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert found["versions"]["numpy"] == np.__version__ and found["threads"] == 2
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_pipeline_is_not_needed_to_list(tiny: Any):
    """A bundle without its checkpoint: PyTorch is listed with the reason, and the rest competes."""
    settings = bench.BenchSettings(contenders=("pytorch", "onnxruntime-cpu"))
    size = tiny.pipeline.bundle.manifest.width, tiny.pipeline.bundle.manifest.height
    opened = Pipeline.open(tiny.bundle, "onnxruntime-cpu").bundle
    found = dict(bench._worker_configs("cpu", settings, {size: opened}, None, {}, 1))
    by_name = {spec.name: config for spec, config in found.items()}
    assert "--model" in str(by_name["pytorch"]) and isinstance(by_name["pytorch"], str)
    assert isinstance(by_name["onnxruntime-cpu"], contenders.WorkerConfig)


def test_what_needs_a_quantized_bundle_takes_the_one_that_was_made_of_it(tiny: Any, monkeypatch: Any, tmp_path: Path):
    from cnpp_trt.quantization.quantizer import QuantizationSettings, quantize_bundle

    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    opened, spec = Bundle.open(tiny.bundle), contenders.BY_NAME["openvino-int8"]
    with pytest.raises(
        CnppError, match=r"^no bundle in int8: make it with cnpp-trt quantize --precision int8 --bundle "
    ):
        bench._bundle_for(spec, opened)
    quantized = quantize_bundle(opened, None, QuantizationSettings("int8", requests=1, launches=1, measured=0, steps=2))
    assert bench._bundle_for(spec, opened).folder == quantized.folder
    assert bench._bundle_for(contenders.BY_NAME["openvino"], opened) is opened
    with pytest.raises(CnppError, match="needs a bundle in fp32, and this one is int8"):
        bench._bundle_for(contenders.BY_NAME["openvino"], quantized)

    # It has the one size: a benchmark of several compares it in the base case.
    settings = bench.BenchSettings(contenders=("onnxruntime-cpu", "openvino-int8", "openvino-int8-bf16"))
    sizes = {tiny.size: opened, (96, 96): opened}
    found = bench._worker_configs("cpu", settings, sizes, None, {}, 1)
    configs = {c.name: c for _, c in found if isinstance(c, contenders.WorkerConfig)}
    assert configs["openvino-int8"].bundles == {"{}x{}".format(*tiny.size): quantized.folder}
    assert len(configs["onnxruntime-cpu"].bundles) == 2
    request = next(make_requests(tiny.pipeline, "seg", [0], num_inference_steps=2))
    contender: Any = configs["openvino-int8-bf16"].open()
    assert contender._pipeline.bundle.folder == quantized.folder
    assert contender._pipeline.precision == "int8-bf16"
    assert contender.generate(request).std() > 1

    manifest = quantized.folder / "manifest.json"
    other = Manifest.loads(manifest.read_text())
    other.base = "0" * 64
    manifest.write_text(other.dumps())
    with pytest.raises(CnppError, match="is of other weights: delete it, and make it again with cnpp-trt quantize"):
        bench._bundle_for(spec, opened)


def test_those_that_are_only_named_are_not_asked_unnamed(tiny: Any):
    opened = Bundle.open(tiny.bundle)
    found = bench._worker_configs("cpu", bench.BenchSettings(), {tiny.size: opened}, None, {}, 1)
    names = {spec.name for spec, _ in found}
    assert "openvino-bf16" in names and names.isdisjoint({"openvino-int8", "stable-diffusion-cpp"})
