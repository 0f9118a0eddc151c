"""On a GPU: every backend against the CPU, what it needs and leaves behind, and which GPUs TensorRT takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from cnpp_trt import Pipeline
from cnpp_trt.benchmarks.parity.measure import compare_images, generate
from cnpp_trt.benchmarks.report.fidelity import image_table, worst_psnr
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.gpu import Gpu
from cnpp_trt.runtime.control.consistency import score
from requested import controls_of

pytestmark = pytest.mark.timeout(1800)  # the first test of each backend exports and builds

# What cuMemAlloc takes from the driver at a time: parts of one may have been free before.
CHUNK = 2 << 20


@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt-rtx"])
def test_which_gpu_this_is_and_whether_tensorrt_takes_it(gpu, try_flavor, report, flavor):
    """Passes either way: it is there to be read."""
    tried = try_flavor(flavor)
    report(f"{gpu.name}, compute capability {gpu.sm}, driver for CUDA {gpu.cuda}, {gpu.memory / 2**30:.0f} GiB")
    name = f"{flavor} {tried.version}".strip()
    report(f"{name}: refused: {tried.refusal}" if tried.refusal else f"{name}: plan loaded and accepted")
    assert isinstance(gpu, Gpu)
    assert "\n" not in tried.refusal


# --- pictures


def compare(reference, candidate, condition, count):
    """Fresh scenes on both sides: how far apart the images are, and the mean consistency score of either side."""
    requests = list(make_requests(reference, condition, range(count)))
    sides = [list(generate(side, requests)) for side in (reference, candidate)]
    scores = [
        np.mean([
            score(condition, controls_of(request)[0].pixels, reference.extract(condition, image)).value
            for request, image in zip(requests, images, strict=True)
        ])
        for images in sides
    ]  # fmt: skip
    return compare_images(condition, sides[0], sides[1]), *scores


@pytest.mark.parametrize("condition", list(CONDITIONS))
def test_onnxruntime_cuda_draws_the_cpus_images(reference, cuda, report, condition):
    found, *scores = compare(reference, cuda, condition, 16)
    report(f"onnxruntime-cuda fp32\n{image_table([found]).markdown()}\nconsistency of the CPU's and of these: {scores}")
    assert max(found["max_difference"]) <= 2


@pytest.mark.parametrize("condition", list(CONDITIONS))
def test_tensorrt_fp16_is_near_the_cpu_in_fp32(reference, tensorrt, report, condition):
    found, expected, score_ = compare(reference, tensorrt, condition, 64)
    images = f"{tensorrt.backend.name} fp16\n{image_table([found]).markdown()}"
    report(f"{images}\nconsistency of the CPU's and of these: {expected}, {score_}")
    assert worst_psnr([found]) >= 35
    assert abs(score_ - expected) <= (0.005 if CONDITIONS[condition].metric == "SSIM" else 0.5)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmpp_2m_karras", "lcm"])
def test_every_sampler_and_several_controls(fp32, pipeline, ask, scheduler):
    """Between a fp16 and a fp32 image there are levels, not objects: only LCM's own noise and few steps widen that."""
    wanted = ask("seg", "depth", scheduler=scheduler, num_images_per_prompt=2, steps=8, scale=0.5)
    exact = Pipeline.open(fp32, "onnxruntime-cpu")(wanted)
    found = pipeline(wanted)
    assert found.notes == ()
    difference = np.abs(found.images.astype(int) - exact.images)
    assert difference.max() <= 2 if pipeline.bundle.manifest.precision == "fp32" else difference.mean() <= 2


@pytest.mark.parametrize("condition", ["seg", "depth"])
def test_extractors(reference, pipeline, condition):
    """They are fp32 in every bundle."""
    for condition_image in range(4):
        photo = np.random.default_rng(condition_image).integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        exact, found = reference.extract(condition, photo), pipeline.extract(condition, photo)
        assert (
            (exact == found).all(-1).mean() > 0.97
            if condition == "seg"
            else np.abs(exact - found.astype(int)).mean() < 1
        )


def test_the_same_request_gives_the_same_bytes(pipeline, ask):
    """The first is launched one by one, the second records, all others replay; another request comes in between."""
    for wanted in (ask("seg"), ask("seg", "depth", guidance_scale=1.0, num_images_per_prompt=2)):
        first = pipeline(wanted)
        for _ in range(4):
            again = pipeline(wanted)
            assert np.array_equal(first.images, again.images)
            assert np.array_equal(first.latents, again.latents)
            pipeline(ask("depth", seed=99, image=3))


def test_a_new_pipeline_gives_the_same_bytes(open_any, ask):
    first, second = open_any()(ask()), open_any()(ask())
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.latents, second.latents)


def test_auto_takes_tensorrt_where_there_are_plans(open_tensorrt, ask):
    bundle, _, plans = open_tensorrt.arguments
    pipeline = Pipeline.open(bundle, "auto", plans=plans)
    assert pipeline.backend.name in ("tensorrt", "tensorrt-rtx")
    assert pipeline.reason.startswith("on ")


# --- starting and leaving

USED = {"text_encoder", "text_kv", "time_embeds", "unet", "update", "vae_decoder"}
USED |= {"hint_seg", "text_kv_seg", "time_embeds_seg", "controlnet_seg"}


def test_memory_by_part_and_no_pytorch(open_any, python, report):
    found = json.loads(python("gpu_start", *open_any.arguments))
    parts = found["parts"]
    report(f"{open_any.arguments[1]}: {parts} bytes by part, {found['taken']} taken from the device")
    assert parts
    assert all(size > 0 for size in parts.values())
    assert sum(parts.values()) <= found["taken"] + CHUNK
    assert found["modules"] == []


def test_a_second_process_finds_what_the_first_compiled(open_tensorrt, python, report):
    """TensorRT-RTX compiles a plan for this GPU when it first runs, and keeps that in a file beside the plan."""
    if open_tensorrt().backend.name != "tensorrt-rtx":
        pytest.skip("TensorRT compiles when it builds: there is nothing to keep")
    folder = Path(open_tensorrt.arguments[2])
    for cache in folder.glob("*/runtime-*.cache"):
        cache.unlink()
    first = json.loads(python("gpu_start", *open_tensorrt.arguments))
    assert first["found"].keys() == USED
    assert not any(first["found"].values())
    kept = {file.parent.name.rpartition("-")[0]: file.stat().st_size for file in folder.glob("*/runtime-*.cache")}
    assert kept.keys() == USED
    second = json.loads(python("gpu_start", *open_tensorrt.arguments))
    assert second["found"] == kept
    for name, process in (("first", first), ("second", second)):
        report(f"{name} process: ready in {process['prepared']:.2f} s, two images in {process['drawn']:.2f} s")
