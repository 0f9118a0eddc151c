"""Scores against scikit-learn's, intervals against SciPy's; a study that was killed, sharded or resumed is the same."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.benchmarks.consistency import generating
from cnpp_trt.benchmarks.consistency import scores as consistency_scores
from cnpp_trt.benchmarks.consistency import study as consistency
from cnpp_trt.benchmarks.consistency.command import ConsistencySettings, measure_consistency
from cnpp_trt.benchmarks.consistency.dataset import Folder
from cnpp_trt.benchmarks.consistency.generating import generate
from cnpp_trt.benchmarks.consistency.scores import score_systems, scores, summarize
from cnpp_trt.benchmarks.consistency.shards import Shard
from cnpp_trt.benchmarks.consistency.study import Study, counts, read_pictures, sampling_config
from cnpp_trt.benchmarks.result import read_result
from cnpp_trt.benchmarks.statistics import resampling_weights
from cnpp_trt.benchmarks.systems import other_systems, subject_system
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.control.consistency import score
from cnpp_trt.runtime.control.palette import colors_from_labels
from cnpp_trt.runtime.output.metadata import pixels_sha256
from PIL import Image
from scipy.stats import bootstrap
from sklearn.metrics import f1_score, jaccard_score

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "cnpp-trt"
PROMPTS = 6


# --- scores from records


def record_of(condition: str, given: np.ndarray, found: list[np.ndarray]) -> dict[str, Any]:
    of_images = [score(condition, given, image).value for image in found]
    return {"scores": of_images, "counts": json.loads(json.dumps(counts(condition, given, found)))}


def maps(condition: str, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A condition and three that resemble it, each prompt more or less."""
    rng = np.random.default_rng(seed)
    shape, noise = (24, 24), 0.1 + 0.8 * rng.random()
    if condition == "seg":
        values = rng.integers(seed % 3, seed % 3 + 4, shape)
    elif condition == "canny":
        values = 255 * (rng.random(shape) < 0.3)
    else:
        values = rng.integers(0, 256, shape)
    others = [
        np.where(rng.random(shape) < noise, rng.permutation(values.ravel()).reshape(shape), values) for _ in "123"
    ]
    paint = colors_from_labels if condition == "seg" else lambda v: np.repeat(v.astype(np.uint8)[..., None], 3, 2)
    return paint(values), [paint(other) for other in others]


def test_miou_pools_every_pixel_of_the_data():
    given, found = zip(*(maps("seg", seed) for seed in range(8)), strict=True)
    records = [record_of("seg", g, f) for g, f in zip(given, found, strict=True)]
    # Whatever names the classes: colors do.
    truth = np.concatenate([np.repeat(g[None], 3, 0).reshape(-1, 3) for g in given]) @ [65536, 256, 1]
    guess = np.concatenate([np.stack(f).reshape(-1, 3) for f in found]) @ [65536, 256, 1]
    expected = 100 * jaccard_score(truth, guess, average="macro")
    assert scores("mIoU", records, np.ones((1, 8)))[0] == pytest.approx(expected, abs=1e-9)
    # A resample is the data set with some prompts twice and others not at all.
    weights = resampling_weights(8, seed=1, resamples=5)
    for row, value in zip(weights, scores("mIoU", records, weights.astype(float)), strict=True):
        times = np.repeat(row, 3 * 24 * 24)
        expected = 100 * jaccard_score(np.repeat(truth, times), np.repeat(guess, times), average="macro")
        assert value == pytest.approx(expected, abs=1e-9)


def test_f1_pools_the_images_of_a_prompt():
    pairs = [maps("canny", seed) for seed in range(8)]
    records = [record_of("canny", given, found) for given, found in pairs]
    of_prompts = [
        100 * f1_score(np.tile(given[..., 0].ravel() > 0, 3), np.stack(found)[..., 0].ravel() > 0)
        for given, found in pairs
    ]
    assert scores("F1", records, np.ones((1, 8)))[0] == pytest.approx(np.mean(of_prompts))
    of_images = [s for r in records for s in r["scores"]]
    assert np.mean(of_images) != pytest.approx(np.mean(of_prompts), abs=1e-6)


