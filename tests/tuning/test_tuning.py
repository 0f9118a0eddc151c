"""The search on the embedded model: costs counted by hand, losses from scores, what the budget catches, going on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.benchmarks.consistency.dataset import Scenes
from cnpp_trt.benchmarks.result import read_result
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.settings.preset import Levers, read_preset
from cnpp_trt.tuning.command import TuneSettings, tune
from cnpp_trt.tuning.cost import CostModel, launches_of
from cnpp_trt.tuning.search import Search, SearchSettings
from cnpp_trt.tuning.space import describe, levers_of
from cnpp_trt.tuning.trials import Trials

pytestmark = pytest.mark.slow

pytest.importorskip("optuna")

SMALL = SearchSettings(budget=60, trials=3, prompts=2, confirm=8, attempts=2, rounds=1)
EXACT = levers_of(20, "unipc")
FAST = levers_of(4, "dpmpp_2m ays")


def trials_of(model: Any, folder: Path, condition: str = "seg", exact: Levers = EXACT) -> Trials:
    return Trials(model.pipeline, condition, Scenes(model.pipeline, 64), folder, exact)


def by_graph(model: Any, trials: Trials, levers: Levers) -> dict[str, int]:
    counted = launches_of(model.pipeline.bundle, trials.request(levers, 0))
    found: dict[str, int] = {}
    for label, count in counted.items():
        graph, _, sizes = label.partition(" ")
        rows = json.loads(sizes or "{}").get("batch", "")
        found[f"{graph} {rows}".strip()] = found.get(f"{graph} {rows}".strip(), 0) + count
    return found


def test_launches_are_those_that_a_hand_counts(miniature, tmp_path):
    trials = trials_of(miniature, tmp_path)
    fixed = {"text_encoder": 1, "hint_seg": 1, "vae_decoder": 1}
    found = by_graph(miniature, trials, EXACT)
    assert found == {**fixed, "controlnet_seg 2": 20, "unet 2": 20, "update": 20, "copies": 20}
    # Guided at 5 of 10 steps, controlled at 6: the ControlNet runs at 0, 2 and 4, and anew at 5 on half the rows.
    levers = levers_of(10, "ddim", guidance=(0.0, 0.5), control=(0.0, 0.6), controlnet_interval=2)
    half = {"controlnet_seg 2": 3, "controlnet_seg 1": 1, "unet 2": 5, "unet 1": 5, "update": 10, "copies": 10}
    assert by_graph(miniature, trials, levers) == {**fixed, **half}
    levers = levers_of(10, "ddim", guidance_interval=2, controlnet_interval=4)
    half = {"controlnet_seg 2": 3, "unet 2": 5, "unet 1": 5, "update": 10, "copies": 10}
    assert by_graph(miniature, trials, levers) == {**fixed, **half}


def test_costs_are_kept_and_grow_with_the_launches(miniature, tmp_path):
    trials, file = trials_of(miniature, tmp_path), tmp_path / "seconds.json"
    cost = CostModel(miniature.pipeline, file)
    exact, fast = (cost.seconds(trials.request(levers, 0)) for levers in (EXACT, FAST))
    kept = json.loads(file.read_text())
    assert CostModel(miniature.pipeline, file).seconds(trials.request(EXACT, 0)) == exact
    of_a_step = [f'{g} {{"batch": 2, "images": 1, "tokens": 77}}' for g in ("controlnet_seg", "unet")]
    of_a_step += ["copies", 'update {"guidance": 2, "images": 1}']
    assert exact - fast == pytest.approx(16 * sum(kept[label] for label in of_a_step))
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        CostModel(miniature.pipeline, file)


@pytest.mark.parametrize(("condition", "points"), [("hed", -100.0), ("depth", 1.0)])
def test_a_loss_is_the_difference_of_scores_in_points(miniature, tmp_path, condition, points):
    trials = trials_of(miniature, tmp_path, condition)
    found = trials.compare(FAST, range(3))

    def mean(levers: Levers) -> float:
        requests = [trials.request(levers, i) for i in range(3)]
        images = [miniature.pipeline(r).images[0] for r in requests]
        scores = [
            miniature.pipeline.score(condition, r.controls[0].pixels, i) for r, i in zip(requests, images, strict=True)
        ]
        return float(np.mean([s.value for s in scores]))

    exact, fast = mean(EXACT), mean(FAST)
    assert (found.exact, found.tuned) == pytest.approx((exact, fast), abs=2e-3)
    assert found.loss["value"] == pytest.approx(points * (fast - exact), abs=0.2)
    assert found.loss["low"] <= found.loss["value"] <= found.loss["high"]
    drawn = trials.drawn
    assert trials.compare(FAST, range(3)) == found and trials.drawn == drawn == 6
    assert trials_of(miniature, tmp_path, condition).compare(FAST, range(3)) == found  # from the records


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the model that takes few steps."""
    folder = tmp_path_factory.mktemp("bundles") / "miniature-lcm"
    assemble("miniature-lcm", folder)
    return folder


