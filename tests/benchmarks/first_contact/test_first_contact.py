"""First contact with a GPU, on the simulated one: whole, resumed, and each stage with a fault in it."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.benchmarks.check_records import FirstContact, StageFinding
from cnpp_trt.benchmarks.first_contact.command import PASTE_LINES, _ended, exit_status, paste, run_stage
from cnpp_trt.benchmarks.first_contact.stage import Setup
from cnpp_trt.benchmarks.first_contact.stages import BY_NAME, STAGES
from cnpp_trt.benchmarks.result import BenchmarkResult, read_result
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from fixture_cache import exported

pytestmark = pytest.mark.slow
FAULTS = Path(__file__).parents[2] / "programs" / "contact_faults"


@pytest.fixture(scope="module")
def half(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "bundle"
    checkpoint = Checkpoint(str(tiny_checkpoint))
    exported("tiny-fp16-two", folder, lambda out: export_bundle(checkpoint, ["seg", "depth"], out, precision="fp16"))
    return folder


@pytest.fixture(scope="module")
def environment(simulated_gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made: dict[str, str] = simulated_gpu.environment()
    tests = str(Path(__file__).parents[2])
    made["PYTHONPATH"] = ":".join([str(FAULTS), tests, made["PYTHONPATH"]])
    made["CNPP_TRT_HOME"] = str(tmp_path_factory.mktemp("home"))
    return made


@pytest.fixture(scope="module")
def whole(environment: Mapping[str, str], half: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of everything: its result's file and what it printed."""
    out = tmp_path_factory.mktemp("out") / "contact.json"
    ended = contact(environment, half, out)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, ended.stdout


def contact(environment: Mapping[str, str], bundle: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "cnpp_trt", "first-contact", "--bundle", str(bundle), "--out", str(out), *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=500, env=dict(environment))


def verdicts(file: Path) -> dict[str, str]:
    data: Any = read_result(file).data
    return {stage["name"]: stage["verdict"] for stage in data["stages"]}


def test_everything_works_on_a_sound_gpu(whole):
    file, printed = whole
    refused = {"onnxruntime-cuda": "refused"}  # the CPU's package has no such provider
    assert verdicts(file) == {stage.name: refused.get(stage.name, "ok") for stage in STAGES} | {
        "tests": "skipped",
        "full size": "skipped",
    }
    assert printed.splitlines()[0].startswith("cnpp-trt first contact: a GPU draws the right image (quick, ")
    numbers = {stage["name"]: stage["numbers"] for stage in read_result(file).data["stages"]}
    assert numbers["machine"]["compute capability"] == "sm120"
    assert {"step: ms", "loop: ms", "launch: ms", "off: ms"} <= numbers["speed"].keys()
    assert set(numbers["graphs"]) >= {"unet", "controlnet_seg", "vae_decoder", "update", "text_encoder", "hint_seg"}
    assert all(numbers["graphs"][name] < 1e-2 for name in ("unet", "controlnet_seg", "vae_decoder"))


def test_the_paste_is_short_and_names_nobody(whole):
    file, printed = whole
    lines = printed.rstrip().splitlines()[:-2]  # an empty line and the result's file follow
    assert len(lines) <= PASTE_LINES
    content = file.read_text("utf-8")
    for private in (str(Path.home()) + "/", str(file.parent), "GPU-", sys.prefix):
        assert private not in "\n".join(lines) and private not in content, private


def test_what_is_known_is_not_found_out_again(whole, environment, half):
    file, _ = whole
    before = read_result(file).data["stages"]
    content: Any = json.loads(file.read_text("utf-8"))
    for stage in content["data"]["stages"]:
        if stage["name"] == "speed":
            stage.update(verdict="timed out", words="it did not end within 5 s")
    file.write_text(json.dumps(content), "utf-8")
    assert contact(environment, half, file).returncode == 0
    after = read_result(file).data["stages"]
    for old, new in zip(before, after, strict=True):
        if old["name"] in ("speed", "onnxruntime-cuda"):
            assert (new["verdict"], new["seconds"]) != ("timed out", old["seconds"])
        else:
            assert new == old


