"""`cnpp-trt run` as a user meets it: hints, names of options, what is shown and what is kept."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from cnpp_trt.bundles.manifest import TypicalScore
from cnpp_trt.errors import CnppError
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from cnpp_trt.runtime.control.consistency import Score, graded
from cnpp_trt.runtime.generate import generate
from cnpp_trt.runtime.images.image_files import read_image
from cnpp_trt.runtime.images.png_files import save_png
from cnpp_trt.runtime.output.metadata import image_from_base64, pack, read_record
from cnpp_trt.runtime.sampling.scheduler_names import read_scheduler
from cnpp_trt.runtime.settings.request import Control, Request
from msgspec.structs import replace
from PIL import Image, ImageOps

pytestmark = pytest.mark.slow

PHOTO = Path(skimage.__file__).parent / "data" / "coffee.png"  # 600x400


@pytest.fixture
def run(tiny: Any, tmp_path: Path, control_image: Any) -> list[Any]:
    """The start of a short and valid `run`, to append to."""
    Image.fromarray(np.repeat(control_image(*tiny.size)[..., :1], 3, 2)).save(tmp_path / "depth.png")
    return [
        "run", "--bundle", tiny.bundle, "--cond", "depth", "--image", tmp_path / "depth.png", "--seed", 7,
        "--steps", 2, "--out", tmp_path / "out",
    ]  # fmt: skip


def drawn(outcome: Any) -> dict[str, Any]:
    assert outcome.status == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # AUTOMATIC1111's menu, before and after its schedule types had a menu of their own.
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("Euler", "euler"),
        ("DDIM", "ddim"),
        ("UniPC", "unipc"),
        ("LCM", "lcm"),
        # diffusers' classes
        ("UniPCMultistepScheduler", "unipc"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("EulerDiscreteScheduler", "euler"),
        ("DDIMScheduler", "ddim"),
        ("LCMScheduler", "lcm"),
        # ComfyUI's
        ("dpmpp_2m", "dpmpp_2m"),
        ("uni_pc", "unipc"),
    ],
)
def test_schedulers_as_users_know_them(text: str, name: str) -> None:
    assert read_scheduler(text) == read_scheduler(text.lower()) == read_scheduler(text.upper()) == name


def test_names_come_from_diffusers() -> None:
    import diffusers
    from cnpp_trt.runtime.sampling import scheduler_names

    assert all(hasattr(diffusers, name) for name in scheduler_names._CLASSES)


@pytest.mark.parametrize(
    "text", ["Euler a", "DPM++ 2M SDE Karras", "DPM++ SDE", "PNDMScheduler", "", "x" * 9999, "\x1b"]
)
def test_other_schedulers_are_none_of_them(refused: Any, run: list[Any], text: str) -> None:
    """Euler a and the SDE ones draw noise at each step: they are not what the shorter names stand for."""
    message = refused(*run, "--scheduler", text)
    assert message.startswith("unknown scheduler ") and message.isprintable() and "dpmpp_2m_karras" in message
    if text == "Euler a":
        assert "did you mean 'euler'?" in message


def test_usual_short_options_and_aliases(command: Any, run: list[Any], tmp_path: Path) -> None:
    usual = ["-p", "a house", "-s", 3, "-n", 2, "--cfg-scale", 1.5, "--sampler", "DDIM", "-o", tmp_path / "o", "--json"]
    found = drawn(command(*run, *usual))
    request = found["request"]
    assert (request["prompt"], request["num_inference_steps"], request["num_images_per_prompt"]) == ("a house", 3, 2)
    assert (request["guidance_scale"], request["scheduler"]) == (1.5, "ddim")
    assert Path(found["folder"]) == tmp_path / "o" / "run-0001"
    long = ["--num-inference-steps", 3, "--images", 2, "--json"]
    request = drawn(command(*run, *long))["request"]
    assert (request["num_inference_steps"], request["num_images_per_prompt"]) == (3, 2)
    help_text = command("run", "--help").out
    assert "--images" not in help_text and "--num-images" in help_text
    assert all(panel in help_text for panel in ("Model", "Prompt", "Control", "Sampling", "Runtime", "Output"))
    assert re.search(r"AUTOMATIC1111's\s[│\s]*2[│\s]*is[│\s]*1", help_text)


def test_seed_minus_one_is_random_where_an_example_has_a_seed(command: Any, v_prediction: Any, tmp_path: Path) -> None:
    arguments = ["run", "--bundle", v_prediction.bundle, "--steps", 1, "--out", tmp_path, "--json"]
    assert drawn(command(*arguments))["seed"] == 4
    seeds = {drawn(command(*arguments, "--seed", -1))["seed"] for _ in range(3)}
    assert len(seeds) == 3 and 4 not in seeds


def test_every_condition(command: Any, refused: Any, run: list[Any], tmp_path: Path) -> None:
    at = run.index("--cond")
    arguments = [*run[:at], "--cond", "all", *run[at + 2 :], "--image", tmp_path / "depth.png"]
    found = drawn(command(*arguments, "--json"))
    assert [c["condition"] for c in found["request"]["controls"]] == ["seg", "depth"]
    assert "give no other --cond" in refused(*arguments, "--cond", "seg")
    assert "did you mean 'canny'?" in refused(*run[:at], "--cond", "cany")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "tensort"], "unknown backend 'tensort': did you mean 'tensorrt'?"),
        (["--resize-mode", "croop"], "unknown --resize-mode 'croop': did you mean 'crop'?"),
        (["--strength", "0", "--init-image", "x.png"], "--strength must be above 0"),
        (["--clip-skip", "-1"], "--clip-skip must be a whole number"),
        (["--cond", "seg", "--image", "x", "--image", "y"], "1 --cond and 2 --image"),
        (["--control-end", "0"], "--control-start 0.0 and --control-end 0.0 must satisfy"),
        (["--size", "big"], "cannot read size 'big'"),
    ],
)
def test_values_are_checked_before_a_bundle_is_looked_for(refused: Any, arguments: list[str], words: str) -> None:
    assert words in refused("run", "--model", "none-such", *arguments)


# --------------------------------------------------------------------------------------------------- control images


def test_a_photo_without_extract_is_noticed_before_it_is_drawn(command: Any, run: list[Any], tmp_path: Path) -> None:
    outcome = command(*run[:-4], "--image", PHOTO, "--cond", "seg", "--steps", 1, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    notes = [line for line in outcome.err.splitlines() if line.startswith("note: ")]
    assert any("ADE20K's colors" in note and "photo" in note for note in notes)
    assert any("600x400, squeezed to" in note and "--resize-mode crop or pad" in note for note in notes)
    assert any("the prompt is empty: say what to draw with --prompt" in note for note in notes)


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
def test_resize_modes_are_pillows(command: Any, run: list[Any], tiny: Any, tmp_path: Path, mode: str) -> None:
    with Image.open(PHOTO) as opened:
        photo = opened.convert("L").convert("RGB")
    photo.save(tmp_path / "wide.png")
    run[run.index("--image") + 1] = tmp_path / "wide.png"
    found = drawn(command(*run, "--resize-mode", mode, "--init-image", tmp_path / "wide.png", "--json"))
    record = read_record(found["images"][0]).request
    method = Image.Resampling.LANCZOS
    expected = {
        "stretch": photo.resize(tiny.size, method),
        "crop": ImageOps.fit(photo, tiny.size, method),
        "pad": ImageOps.pad(photo, tiny.size, method, color=(0, 0, 0)),
    }[mode]
    np.testing.assert_array_equal(image_from_base64(record.controls[0].image), np.asarray(expected))
    first = image_from_base64(record.init_image or "")
    if mode != "pad":
        np.testing.assert_array_equal(first, np.asarray(expected))
    else:  # its edges go on where the control image is black
        assert (np.asarray(expected)[0] == 0).all() and (first[0] == first[1]).all() and (first[0] > 0).any()


def test_what_is_extracted_from_a_photo_keeps_its_shape(miniature: Any, command: Any, tmp_path: Path) -> None:
    """A photo of twice the width: by `crop`, the extractor is given the middle."""
    scene = Image.open(MINIATURE / "examples" / "scene.png").convert("RGB")
    wide = Image.new("RGB", (256, 128), (120, 160, 200))
    wide.paste(scene, (64, 0))
    wide.save(tmp_path / "wide.png")
    arguments = ["run", "--bundle", miniature.bundle, "--cond", "seg", "--extract", "--image", tmp_path / "wide.png"]
    cropped = drawn(command(*arguments, "--resize-mode", "crop", "--steps", 1, "--out", tmp_path, "--json"))
    record = read_record(cropped["images"][0]).request
    expected = miniature.pipeline.extract("seg", np.asarray(scene))
    np.testing.assert_array_equal(image_from_base64(record.controls[0].image), expected)
    outcome = command(*arguments, "--steps", 1, "--out", tmp_path)
    assert "256x128, squeezed to 128x128: things come out 2.00 times narrower" in outcome.err
    # The sheet shows the photo whole: half a tile high, at the left.
    with Image.open(Path(cropped["folder"]) / "sheet.png") as sheet:
        alone = command("run", "--bundle", miniature.bundle, "--cond", "seg", "--steps", 1, "--out", tmp_path / "a")
        with Image.open(alone.out.splitlines()[-1]) as other:
            assert sheet.width > other.width


# ------------------------------------------------------------------------------------------------------ what is shown


def test_one_line_says_what_was_drawn(command: Any, run: list[Any], tmp_path: Path) -> None:
    outcome = command(*run, "-p", "a \x1b[31mred\x1b[0m house " + "x" * 500, "--negative-prompt", "rain\u202e")
    assert outcome.status == 0, outcome.err
    [line] = [line for line in outcome.err.splitlines() if line.startswith("seed ")]
    assert line.startswith(r"seed 7 · 2 steps · unipc · guidance 7.5 · prompt: a \x1b[31mred\x1b[0m house xx")
    assert r"without: rain\u202e" in line and line.isprintable() and len(line) < 300
    assert all(part.isprintable() for part in outcome.err.splitlines())
    # In JSON the whole of it is in the object, and nothing else is on stdout.
    assert "seed 7 ·" not in command(*run, "--json").err


def on_a_terminal(*arguments: Any, interrupt_at: bytes = b"") -> tuple[int, str, str]:
    """The command with stderr on a pseudo-terminal: its status, stdout, and all that the terminal got.

    Args: interrupt_at: what must be on the terminal when it is interrupted, once.
    """
    ours, theirs = pty.openpty()
    script = Path(sys.executable).parent / "cnpp-trt"
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                part = os.read(ours, 65_536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
            if interrupt_at and interrupt_at in seen:
                process.send_signal(signal.SIGINT)
                interrupt_at = b""
        elif process.poll() is not None:
            break
    out = process.communicate(timeout=60)[0]
    os.close(ours)
    return process.returncode, out, seen.decode("utf-8", "replace")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_a_bar_on_a_terminal_and_only_there(run: list[Any], script: Any) -> None:
    run[run.index("--steps") + 1] = 300
    status, out, seen = on_a_terminal(*run)
    assert status == 0, seen
    assert "/300" in seen and "drawing" in seen
    counts = [int(n) for n in re.findall(r"(\d+)/300", seen)]
    assert counts == sorted(counts) and len(set(counts)) > 1
    assert "/300" not in out and out.splitlines()[0].endswith("image-0.png")
    piped = script(*run)
    assert "/300" not in piped.stderr and "\x1b" not in piped.stderr
    run[run.index("--steps") + 1] = 900
    status, out, seen = on_a_terminal(*run, interrupt_at=b"drawing")
    assert (status, out) == (130, ""), seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is shown again
    assert "interrupted" in seen.splitlines()[-1]


def test_the_hook_for_the_bar_is_told_each_step_and_changes_nothing(tiny: Any, control_image: Any) -> None:
    steps: list[tuple[int, int]] = []
    request = Request(controls=(Control("seg", control_image(*tiny.size)),), seed=1, num_inference_steps=4)
    with_hook = tiny.pipeline(request, on_progress=lambda done, total: steps.append((done, total)))
    without = tiny.pipeline(request)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(with_hook.latents, without.latents)
    assert "callback" not in with_hook.timings


# ------------------------------------------------------------------------------------------------------ what is kept


def request_for(model: Any, control_image: Any) -> Request:
    return Request(controls=(Control("seg", control_image(*model.size)),), seed=1, num_inference_steps=2)


def test_where_pictures_cannot_go_is_known_before_drawing(refused: Any, run: list[Any], tmp_path: Path) -> None:
    start = time.process_time()
    run[run.index("--steps") + 1] = 1000
    assert "cannot write to /proc/nope" in refused(*run, "-o", "/proc/nope")
    assert "depth.png is no folder" in refused(*run, "-o", tmp_path / "depth.png")
    assert time.process_time() - start < 5  # a thousand steps take longer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["depth.png"]


def test_a_folder_that_goes_away_meanwhile(tiny: Any, control_image: Any, tmp_path: Path) -> None:
    """The images go to the system's folder for temporary files, and that is said."""
    out = tmp_path / "out"

    def spoil(done: int, total: int) -> None:
        if done == total:
            out.write_text("a file now")

    found = generate(tiny.pipeline, request_for(tiny, control_image), out, on_progress=spoil)
    [image] = found.images
    assert image.parent.parent == Path(tempfile.gettempdir()) and image.is_file()
    assert any("is a file" in note and str(image) in note for note in found.notes)
    assert read_record(image).pixels_sha256 == found.pixels_sha256[0]
    shutil.rmtree(image.parent)