def test_another_models_exact_setting_is_what_is_compared_with(miniature, few, tmp_path):
    own = Pipeline.open(few)
    scenes = Scenes(miniature.pipeline, 64)
    trials = Trials(own, "depth", scenes, tmp_path, EXACT, miniature.pipeline)
    found = trials.compare(levers_of(4, "lcm"), range(3))

    def mean(pipeline: Pipeline, **fields: Any) -> float:
        scores = []
        for i in range(3):
            control = scenes.control(i, "depth")
            image = pipeline(Request(scenes.prompt(i), controls=Control("depth", control), seed=i, **fields)).images[0]
            scores.append(miniature.pipeline.score("depth", control, image).value)
        return float(np.mean(scores))

    expected = mean(miniature.pipeline), mean(own, num_inference_steps=4, scheduler="lcm")
    assert (found.exact, found.tuned) == pytest.approx(expected, abs=2e-3)
    assert found.psnr is not None and trials.drawn == 6
    # The same levers on the model that is tuned are a setting like others.
    assert trials.compare(EXACT, range(3)).psnr is not None
    # Its records are of distances to the other model's images.
    with pytest.raises(UserError, match="exact '"):
        Trials(own, "depth", scenes, tmp_path, EXACT).compare(levers_of(4, "lcm"), range(3))