@pytest.mark.parametrize(
    ("stage", "fault", "verdict", "words"),
    [
        ("cuda", "capture", "degraded", "nothing can be captured: CUDA failed in end_building"),
        ("cuda", "copy", "failed", "what was copied to the device and back is not what it was"),
        ("cuda", "replay", "failed", "a replayed graph did not do what was captured"),
        ("libraries", "runtime", "refused", "tensorrt-rtx 1.7.1.116 cannot start its runtime"),
        ("small plan", "load", "refused", "tensorrt-rtx 1.7.1.116 cannot load the plan"),
        ("plans", "build", "refused", "cannot build unet.onnx: no tactic"),
        ("graphs", "kernel", "failed", "relative L2 differences to ONNX Runtime's CPU provider: unet by"),
        ("graphs", "crash", "failed", "its process ended with status -6"),
        ("ladder", "capture", "degraded", "CUDA graphs record nothing instead of each step"),
        ("ladder", "replay", "failed", "the images are not those of plain launches"),
        ("images", "kernel", "failed", "the image differs from the CPU backend's"),
        ("eviction", "load", "refused", "cannot load"),
        ("leaks", "leak", "failed", "of device memory that they did not give back"),
        ("speed", "hang", "timed out", "it did not end within 5 s"),
        ("bundle", "crash", "failed", "its process ended with status -6"),
    ],
)
def test_a_fault_in_a_stage_is_found(stage, fault, verdict, words, whole, environment, half, tmp_path, monkeypatch):
    work = Path(environment["CNPP_TRT_HOME"]) / "first-contact"
    if stage in ("plans", "small plan"):
        work = tmp_path  # where nothing is built yet
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CONTACT_FAULT", fault)
    sound = [finding(name) for name in BY_NAME]
    found = run_stage(BY_NAME[stage], Setup(work, half), sound, limit=5 if fault == "hang" else None)
    assert (found["verdict"], words in found["words"]) == (verdict, True), found
    assert str(tmp_path) not in json.dumps(found) and str(half) not in json.dumps(found)


def test_a_model_of_full_size_is_made_and_timed(whole, environment, half, tmp_path, monkeypatch):
    """Its sizes are tiny here (tests/programs/contact_faults), its way is the whole one."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sound = [finding(name) for name in BY_NAME]
    found = run_stage(BY_NAME["full size"], Setup(tmp_path, half, full=True), sound, limit=300)
    assert (found["verdict"], found["words"]) == ("ok", ""), found
    assert {"tensorrt-rtx: build s", "step: ms", "loop: ms", "launch: ms", "off: ms"} <= found["numbers"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plans", "sd15-random"]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}
    again = run_stage(BY_NAME["full size"], Setup(tmp_path, half, full=True), sound, limit=300)
    assert again["verdict"] == "ok" and made
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.engine")}  # nothing is made again


def finding(name: str, verdict: str = "ok") -> StageFinding:
    return StageFinding(name=name, title="", verdict=verdict, words="", numbers={}, seconds=0.0, said=["a line"] * 9)


def test_what_needs_a_stage_that_does_not_work_is_skipped(tmp_path):
    before = [finding("machine", "refused")]
    found = run_stage(BY_NAME["cuda"], Setup(tmp_path), before)
    assert (found["verdict"], found["words"]) == ("skipped", "needs machine, which was refused")


def test_what_a_stage_started_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    status, said = _ended([sys.executable, "-c", code], 5)
    assert status is None
    for _ in range(50):  # what has ended is gone, or waits for whoever adopted it
        state = Path(f"/proc/{int(said)}/stat")
        if not state.exists() or state.read_text("utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_what_has_no_time_left_is_skipped(tmp_path):
    found = run_stage(BY_NAME["machine"], Setup(tmp_path), [], limit=0.5)
    assert found["verdict"] == "skipped" and "no time left in a quick run" in found["words"]


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, 0),
        ({"onnxruntime-cuda": "refused", "eviction": "refused"}, 0),
        ({"ladder": "degraded"}, 3),
        ({"leaks": "failed"}, 3),
        ({"speed": "timed out"}, 3),
        ({"images": "failed"}, 3),  # ONNX Runtime's provider still drew it
        ({"images": "skipped"}, 3),
        ({"images": "failed", "onnxruntime-cuda": "failed"}, 1),
        ({"images": "refused", "onnxruntime-cuda": "refused"}, 1),
    ],
)
def test_exit_statuses(changed, status):
    stages = [finding(name, changed.get(name, "ok")) for name in BY_NAME]
    made = FirstContact(mode="quick", condition="seg", stages=stages)
    assert exit_status(made) == status
    text = paste(BenchmarkResult.of("first_contact", "a GPU", "cnpp-trt first-contact", made))
    assert len(text.splitlines()) <= PASTE_LINES


def test_a_machine_without_a_gpu(command, tmp_path, tiny):
    from cnpp_trt.gpu import find_gpu

    if find_gpu().gpu:
        pytest.skip("this machine has a GPU")
    ended = command("first-contact", "--bundle", tiny.bundle, "--out", tmp_path / "contact.json")
    assert ended.status == 1
    lines = ended.out.splitlines()
    assert lines[0].startswith("cnpp-trt first contact: no GPU draws") and f": {find_gpu().reason}" in lines[1]
    assert "the bundle is fp32: plans are built from one in fp16" in ended.out