def test_images_that_can_be_written_nowhere(
    tiny: Any, control_image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CnppError, match=r"is a file.*no image was kept"):
        generate(tiny.pipeline, request_for(tiny, control_image), tmp_path / "out")


def test_a_sheet_that_fails_leaves_the_images(miniature: Any, tmp_path: Path) -> None:
    """The extractor's graph is gone when the sheet is made."""
    bundle = Path(shutil.copytree(miniature.bundle, tmp_path / "bundle"))
    from cnpp_trt import Pipeline

    pipeline = Pipeline.open(bundle)
    request = Request(controls=(Control("depth", np.zeros((128, 128, 3), np.uint8)),), seed=1, num_inference_steps=1)

    def spoil(done: int, total: int) -> None:
        (bundle / pipeline.bundle.graph("extractor_depth").file).write_bytes(b"no graph")

    with pytest.raises(CnppError, match="the sheet could not be made") as caught:
        generate(pipeline, request, tmp_path / "out", on_progress=spoil)
    image = tmp_path / "out" / "run-0001" / "image-0.png"
    assert f"kept: {image}" in str(caught.value) and image.is_file()
    assert read_record(image).request.seed == 1


def test_an_interrupt_after_drawing_keeps_what_is_written(
    tiny: Any,
    control_image: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cnpp_trt.runtime import generate as running

    def interrupted(*arguments: Any, **options: Any) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "draw_sheet", interrupted)  # the moment cannot be had otherwise
    with caplog.at_level("INFO", "cnpp_trt"), pytest.raises(KeyboardInterrupt):
        generate(tiny.pipeline, request_for(tiny, control_image), tmp_path / "out")
    image = tmp_path / "out" / "run-0001" / "image-0.png"
    assert image.is_file() and str(image) in caplog.messages[0]