def test_a_few_step_model_is_tuned_against_its_original(script, few, tmp_path):
    sizes = ("--trials", "3", "--prompts", "2", "--confirm", "8", "--attempts", "2", "--budget", "60")
    ended = script("tune", "--bundle", few, "--exact", "miniature", "--cond", "seg", *sizes, "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    preset = read_preset(Path(ended.stdout.strip().splitlines()[-1]))
    assert preset.evidence.exact_bundle == "miniature, fp32 on onnxruntime-cpu" and preset.levers.scheduler == "lcm"
    assert preset.evidence.exact_levers == EXACT and preset.evidence.command.endswith(" --exact miniature")
    assert "20 steps of unipc of miniature, fp32" in ended.stderr


def test_what_is_compared_with_must_draw_the_same_size(script, tiny, few, tmp_path):
    ended = script("tune", "--bundle", few, "--exact", tiny.bundle, "--cond", "seg", "--out", tmp_path)
    assert ended.returncode == 2 and "give an --exact of the same size" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_budget_catches_a_cache_that_ignores_the_controlnet(miniature, tmp_path):
    """cache-dit and others reuse what was computed before the ControlNet's residuals: the control is lost in silence.

    Rebuilt as the control of the first step alone. The picture is as good as any, and does not follow.
    """
    trials, settings = (
        trials_of(miniature, tmp_path),
        SearchSettings(budget=1.0, prompts=2, confirm=8, attempts=1, rounds=1),
    )
    search = Search(trials, CostModel(miniature.pipeline, tmp_path / "seconds.json"), settings)
    ignoring = search._candidate(levers_of(20, "unipc", control=(0.0, 0.05)), range(2))
    with pytest.raises(UserError, match=r"^no setting stays within 1 points of seg: the closest, 20 steps of unipc, "):
        search.confirm([ignoring])
    assert search._candidate(ignoring.levers, settings.fresh(0)).compared.loss["low"] > 1


@pytest.fixture(scope="module")
def tuned(miniature: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tune(miniature.pipeline, TuneSettings("canny", SMALL, out=tmp_path_factory.mktemp("tuned")))


def test_a_search_writes_a_preset_with_its_evidence(miniature, tuned):
    preset = read_preset(tuned.preset_file)
    assert preset == tuned.preset and preset.evidence.loss.high <= SMALL.budget
    assert preset.model.bundle == miniature.pipeline.bundle.digest
    result = read_result(tuned.result_file).data
    assert result["attempts"][-1]["setting"] == describe(preset.levers)
    assert len(result["trials"]) <= SMALL.trials and result["exact"] == "20 steps of unipc"
    # Fresh: a search of `prompts` and their doubles never saw those that confirm.
    assert SMALL.fresh(0).start == 8 and not set(SMALL.fresh(0)) & set(SMALL.fresh(1))


def test_a_search_that_ended_draws_nothing_again(miniature, tuned):
    again = tune(miniature.pipeline, TuneSettings("canny", SMALL, out=tuned.preset_file.parent))
    assert again.preset.levers == tuned.preset.levers and again.preset.evidence.loss == tuned.preset.evidence.loss
    assert again.result.data["trials"] == tuned.result.data["trials"]


def test_a_preset_decides_what_a_request_leaves_open(miniature, tuned):
    pipeline = Pipeline.open(miniature.bundle, presets=(tuned.preset,), threads=1)
    trials = Trials(pipeline, "canny", Scenes(pipeline, 64), tuned.preset_file.parent, EXACT)
    asked = trials.request(EXACT, 0)
    plain = type(asked).__mro__[1](asked.prompt, controls=asked.controls, seed=0)  # a `Request`
    drawn = pipeline(plain).request
    assert drawn.num_inference_steps == tuned.preset.levers.num_inference_steps
    assert drawn.timestep_spacing == tuned.preset.levers.timestep_spacing


def test_a_killed_search_goes_on(miniature, tmp_path, tuned):
    """Ends in one line, keeps what it drew, and comes to what the search that was not interrupted came to."""
    command = [
        Path(sys.executable).parent / "cnpp-trt", "tune", "--bundle", miniature.bundle, "--cond", "canny",
        "--budget", "60", "--trials", "3", "--prompts", "2", "--confirm", "8", "--attempts", "2", "--out", tmp_path,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    records = lambda: sum(len(f.read_text().splitlines()) for f in tmp_path.rglob("records-*.jsonl"))  # noqa: E731
    while records() < 4 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "are kept; the same command goes on from there" in said
    kept = records()
    assert kept >= 4
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    preset = read_preset(Path(ended.stdout.strip()))
    assert preset.evidence.prompts == 8 and records() > kept


def test_a_budget_that_nothing_meets_is_one_line(script, miniature, tmp_path):
    sizes: Sequence[str] = ("--trials", "1", "--prompts", "2", "--confirm", "8", "--attempts", "1")
    ended = script("tune", "--bundle", miniature.bundle, "--cond", "hed", "--budget=-50", *sizes, "--out", tmp_path)
    assert ended.returncode == 2
    assert (
        ended.stderr.strip()
        .splitlines()[-1]
        .startswith("error: no setting stays within -50 points of hed: the closest")
    )
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trials", "0"), "--trials must be at least 1, not 0"),
        (("--budget", "nan"), "a budget is a number of points, not nan"),
        (("--cond", "dept"), "unknown condition"),
    ],
)
def test_bad_options_are_one_line(script, options, message):
    ended = script("tune", *options)
    assert ended.returncode == 2 and message in ended.stderr