@pytest.mark.parametrize(("condition", "metric"), [("hed", "SSIM"), ("lineart", "SSIM"), ("depth", "RMSE")])
def test_others_are_averaged_over_images(condition, metric):
    pairs = [maps(condition, seed) for seed in range(5)]
    records = [record_of(condition, given, found) for given, found in pairs]
    expected = np.mean([score(condition, given, image).value for given, found in pairs for image in found])
    assert scores(metric, records, np.ones((1, 5)))[0] == pytest.approx(expected)
    assert all(record["counts"] == {} for record in records)


def test_nothing_to_find_and_nothing_found():
    black = np.zeros((24, 24, 3), np.uint8)
    for condition, metric in (("seg", "mIoU"), ("canny", "F1")):
        assert scores(metric, [record_of(condition, black, [black])], np.ones((1, 1)))[0] == 100


def test_intervals_are_scipys():
    rng = np.random.default_rng(3)
    first = rng.gamma(2, 10, 40)
    second = first + rng.normal(1, 3, 40)
    systems = {
        name: [{"scores": [v - 1, v + 1], "counts": {}} for v in values]
        for name, values in (("deployed", first), ("other", second))
    }
    intervals, (difference,) = score_systems("RMSE", systems)
    assert (difference["of"], difference["minus"]) == ("deployed", "other")
    for found, values in ((intervals["deployed"], first), (intervals["other"], second), (difference, first - second)):
        theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
        wide = theirs.high - theirs.low
        assert found["value"] == pytest.approx(np.mean(values))
        assert found["low"] == pytest.approx(theirs.low, abs=0.05 * wide)
        assert found["high"] == pytest.approx(theirs.high, abs=0.05 * wide)
    # Paired: what prompts have in common is not in it.
    assert difference["high"] - difference["low"] < (intervals["other"]["high"] - intervals["other"]["low"]) / 2


def test_a_side_against_itself_differs_by_nothing():
    records = [record_of("seg", *maps("seg", seed)) for seed in range(4)]
    _, (difference,) = score_systems("mIoU", {"deployed": records, "other": records})
    assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)


# --- the sampling


def test_the_papers_protocol_is_the_default(tiny, miniature):
    assert sampling_config(tiny.pipeline.bundle.manifest) == consistency.SamplingConfig(
        4, "worst quality, low quality", 20, 7.5, "unipc"
    )
    manifest = miniature.pipeline.bundle.manifest
    own = sampling_config(manifest, 2)
    assert (own.images, own.negative_prompt, own.guidance_scale) == (2, "", manifest.defaults["guidance_scale"])
    asked = sampling_config(manifest, 1, "ugly", 3, 1.0, "ddim")
    assert asked == consistency.SamplingConfig(1, "ugly", 3, 1.0, "ddim")


# --- a study


@pytest.fixture
def study(canny, photos, tmp_path) -> Callable[..., Study]:
    """`study("out")`: six prompts of two images on a tiny model, recorded in that folder."""
    data = photos(PROMPTS)
    checkpoint, pipeline = canny

    def make(out: str, against: tuple[str, ...] = (), count: int | None = None, **fields: Any) -> Study:
        sampling = sampling_config(pipeline.bundle.manifest, **{"images": 2, "steps": 2, **fields})
        systems = other_systems(
            against, pipeline, lambda f: Pipeline.open(f, "onnxruntime-cpu", threads=1), str(checkpoint), None, 1
        )
        folder = Folder(data, pipeline, ["canny"], count)
        return Study(pipeline, [subject_system(pipeline), *systems], folder, ["canny"], sampling, tmp_path / out)

    return make


def finished(study: Study, *shards: str) -> dict[str, Any]:
    for shard in shards or ("1/1",):
        generate(study, Shard.parse(shard))
    assert not any(study.pending(system, condition) for system, condition in study.parts())
    return json.loads(json.dumps(summarize(study)))


