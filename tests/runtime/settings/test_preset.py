"""Preset files: what they set, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request, RuntimeOptions
from cnpp_trt.batch.rows import RowReader, request_of
from cnpp_trt.errors import UserError
from cnpp_trt.miniature import PRESETS
from cnpp_trt.runtime.output.metadata import read_record
from cnpp_trt.runtime.settings.preset import Evidence, Levers, Preset, Span, TunedModel, read_preset, read_presets
from cnpp_trt.schema import to_json
from msgspec.structs import replace
from PIL import Image

LEVERS = Levers(
    num_inference_steps=4,
    scheduler="dpmpp_2m",
    timestep_spacing="ays",
    guidance_end=0.5,
    control_guidance_end=0.75,
    controlnet_interval=2,
)


def preset_of(model: Any, condition: str = "seg") -> Preset:
    span = Span(value=0.5, low=0.1, high=0.9)
    evidence = Evidence(
        budget=1.0,
        metric="mIoU",
        loss=span,
        exact=90.0,
        tuned=89.5,
        prompts=96,
        psnr=30.0,
        speedup=Span(value=3.0, low=2.5, high=3.5),
        predicted_speedup=3.1,
        backend="onnxruntime-cpu",
        exact_levers=Levers(num_inference_steps=20, scheduler="unipc"),
        command="cnpp-trt tune",
    )
    tuned = TunedModel.of(model.pipeline.bundle, condition)
    return Preset(version="0.2.0", model=tuned, condition=condition, levers=LEVERS, evidence=evidence)


@pytest.fixture
def file(tiny: Any, tmp_path: Path) -> Path:
    path = tmp_path / "seg.json"
    path.write_text(to_json(preset_of(tiny)))
    return path


@pytest.fixture
def drawing(tiny: Any) -> Pipeline:
    """The tiny model with a preset for `seg`; nothing is loaded before it draws."""
    return Pipeline(tiny.pipeline.bundle, tiny.pipeline.backend, presets=(preset_of(tiny),))


def control(model: Any, condition: str = "seg", **fields: Any) -> Control:
    width, height = model.size
    return Control(condition, np.zeros((height, width, 3), np.uint8), **fields)


def test_a_file_holds_the_preset(tiny, file):
    assert read_preset(file) == preset_of(tiny)


def test_a_preset_decides_what_is_left_open(tiny, drawing):
    found = drawing.resolve(Request("a", controls=control(tiny)))
    assert (found.num_inference_steps, found.scheduler, found.timestep_spacing) == (4, "dpmpp_2m", "ays")
    assert (found.guidance_start, found.guidance_end, found.controlnet_interval) == (0.0, 0.5, 2)
    assert found.guidance_scale == drawing.defaults.guidance_scale
    assert (found.controls[0].control_guidance_start, found.controls[0].control_guidance_end) == (0.0, 0.75)


def test_what_a_request_says_counts(tiny, drawing):
    own = control(tiny, control_guidance_end=0.5)
    found = drawing.resolve(Request("a", controls=own, num_inference_steps=9, scheduler="ddim", guidance_end=1.0))
    assert (found.num_inference_steps, found.scheduler, found.guidance_end) == (9, "ddim", 1.0)
    assert found.timestep_spacing is None  # one of the preset's scheduler
    assert found.controls[0].control_guidance_end == 0.5


@pytest.mark.parametrize("conditions", [(), ("depth",), ("seg", "depth")])
def test_other_requests_are_exact(tiny, drawing, conditions):
    request = Request("a", controls=[control(tiny, c) for c in conditions], seed=1)
    plain, found = tiny.pipeline.resolve(request), drawing.resolve(request)
    same = ("num_inference_steps", "scheduler", "timestep_spacing", "guidance_end", "controlnet_interval")
    assert [getattr(found, name) for name in same] == [getattr(plain, name) for name in same]


def test_images_are_those_of_the_same_settings(tiny, drawing):
    fields: dict[str, Any] = {"timestep_spacing": "ays", "guidance_end": 0.5, "controlnet_interval": 2, "seed": 3}
    said = Request(
        "a", controls=control(tiny, control_guidance_end=0.75), num_inference_steps=4, scheduler="dpmpp_2m", **fields
    )
    found = drawing(Request("a", controls=control(tiny), seed=3))
    np.testing.assert_array_equal(found.images, tiny.pipeline(said).images)


OTHER = [
    ({"base": "0" * 64}, "other weights"),
    ({"controlnet": "0" * 64}, "other weights"),
    ({"precision": "fp16"}, "the precision fp32 instead of fp16"),
    ({"width": 1024}, "64x64 pixels instead of 1024x64"),
]


@pytest.mark.parametrize(("other", "why"), OTHER)
def test_a_preset_of_another_bundle_is_refused(tiny, other, why):
    preset = preset_of(tiny)
    foreign = replace(preset, model=replace(preset.model, **other))
    with pytest.raises(UserError, match=f"^the preset for seg is of tiny-\\w+, and the bundle .* has {why}: find one "):
        Pipeline.open(tiny.bundle, presets=(foreign,))


def test_another_export_of_the_same_weights_is_the_same_model(tiny):
    preset = preset_of(tiny)
    assert Pipeline.open(tiny.bundle, presets=(replace(preset, model=replace(preset.model, bundle="0" * 64)),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "edges"}, "unknown condition"),
        ({"format": 2}, "it has the format 2, not 1: tune again with this version"),
        ({"more": 1}, "unknown field `more`"),
        ({"levers": {"num_inference_steps": 0, "scheduler": "ddim"}}, "num_inference_steps"),
        ({"levers": {"num_inference_steps": 4, "scheduler": "magic"}}, "unknown scheduler"),
        (
            {"levers": {"num_inference_steps": 4, "scheduler": "ddim", "guidance_end": 0.0}},
            "guidance_start must be below",
        ),
    ],
)
def test_a_file_that_is_no_preset_is_refused(file, change, message):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as caught:
        read_preset(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_says_where_presets_come_from(tmp_path):
    with pytest.raises(UserError, match=r"^there is no preset .*none.json: find one with `cnpp-trt tune`"):
        read_presets([tmp_path / "none.json"])


def test_two_presets_for_one_condition_are_refused(file):
    with pytest.raises(UserError, match=r"^two presets are for seg of tiny-\w+: give one"):
        read_presets([file, file])


def test_nothing_is_shipped_for_other_models(tiny):
    with pytest.raises(UserError, match=r"^no preset is shipped for "):
        read_presets(["shipped"], tiny.pipeline.bundle)


def test_rows_of_a_job_are_decided_by_a_preset(tiny, drawing, tmp_path):
    Image.fromarray(np.zeros((*tiny.size[::-1], 3), np.uint8)).save(tmp_path / "map.png")
    reader = RowReader(tiny.pipeline.bundle, lambda _: tmp_path, (preset_of(tiny),))
    job = reader.read({"prompt": "a", "condition": "seg", "image": "map.png", "seed": 1}, tmp_path)
    wanted = drawing.resolve(Request("a", controls=control(tiny), seed=1))
    assert job.settings["num_inference_steps"] == 4 and job.settings["guidance_end"] == 0.5
    assert job.controls[0].settings["control_guidance_end"] == 0.75
    drawn = tiny.pipeline.resolve(request_of(job, lambda _, pixels: pixels))  # a worker has no presets
    same = ("num_inference_steps", "scheduler", "timestep_spacing", "guidance_end", "controlnet_interval", "seed")
    assert [getattr(drawn, name) for name in same] == [getattr(wanted, name) for name in same]
    exact = reader.read({"prompt": "a", "condition": "depth", "image": "map.png"}, tmp_path)
    assert exact.settings["controlnet_interval"] == 1


def test_a_server_gives_each_model_its_own_presets(tiny):
    pytest.importorskip("fastapi")
    from cnpp_trt.service.service import Service

    preset = preset_of(tiny)
    service = Service.open([tiny.bundle], [RuntimeOptions("onnxruntime-cpu", threads=1, presets=(preset,))])
    plan = service.models.default.plan(Request("a", controls=control(tiny), seed=1))
    assert plan.request.num_inference_steps == 4
    foreign = replace(preset, model=replace(preset.model, base="0" * 64))
    with pytest.raises(UserError, match="other weights"):
        Service.open([tiny.bundle], [RuntimeOptions("onnxruntime-cpu", threads=1, presets=(foreign,))])


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_preset_is_of_an_embedded_model(miniature, path):
    preset = read_preset(path)
    assert path.stem == f"{preset.model.name}-{preset.condition}"
    assert preset.evidence.loss.high <= preset.evidence.budget == 1.0
    assert preset.model.name != "miniature" or not preset.model.difference(
        miniature.pipeline.bundle.manifest, preset.condition
    )


@pytest.mark.slow
def test_run_draws_with_a_preset_and_the_picture_says_so(script, tiny, file, tmp_path):
    Image.fromarray(np.zeros((*tiny.size[::-1], 3), np.uint8)).save(tmp_path / "map.png")
    options = ("--bundle", tiny.bundle, "--image", tmp_path / "map.png", "--preset", file, "--out", tmp_path / "out")
    ended = script("run", "--cond", "seg", "--prompt", "a", *options)
    assert ended.returncode == 0, ended.stderr
    said = read_record(tmp_path / "out/run-0001/image-0.png").request
    assert (said.num_inference_steps, said.timestep_spacing, said.controlnet_interval) == (4, "ays", 2)
    repeated = script("run", "--repeat", tmp_path / "out/run-0001/image-0.png", *options[:2], "--out", tmp_path / "out")
    assert "the pixels are the same" in repeated.stderr
    refused = script("run", "--cond", "depth", *options)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1] == "error: --preset is for seg, not depth: give --cond seg"