def test_a_full_disk_leaves_the_images_elsewhere(tiny: Any, control_image: Any, tmp_path: Path) -> None:
    """A disk of 20 kB: room for the first of the pictures."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("this user mounts no file systems")
    try:
        request = Request(
            controls=(Control("seg", control_image(*tiny.size)),),
            seed=1,
            num_inference_steps=1,
            num_images_per_prompt=8,
        )
        with pytest.raises(CnppError, match="the sheet could not be made") as caught:
            generate(tiny.pipeline, request, disk)
        kept = [Path(path) for path in str(caught.value).partition("kept: ")[2].split(", ")]
        assert len(kept) == 8 and all(path.is_file() for path in kept)
        assert {path.parent.parent for path in kept} == {disk, Path(tempfile.gettempdir())}
        for path in {path.parent for path in kept} - {disk / "run-0001"}:
            shutil.rmtree(path)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------------------------------------------- repeat


@pytest.fixture
def picture(command: Any, run: list[Any], tmp_path: Path) -> Path:
    return Path(drawn(command(*run, "--json"))["images"][0])


def rewritten(picture: Path, path: Path, **changes: Any) -> Path:
    """The picture with another bundle in its record."""
    record = read_record(picture)
    save_png(path, read_image(picture).pixels, pack(replace(record, bundle=replace(record.bundle, **changes))))
    return path


@pytest.mark.parametrize(
    "model",
    ["../../../../etc", "/", "..", "a/b", "x; rm -rf ~", "$(touch pwned)", "\x1b[2J\x1b]0;title\x07", "(a+)+$", "'"],
)
def test_a_models_name_is_no_path_and_no_command(
    refused: Any, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    home = tmp_path / "home"
    (home / "bundles").mkdir(parents=True)
    monkeypatch.setenv("CNPP_TRT_HOME", str(home))
    start = time.process_time()
    message = refused("run", "--repeat", rewritten(picture, tmp_path / "x.png", model=model), "-o", tmp_path / "again")
    assert time.process_time() - start < 5
    assert message.isprintable() and "no bundle" in message
    # The command, read by a shell, has the name as one word.
    import shlex

    words = shlex.split(re.search("`(.*)`", message)[1])  # type: ignore[index]
    assert words[:3] == ["cnpp-trt", "export", "--model"] and words[4] == "--precision"


def test_the_bundle_of_a_record_is_found_by_name(
    command: Any, picture: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_with = read_record(picture).bundle
    bundles = tmp_path / "home" / "bundles"
    bundles.mkdir(parents=True)
    name = f"{made_with.model}-{made_with.precision}-{made_with.width}x{made_with.height}"
    (bundles / name).symlink_to(tiny.bundle)
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    outcome = command("run", "--repeat", picture, "--out", tmp_path / "again")
    assert outcome.status == 0 and "the pixels are the same" in outcome.err


def test_what_a_record_says_is_checked_before_anything_is_drawn(
    refused: Any, picture: Path, tiny: Any, tmp_path: Path
) -> None:
    arguments = ("--bundle", tiny.bundle, "--out", tmp_path / "again")
    other = rewritten(picture, tmp_path / "size.png", width=tiny.size[0] + 8)
    assert "was drawn at" in refused("run", "--repeat", other, *arguments)
    with Image.open(picture) as opened:
        record = json.loads(opened.text["cnpp_trt"])  # type: ignore[attr-defined]
    changes: tuple[dict[str, Any], ...] = ({"image_index": 3}, {"backend": "\x1b[31m"}, {"more": 1})
    for i, change in enumerate(changes):
        save_png(tmp_path / f"{i}.png", read_image(picture).pixels, {"cnpp_trt": json.dumps({**record, **change})})
        message = refused("run", "--repeat", tmp_path / f"{i}.png", *arguments)
        assert "is damaged" in message and message.isprintable()
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------------------------------------------------- scores


def test_grades() -> None:
    higher: TypicalScore = {"median": 90.0, "low": 80.0}
    assert [graded(Score("mIoU", v, True), higher).grade for v in (95, 90, 89.9, 80, 79.9)] == [
        "good", "good", "usual", "usual", "weak",
    ]  # fmt: skip
    lower: TypicalScore = {"median": 9.0, "low": 12.0}
    assert [graded(Score("RMSE", v, False), lower).grade for v in (5, 9, 9.1, 12, 12.1)] == [
        "good", "good", "usual", "usual", "weak",
    ]  # fmt: skip
    assert graded(Score("F1", 1, True), None).grade == ""


def test_typical_scores_are_the_measured_ones() -> None:
    """Half of the measured images are at the median or better, nine of ten at the low mark or better."""
    measured = json.loads((MINIATURE.parents[1] / "developer" / "miniature" / "typical_scores.json").read_text())
    examples = json.loads((MINIATURE / "examples" / "examples.json").read_text())["examples"]
    for condition, example in examples.items():
        values, typical = np.array(measured[condition]), example["typical_score"]
        sign = -1 if condition == "depth" else 1
        assert len(values) == 64
        assert np.mean(sign * values >= sign * typical["median"]) == pytest.approx(0.5, abs=0.02)
        assert np.mean(sign * values >= sign * typical["low"]) == pytest.approx(0.9, abs=0.02)


def test_the_sheet_and_the_command_grade(
    command: Any, miniature: Any, tiny: Any, run: list[Any], tmp_path: Path
) -> None:
    outcome = command("run", "--bundle", miniature.bundle, "--cond", "seg", "--out", tmp_path)
    [line] = [line for line in outcome.err.splitlines() if line.startswith("consistency seg")]
    assert re.fullmatch(r"consistency seg: mIoU \d\d\.\d\d \((good|usual|weak)\)", line)
    noise = command(
        "run", "--bundle", miniature.bundle, "--cond", "seg", "--steps", 1, "--control-scale", 0, "-o", tmp_path
    )
    assert "(weak)" in noise.err
    assert "(good)" not in command(*run).err  # a model without recorded scores