def test_records_hold_what_was_drawn(study, canny):
    made = study("out")
    found = finished(made)
    records = made.records(made.systems[0], "canny")
    assert list(records) == [f"photo {i}" for i in range(PROMPTS)]
    for index, record in enumerate(records.values()):
        assert record["seeds"] == [2 * index, 2 * index + 1]
        request = made.request("canny", index)
        assert (request.prompt, request.negative_prompt) == (f"{index} blocks", consistency.NEGATIVE_PROMPT)
        images = canny[1](request).images
        given = made.data.control(index, "canny")
        assert record["pixels"] == [pixels_sha256(image) for image in images]
        assert record["scores"] == [score("canny", given, canny[1].extract("canny", i)).value for i in images]
    (row,) = found["conditions"]
    assert (row["metric"], row["prompts"], row["images"]) == ("F1", PROMPTS, 2 * PROMPTS)
    assert row["scores"]["deployed"]["low"] <= row["scores"]["deployed"]["value"] <= row["scores"]["deployed"]["high"]
    assert found["systems"] == {"deployed": f"{canny[1].bundle.manifest.model}, fp32 on onnxruntime-cpu"}
    (sheet,) = found["sheets"]
    assert len(sheet["png"]) <= 102_400
    picture = Image.open(io.BytesIO(base64.b64decode(sheet["png"])))
    assert picture.format == "PNG" and picture.width > 2 * 64 and picture.height > 3 * 64


def test_sharded_in_any_order_is_the_same(study, logged):
    whole = finished(study("whole"))
    parts = study("parts")
    generate(parts, Shard.parse("3/3"))
    logged()
    partial = summarize(parts)
    assert partial["conditions"][0]["prompts"] == 2
    assert logged() == ["deployed, canny: 4 of 6 prompts are still missing"]
    generate(parts, Shard.parse("1/3"))
    assert finished(parts, "2/3") == whole
    files = sorted(p.name for p in parts.place(parts.systems[0], "canny").glob("*.jsonl"))
    assert files == [f"records-{i}of3.jsonl" for i in (1, 2, 3)]
    logged()
    generate(parts, Shard())  # nothing is left for a run without shards
    assert logged() == []


def test_more_prompts_go_on_from_fewer(study, logged):
    finished(study("out", count=2))
    logged()
    generate(study("out"), Shard())
    [line] = logged()
    assert line.startswith("deployed, canny: 4 of 4 prompts")
    assert summarize(study("out")) == summarize(study("out", count=6))
    assert summarize(study("out", count=2))["conditions"][0]["prompts"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3}, "num inference steps 2 instead of 3"),
        ({"images": 1}, "images 2 instead of 1"),
        ({"negative_prompt": ""}, "negative prompt 'worst quality, low quality' instead of ''"),
        ({"guidance_scale": 2.0}, "guidance scale 7.5 instead of 2.0"),
        ({"scheduler": "ddim"}, "scheduler 'unipc' instead of 'ddim'"),
    ],
)
def test_other_settings_are_refused(study, fields, message):
    generate(study("out", count=1), Shard())
    with pytest.raises(UserError, match=f"records-1of1.jsonl was made with {message}: .*--fresh"):
        generate(study("out", count=1, **fields), Shard())


def test_other_data_and_bundles_are_refused(study, tmp_path, canny):
    made = study("out", count=1)
    generate(made, Shard())
    prompts = tmp_path / "photos" / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("3 blocks", "4 blocks"))
    with pytest.raises(UserError, match="was made with data '"):
        generate(replace(made, data=Folder(prompts.parent, canny[1], ["canny"])), Shard())
    other = Bundle(canny[1].bundle.folder, replace(canny[1].bundle.manifest, base="another"))
    deployed = Pipeline(other, canny[1].backend)
    with pytest.raises(UserError, match=r"generated by .* judged by "):
        generate(replace(made, deployed=deployed, systems=[subject_system(deployed)]), Shard())


def test_against_pytorch_and_a_bundle(study, canny, tmp_path):
    copy = shutil.copytree(canny[1].bundle.folder, tmp_path / "copy")
    found = finished(study("out", against=("pytorch", "pytorch-fp16", str(copy))))
    assert list(found["systems"]) == ["deployed", "pytorch", "pytorch-fp16", "copy"]
    (row,) = found["conditions"]
    pytorch, half, same = row["differences"]
    assert (pytorch["minus"], half["minus"], same["minus"]) == ("pytorch", "pytorch-fp16", "copy")
    assert row["scores"]["pytorch-fp16"] != row["scores"]["pytorch"]
    assert row["scores"]["copy"] == row["scores"]["deployed"]
    assert (same["low"], same["value"], same["high"]) == (0, 0, 0)
    assert pytorch["low"] <= 0 <= pytorch["high"]
    assert abs(pytorch["value"]) < 1


def test_sides_that_cannot_be_had(canny, tmp_path, monkeypatch):
    checkpoint, pipeline = canny
    other = make_checkpoint(tmp_path / "other", tiny=True, conditions=("canny",), seed=1)

    def systems(*names: str, model: str | None = str(checkpoint)) -> list[Any]:
        return other_systems(names, pipeline, lambda f: Pipeline.open(f, "onnxruntime-cpu", threads=1), model)

    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"no bundle of 'sd15' .*`cnpp-trt export --model sd15"):
        systems("sd15")
    with pytest.raises(UserError, match="say where it is with --model PATH"):
        systems("pytorch", model=None)
    with pytest.raises(UserError, match="its weights are others"):
        systems("pytorch", model=str(other))
    named = shutil.copytree(pipeline.bundle.folder, tmp_path / "deployed")
    with pytest.raises(UserError, match="two systems are called 'deployed': rename"):
        systems(str(named))
    assert [s.name for s in systems("pytorch", "pytorch", "pytorch-fp16")] == ["pytorch", "pytorch-fp16"]


def test_a_condition_that_a_side_lacks_is_left_out(study, tiny, canny, logged):
    made = study("out", count=1)
    lacking = replace(made.systems[0], name="lacking", conditions=("seg",))
    both = replace(made, systems=[made.systems[0], lacking])
    generate(both, Shard())
    assert "lacking has no canny: left out" in logged()
    (row,) = summarize(both)["conditions"]
    assert (list(row["scores"]), row["differences"]) == (["deployed"], [])
    with pytest.raises(UserError, match="no extractor for 'seg' to judge images by"):
        replace(made, deployed=tiny.pipeline, conditions=["seg"])


def test_pictures_are_kept_for_fid_and_checked(study):
    made = replace(study("out", count=2), keep_pictures=True)
    generate(made, Shard())
    (system,) = made.systems
    kept = dict(read_pictures(made, system, "canny"))
    records = list(made.records(system, "canny").values())
    assert [[pixels_sha256(image) for image in kept[i]] for i in range(2)] == [r["pixels"] for r in records]
    seconds = dict(read_pictures(made, system, "canny", slice(1, 2)))
    np.testing.assert_array_equal(seconds[1][0], kept[1][1])

    path = made.pictures(system, "canny", 1)[0]
    Image.fromarray(255 - kept[1][0]).save(path)
    with pytest.raises(UserError, match=r"1-0.png is not the picture that was judged: delete it"):
        list(read_pictures(made, system, "canny"))
    path.unlink()
    assert made.pending(system, "canny") == [1]
    generate(made, Shard())
    np.testing.assert_array_equal(dict(read_pictures(made, system, "canny"))[1][0], kept[1][0])


def test_a_sheet_of_the_largest_pictures_is_small():
    noise = list(np.random.default_rng(0).integers(0, 256, (4, 512, 768, 3), np.uint8))
    request = Request("noise", "", Control("depth", noise[0]), seed=3, num_images_per_prompt=4)
    encoded = generating.encode_sheet(request.resolve(SamplingDefaults()), noise, noise, ["RMSE 0.00"] * 4)
    assert len(encoded) <= generating.SHEET_BYTES
    width, height = Image.open(io.BytesIO(encoded)).size
    assert 2 * 256 < width < height


def test_weights_start_with_every_prompt_once():
    weights = consistency_scores._weights(7)
    np.testing.assert_array_equal(weights[0], np.ones(7))
    np.testing.assert_array_equal(weights.sum(1), np.full(len(weights), 7))


# --- the command


@pytest.fixture
def arguments(canny, photos, tmp_path):
    """Of the command, for so many prompts; results go under tmp_path/home."""
    checkpoint, pipeline = canny

    def make(data: Path, out: str, *more: Any) -> list[str]:
        fixed = [
            "consistency",
            "--bundle",
            pipeline.bundle.folder,
            "--model",
            checkpoint,
            "--backend",
            "onnxruntime-cpu",
        ]
        fixed += ["--threads", 1, "--data", data, "--images", 2, "--steps", 2, "--out", tmp_path / out]
        return [str(a) for a in (*fixed, *more)]

    return make


def result_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("consistency-*.json")
    return json.loads(path.read_text())


def test_killed_and_resumed_is_the_same(command, arguments, canny, photos, tmp_path, monkeypatch):
    data = photos(30)
    home = tmp_path / "home"
    environment = {**os.environ, "CNPP_TRT_HOME": str(home)}
    monkeypatch.setenv("CNPP_TRT_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    records = tmp_path / "killed" / "deployed" / "canny" / "records-1of1.jsonl"
    process = subprocess.Popen([SCRIPT, *arguments(data, "killed")], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 100
        while not (records.is_file() and records.read_bytes().count(b"\n") > 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = records.read_bytes().count(b"\n") - 1
    assert 5 <= done < 30, "the process was killed too late to see anything"
    assert not list((tmp_path / "killed").glob("*.json"))  # no result of a part
    with records.open("ab") as file:
        file.write(b'{"id": "photo 2')  # and in the middle of a line

    resumed = command(*arguments(data, "killed", "--json"))
    assert resumed.status == 0, resumed.err
    assert f"deployed, canny: {30 - done} of {30 - done} prompts" in resumed.err
    after_kill = json.dumps(result_of(tmp_path / "killed")["data"])
    uninterrupted = command(*arguments(data, "uninterrupted"))
    assert uninterrupted.status == 0, uninterrupted.err
    result = result_of(tmp_path / "uninterrupted")
    assert json.dumps(result["data"]) == after_kill
    shown = json.loads(resumed.out)
    assert {k: v for k, v in shown.items() if k != "result"} == {
        k: v for k, v in result["data"].items() if k != "sheets"
    }
    assert "| canny | F1 ↑ | 30 | 60 |" in uninterrupted.out
    assert str(tmp_path) not in json.dumps(result)
    name = canny[1].bundle.manifest.model
    assert result["command"] == (
        f"cnpp-trt consistency --model {name} --precision fp32 --backend onnxruntime-cpu --cond canny "
        "--data photos --prompts 30 --images 2 --steps 2 --guidance-scale 7.5 --scheduler unipc"
    )

    refusal = command(*arguments(data, "killed", "--steps", 3))
    assert refusal.status == 2 and "num inference steps 2 instead of 3" in refusal.err.splitlines()[-1]
    again = command(*arguments(data, "killed", "--steps", 3, "--prompts", 1, "--fresh"))
    assert again.status == 0 and "deployed, canny: 1 of 1 prompts" in again.err


def test_the_command_refuses(refused, arguments, photos, tmp_path):
    data = photos(1)
    assert "--fresh would remove what other shards generate" in refused(
        *arguments(data, "o", "--fresh", "--shard", "1/2")
    )
    assert "cannot read --shard '3/2'" in refused(*arguments(data, "o", "--shard", "3/2"))
    assert "no condition 'seg'" in refused(*arguments(data, "o", "--cond", "seg"))
    assert "there is no " in refused(*arguments(tmp_path, "o"))
    assert "--fid" in refused(*arguments(data, "o", "--fid", tmp_path / "nowhere"))
    assert not (tmp_path / "o").exists()


def test_a_study_runs_from_python(canny, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, pipeline = canny
    settings = ConsistencySettings(
        data=photos(3), images=2, num_inference_steps=1, shard=Shard(1, 2), out=tmp_path / "study"
    )
    first, path = measure_consistency(pipeline, settings)
    assert path.parent == tmp_path / "study" and first.data["conditions"][0]["prompts"] == 2
    second, path = measure_consistency(pipeline, replace(settings, shard=Shard(2, 2)))
    (row,) = second.data["conditions"]
    assert (row["condition"], row["prompts"], row["images"]) == ("canny", 3, 6)
    assert json.loads(path.read_text())["data"] == second.data == read_result(path).data
    assert not (tmp_path / "cnpp-trt-results").exists()
    with pytest.raises(UserError, match="--fresh would remove"):
        replace(settings, fresh=True)


def test_the_miniature_by_default(miniature, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = ["consistency", "--bundle", miniature.bundle, "--backend", "onnxruntime-cpu", "--prompts", 2, "--images", 1]
    fixed += ["--cond", "seg", "--cond", "depth"]
    outcome = command(*fixed, "--steps", 4, "--against", "pytorch")
    assert outcome.status == 0, outcome.err
    data = result_of(tmp_path / "cnpp-trt-results")["data"]
    assert [c["condition"] for c in data["conditions"]] == ["seg", "depth"]
    assert data["data"] == "2 fresh scenes"
    for row in data["conditions"]:
        (difference,) = row["differences"]
        assert difference["minus"] == "pytorch" and abs(difference["value"]) < 0.1
    better, worse = (row["scores"]["deployed"]["value"] for row in data["conditions"])
    assert better > 60 and worse < 20
