"""The command as users have it: every command, every bad input, and what it does to the disk."""

import base64
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import __version__
from cnpp_trt.bundles.bundle import FORMAT, bundle_folder
from cnpp_trt.conditions import ADE20K_PALETTE, CONDITIONS
from cnpp_trt.runtime.output.metadata import image_from_base64, read_record
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS
from hints import hint
from manifests import edit
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).parent / "cnpp-trt"


@pytest.fixture
def seg(model: Any, tmp_path: Path) -> Path:
    """A segmentation map in ADE20K's colors, at the model's size."""
    width, height = model.size
    cells = np.array(ADE20K_PALETTE, np.uint8)[[2, 4, 9, 1]].reshape(2, 2, 3)
    pixels = cells[np.arange(height) * 2 // height][:, np.arange(width) * 2 // width]
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "seg.png")
    return tmp_path / "seg.png"


@pytest.fixture
def run(model: Any, seg: Path, tmp_path: Path) -> list[Any]:
    """The start of a short and valid `run`, to append to."""
    return [
        "run", "--bundle", model.bundle, "--cond", "seg", "--image", seg, "--prompt", "a house", "--steps", 2,
        "--seed", 7, "--out", tmp_path / "out",
    ]  # fmt: skip


def without(arguments: list[Any], option: str) -> list[Any]:
    i = arguments.index(option)
    return arguments[:i] + arguments[i + 2 :]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ----------------------------------------------------------------------------------------------------------- light


def test_help_is_quick_and_light() -> None:
    """It imports nothing that takes time; the time itself is what a shell user waits."""
    code = """
import atexit, sys
heavy = ("numpy", "torch", "onnxruntime", "cv2", "PIL", "tokenizers", "diffusers", "transformers", "onnx")
atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))
from cnpp_trt.cli import main
main()
"""
    for arguments in (["--help"], ["run", "--help"], ["export", "-h"], ["--version"]):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "[]\n")
        assert ended.stdout
    # The best of three, as the machine may be busy with something else.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([SCRIPT, "--help"], capture_output=True, check=True, timeout=60)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_help_names_every_option_and_choice(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = command("run", "--help").out
    options = """
        --model --bundle --cond --image --extract --prompt --negative-prompt --steps --scheduler --guidance-scale --seed
        --control-scale --control-start --control-end --num-images --backend --out --repeat --json --resize-mode
    """
    for option in options.split():
        assert option in text, option
    assert all(name in text for name in SCHEDULERS)
    assert all(name in command("export", "--help").out for name in CONDITIONS)


def test_version(command: Any) -> None:
    assert command("--version").out == f"cnpp-trt {__version__}\n"


def test_no_command_prints_the_help(command: Any) -> None:
    outcome = command()
    assert outcome.status == 2
    assert "export" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run", "--frobnicate"],
        ["run", "--steps", "many"],
        ["run", "--steps", "2.5"],
        ["run", "--seed", "1e3"],
        ["run", "--guidance-scale", "strong"],
        ["run", "--bundle"],
        ["verify"],
        ["export"],
        ["export", "--cond"],
    ],
)
def test_what_the_command_line_does_not_take(refused: Any, arguments: list[str]) -> None:
    assert refused(*arguments).endswith(": see `cnpp-trt --help`")


# ------------------------------------------------------------------------------------------------------------- run


def test_run_writes_pictures_and_a_sheet(command: Any, run: list[Any], model: Any, tmp_path: Path) -> None:
    outcome = command(*run, "--images", 2)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "out" / "run-0001"
    files = [folder / name for name in ("image-0.png", "image-1.png", "sheet.png")]
    assert outcome.out.splitlines() == [str(f) for f in files]
    assert sorted(folder.iterdir()) == files
    for stage in ("total", "text_encoder", "unet", "controlnet", "vae_decoder", "write", "sheet"):
        assert f"{stage} " in outcome.err
    assert ("consistency seg: mIoU " in outcome.err) is ("extractor_seg" in model.pipeline.bundle.manifest.graphs)
    with Image.open(files[1]) as picture:
        assert picture.size == model.size
        assert picture.info["parameters"].startswith("a house\nSteps: 2, Sampler: UniPC")
        assert "Seed: 8" in picture.info["parameters"]
        assert json.loads(picture.info["cnpp_trt"])["request"]["seed"] == 7


def test_json_is_one_object_and_all_else_is_on_stderr(script: Any, run: list[Any], model: Any, tmp_path: Path) -> None:
    outcome = script(*run, "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1
    drawn = json.loads(outcome.stdout)
    assert drawn["seed"] == 7
    assert [Path(p).name for p in drawn["images"]] == ["image-0.png"]
    assert drawn["timings"]["total"] > 0
    assert drawn["bundle"]["digest"] == model.pipeline.bundle.digest
    assert drawn["request"]["controls"][0]["condition"] == "seg"
    assert "image" not in drawn["request"]["controls"][0]
    with Image.open(drawn["images"][0]) as picture:
        import hashlib

        assert hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() == drawn["pixels_sha256"][0]


def test_nothing_is_overwritten(command: Any, run: list[Any], tmp_path: Path) -> None:
    assert command(*run).status == 0
    before = snapshot(tmp_path / "out")
    assert command(*run).status == 0
    after = snapshot(tmp_path / "out")
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after} == {"run-0001", "run-0002"}
    # The same request, the same pixels; only the metadata's bytes may differ.
    with Image.open(tmp_path / "out/run-0001/image-0.png") as a, Image.open(tmp_path / "out/run-0002/image-0.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_options_reach_the_request(command: Any, run: list[Any], seg: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(tmp_path / "depth.png")
    outcome = command(
        *run, "--cond", "depth", "--image", tmp_path / "depth.png", "--negative-prompt", "rain", "--scheduler", "lcm",
        "--guidance-scale", "1.5", "--control-scale", "0.5", "--control-start", "0", "--control-start", "0.4",
        "--control-end", "0.9", "--images", "2", "--threads", "1", "--guidance-start", "0.1", "--guidance-end", "0.5",
        "--guidance-interval", "3", "--controlnet-interval", "2", "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    request = json.loads(outcome.out)["request"]
    controls = request.pop("controls")
    assert request == {
        "prompt": "a house",
        "negative_prompt": "rain",
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "guess_mode": False,
        "scheduler": "lcm",
        "seed": 7,
        "num_images_per_prompt": 2,
        "init_image": False,
        "strength": 0.8,
        "clip_skip": 0,
        "clip_skip_negative": False,
        "long_prompt": False,
        "prompt_weights": False,
        "timestep_spacing": None,
        "guidance_start": 0.1,
        "guidance_end": 0.5,
        "guidance_interval": 3,
        "controlnet_interval": 2,
        "cache_interval": 1,
    }
    keys = ("condition", "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    assert [tuple(c[k] for k in keys) for c in controls] == [("seg", 0.5, 0.0, 0.9), ("depth", 0.5, 0.4, 0.9)]
    assert "note: the depth image was resized from 30x20" in outcome.err


def test_image_to_image_and_prompts_reach_the_request_and_repeat(
    command: Any, run: list[Any], tmp_path: Path, control_image: Any, model: Any
) -> None:
    Image.fromarray(control_image(300, 200, 3)).save(tmp_path / "photo.png")
    arguments = ["--init-image", tmp_path / "photo.png", "--strength", "0.5", "--clip-skip", "1", "--long-prompt"]
    outcome = command(*run, *arguments, "--steps", "4", "--prompt", "a red house by a lake " * 20, "--json")
    assert outcome.status == 0, outcome.err
    drawn = json.loads(outcome.out)
    request = drawn["request"]
    found = {key: request[key] for key in ("init_image", "strength", "clip_skip", "long_prompt")}
    assert found == {"init_image": True, "strength": 0.5, "clip_skip": 1, "long_prompt": True}
    with Image.open(drawn["images"][0]) as picture:
        assert isinstance(picture, PngImageFile)
        text = picture.text["parameters"]
    assert "Clip skip: 2" in text
    assert "Denoising strength: 0.5" in text
    width, height = model.size
    assert f"note: the initial image was resized from 300x200 to {width}x{height} (lanczos)" in outcome.err
    encoded = read_record(drawn["images"][0]).request.init_image
    assert encoded is not None
    recorded = image_from_base64(encoded)
    assert recorded.shape == (height, width, 3)
    repeated = command("run", "--repeat", drawn["images"][0], "--bundle", model.bundle, "--out", tmp_path / "again")
    assert repeated.status == 0, repeated.err
    assert "the pixels are the same" in repeated.err


def test_a_strength_without_an_image(refused: Any, run: list[Any]) -> None:
    assert "--init-image" in refused(*run, "--strength", "0.5")


def test_the_models_bundle_is_found_under_the_home(
    command: Any, run: list[Any], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "home"))
    arguments = without(without(run, "--bundle"), "--out")
    name = model.pipeline.bundle.manifest.model
    assert command(*arguments, "--model", "sd15").status == 2  # and an embedded model's is written
    link = bundle_folder("however it is called", "fp32", *model.size)
    link.parent.mkdir(parents=True)
    link.symlink_to(model.bundle)
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, "--model", "however it is called").status == 2
    outcome = command(*arguments, "--model", name)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(str(Path("cnpp-trt-runs") / "run-0001"))
    assert (tmp_path / "cnpp-trt-runs" / "run-0001" / "image-0.png").is_file()


def test_with_nothing_said_the_models_own_example_is_drawn(
    command: Any, v_prediction: Any, control_image: Any, tmp_path: Path
) -> None:
    outcome = command("run", "--bundle", v_prediction.bundle, "--out", tmp_path, "--json")
    assert outcome.status == 0, outcome.err
    request = json.loads(outcome.out)["request"]
    assert (request["prompt"], request["seed"]) == ("a house of blocks", 4)
    assert (request["guidance_scale"], request["num_inference_steps"]) == (3.0, 2)
    assert "note: the seg image was resized from 40x40 to 72x104 (nearest)" in outcome.err
    example = v_prediction.bundle / v_prediction.pipeline.bundle.manifest.conditions["seg"]["image"]
    with Image.open(example) as shipped:
        np.testing.assert_array_equal(np.asarray(shipped), control_image(40, 40))
    # What is said goes before the example.
    said = ["--prompt", "", "--seed", 0, "--guidance-scale", 0, "--steps", 1]
    request = json.loads(command("run", "--bundle", v_prediction.bundle, "--out", tmp_path, "--json", *said).out)[
        "request"
    ]
    assert (request["prompt"], request["seed"]) == ("", 0)
    assert (request["guidance_scale"], request["num_inference_steps"]) == (0.0, 1)


def test_the_miniatures_examples(command: Any, miniature: Any, tmp_path: Path) -> None:
    """With nothing said, it draws the example of the bundle's first condition, and scores it."""
    outcome = command("run", "--bundle", miniature.bundle, "--out", tmp_path, "--json")
    assert outcome.status == 0, outcome.err
    drawn = json.loads(outcome.out)
    example = miniature.pipeline.bundle.manifest.conditions["seg"]
    assert drawn["request"]["prompt"] == example["prompt"]
    assert drawn["scores"][0]["condition"] == "seg"
    photo = drawn["images"][0]
    outcome = command(
        "run",
        "--bundle",
        miniature.bundle,
        "--cond",
        "depth",
        "--extract",
        "--image",
        photo,
        "--out",
        tmp_path,
        "--json",
    )
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["scores"][0]["images"][0]["metric"] == "RMSE"


# ---------------------------------------------------------------------------------------------------------- repeat


def test_repeat_gives_the_same_pixels_and_says_so(script: Any, command: Any, run: list[Any], tmp_path: Path) -> None:
    assert command(*run, "--images", 2, "--scheduler", "lcm").status == 0
    picture = tmp_path / "out" / "run-0001" / "image-1.png"
    before = snapshot(tmp_path / "out")
    bundle = run[run.index("--bundle") + 1]
    outcome = script("run", "--repeat", picture, "--bundle", bundle, "--out", tmp_path / "out")
    assert outcome.returncode == 0, outcome.stderr
    assert "the pixels are the same" in outcome.stderr
    again = tmp_path / "out" / "run-0002" / "image-1.png"
    assert str(again) in outcome.stdout.splitlines()
    with Image.open(picture) as a, Image.open(again) as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert before.items() <= snapshot(tmp_path / "out").items()

    outcome = command("run", "--repeat", picture, "--bundle", bundle, "--out", tmp_path / "json", "--json")
    assert json.loads(outcome.out)["max_difference"] == 0


def test_repeat_of_a_changed_picture_says_how_far(command: Any, run: list[Any], tmp_path: Path) -> None:
    assert command(*run).status == 0
    picture = tmp_path / "out" / "run-0001" / "image-0.png"
    with Image.open(picture) as opened:
        pixels, text = np.asarray(opened).copy(), opened.info["cnpp_trt"]
    pixels[3, 3, 0] ^= 16
    from cnpp_trt.runtime.images.png_files import save_png

    save_png(tmp_path / "changed.png", pixels, {"cnpp_trt": text})
    bundle = run[run.index("--bundle") + 1]
    outcome = command("run", "--repeat", tmp_path / "changed.png", "--bundle", bundle, "--out", tmp_path)
    assert outcome.status == 0
    assert "the pixels differ by up to 16 of 255" in outcome.err


def test_repeat_on_another_bundle_says_so(
    command: Any, run: list[Any], bundle_copy: Path, tiny: Any, seg: Path, tmp_path: Path
) -> None:
    with Image.open(seg) as opened:
        opened.resize(tiny.size, Image.Resampling.NEAREST).save(tmp_path / "small.png")
    arguments = ["run", "--bundle", tiny.bundle, "--cond", "seg", "--image", tmp_path / "small.png", "--steps", 1]
    assert command(*arguments, "--out", tmp_path / "out").status == 0
    edit(bundle_copy, lambda m: m["files"]["vae_encoder.onnx"].update(sha256="0" * 64))
    picture = tmp_path / "out" / "run-0001" / "image-0.png"
    outcome = command("run", "--repeat", picture, "--bundle", bundle_copy, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "is not the bundle that drew" in outcome.err


def test_repeat_without_its_bundle(
    refused: Any, command: Any, run: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*run).status == 0
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path / "empty"))
    picture = tmp_path / "out" / "run-0001" / "image-0.png"
    assert "cnpp-trt export" in refused("run", "--repeat", picture, "--out", tmp_path)


def test_repeat_of_what_cnpp_trt_did_not_write(refused: Any, seg: Path, tmp_path: Path) -> None:
    assert "not written by cnpp-trt" in refused("run", "--repeat", seg)
    assert "no such file" in refused("run", "--repeat", tmp_path / "nowhere.png")
    with Image.open(seg) as opened:
        opened.save(tmp_path / "photo.jpg")
    assert "not a PNG" in refused("run", "--repeat", tmp_path / "photo.jpg")


# ------------------------------------------------------------------------------------------------------- bad input


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes = b"\0" * 64) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"a house, but in words", "is not an image"),
    "truncated": (lambda: png(64, 64, bytes(64 * 193))[:70], "truncated"),
    "bomb": (lambda: png(30_000, 30_000), "decompression bomb"),
    "0x0": (lambda: png(0, 0), "no pixels"),
    "10000x3": (lambda: png(10_000, 3), "10000×3"),
    "1x1": (lambda: png(1, 1), "1×1"),
    "html": (lambda: b"<!doctype html><title>404</title>", "is an HTML page"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG file"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "is a PostScript file"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_used(refused: Any, run: list[Any], tmp_path: Path, name: str) -> None:
    make, word = BAD_IMAGES[name]
    (tmp_path / "bad.png").write_bytes(make())
    message = refused(*without(run, "--image"), "--image", tmp_path / "bad.png")
    assert word in message
    assert "bad.png" in message
    assert not (tmp_path / "out").exists()


def test_no_such_image(refused: Any, run: list[Any], tmp_path: Path) -> None:
    assert "no such file" in refused(*without(run, "--image"), "--image", tmp_path / "nowhere.png")
    assert "is a directory" in refused(*without(run, "--image"), "--image", tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--scheduler", "pndm", ["unknown scheduler 'pndm'", "unipc"]),
        ("--scheduler", "", ["unknown scheduler"]),
        ("--backend", "cuda", ["unknown backend 'cuda'", "onnxruntime-cpu"]),
        ("--steps", 0, ["--steps", "1 to 1000", "not 0"]),
        ("--steps", -1, ["--steps", "not -1"]),
        ("--steps", 1001, ["--steps", "not 1001"]),
        ("--guidance-scale", "nan", ["--guidance-scale", "nan"]),
        ("--guidance-scale", "inf", ["--guidance-scale", "inf"]),
        ("--guidance-scale", "-inf", ["--guidance-scale", "inf"]),
        ("--control-scale", "nan", ["--control-scale", "nan"]),
        ("--control-start", 1.5, ["--control-start"]),
        ("--control-end", 0, ["--control-end", "0 <= start < end <= 1"]),
        ("--seed", -2, ["--seed", "not -2"]),
        ("--seed", 2**64, ["--seed", str(2**64)]),
        ("--num-images", 0, ["--num-images", "not 0"]),
        ("--images", 17, ["--num-images", "not 17"]),
        ("--size", "big", ["cannot read size 'big'"]),
        ("--bundle", "/nowhere", ["no bundle at /nowhere", "cnpp-trt export"]),
        ("--prompt", "\udc80", ["the prompt is not valid Unicode"]),
    ],
)
def test_values_that_cannot_be_used(
    refused: Any, run: list[Any], tmp_path: Path, option: str, value: Any, words: list[str]
) -> None:
    if option == "--size":
        run = without(run, "--bundle")
    message = refused(*run, option, value)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("cond", "word"), [("pose", "unknown condition 'pose'"), ("hed", "has no condition 'hed'")])
def test_conditions_that_cannot_be_used(refused: Any, run: list[Any], tiny: Any, cond: str, word: str) -> None:
    arguments = without(without(run, "--cond"), "--bundle")
    assert word in refused(*arguments, "--bundle", tiny.bundle, "--cond", cond)


def test_as_many_images_as_conditions(refused: Any, run: list[Any], seg: Path) -> None:
    assert "2 --cond and 1 --image" in refused(*run, "--cond", "depth")
    assert "1 --cond and 2 --image" in refused(*run, "--image", seg)
    assert "3 values of --control-scale for 1" in refused(*run, *["--control-scale", 1] * 3)
    assert "--extract needs a photo" in refused(*without(run, "--image"), "--extract")


def test_no_extractor_and_no_example(refused: Any, tiny: Any, seg: Path, tmp_path: Path) -> None:
    arguments = ["run", "--bundle", tiny.bundle, "--out", tmp_path / "out"]
    assert "has no extractor for 'seg'" in refused(*arguments, "--cond", "seg", "--image", seg, "--extract")
    assert "ships no example for 'seg'" in refused(*arguments)


def test_threads_and_sizes(refused: Any, run: list[Any]) -> None:
    assert "threads" in refused(*run, "--threads", -1)
    assert "threads" in refused(*run, "--threads", 0)


def test_outputs_that_cannot_be_written(refused: Any, run: list[Any], seg: Path) -> None:
    assert f"{seg} is no folder" in refused(*without(run, "--out"), "--out", seg)
    assert "choose another --out" in refused(*without(run, "--out"), "--out", "/proc/nowhere")


# ------------------------------------------------------------------------------------------------- images accepted


def deep_png(samples: np.ndarray, color_type: int) -> bytes:
    """A PNG of 16 bits per sample, as Pillow cannot write one in color."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def used(command: Any, arguments: list[Any]) -> tuple[np.ndarray, str]:
    """The control image that a run used, from the picture's metadata, and what the run said."""
    outcome = command(*arguments, "--json")
    assert outcome.status == 0, outcome.err
    with Image.open(json.loads(outcome.out)["images"][0]) as picture:
        control = json.loads(picture.info["cnpp_trt"])["request"]["controls"][0]["image"]
    import io

    with Image.open(io.BytesIO(base64.b64decode(control))) as image:
        return np.asarray(image), outcome.err


@pytest.mark.parametrize("kind", ["gray", "gray16", "rgb16", "alpha", "palette"])
def test_images_of_every_kind_are_read_rightly(
    command: Any, run: list[Any], model: Any, tmp_path: Path, kind: str
) -> None:
    width, height = model.size
    gray = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    rgb = np.repeat(gray[:, :, None], 3, 2)
    expected, path = rgb, tmp_path / "given.png"
    if kind == "gray":
        Image.fromarray(gray).save(path)
    elif kind == "gray16":
        path.write_bytes(deep_png(gray.astype(np.uint16) * 257, 0))
    elif kind == "rgb16":
        path.write_bytes(deep_png(rgb.astype(np.uint16) * 257, 2))
    elif kind == "alpha":
        hidden = np.dstack([rgb, np.where(np.arange(width) < width // 2, 255, 0) * np.ones((height, 1))])
        Image.fromarray(hidden.astype(np.uint8)).save(path)
        expected = np.where(hidden[..., 3:] == 255, rgb, 0)  # what is transparent is "nothing here"
    else:
        Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(path)
        with Image.open(path) as opened:
            assert opened.mode == "P"
    arguments = [*without(without(run, "--image"), "--cond"), "--cond", "depth", "--image", path]
    found, err = used(command, arguments)
    np.testing.assert_array_equal(found, expected)
    assert "note:" not in err


def test_a_jpeg_as_segmentation_map_warns(command: Any, run: list[Any], seg: Path, tmp_path: Path) -> None:
    _, err = used(command, run)
    assert "note:" not in err
    with Image.open(seg) as opened:
        opened.save(tmp_path / "seg.jpg", quality=50)
    _, err = used(command, [*without(run, "--image"), "--image", tmp_path / "seg.jpg"])
    assert len(err.splitlines()) == 1
    assert "is a JPEG: its compression changed the segmentation colors" in err


def test_a_photo_as_segmentation_map_warns(
    command: Any, run: list[Any], model: Any, control_image: Any, tmp_path: Path
) -> None:
    Image.fromarray(control_image(*model.size)).save(tmp_path / "photo.png")
    _, err = used(command, [*without(run, "--image"), "--image", tmp_path / "photo.png"])
    assert "is in ADE20K's colors, in which segmentation maps are painted: is it a photo?" in err


# ------------------------------------------------------------------------------------------------- damaged bundles


def damage(bundle: Path, kind: str) -> str:
    """Damages the bundle; returns what the message must name."""
    manifest = bundle / "manifest.json"
    if kind == "missing file":
        (bundle / "unet.onnx.data").unlink()
        return "unet.onnx.data is missing"
    if kind == "another version":
        manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
        return "manifest format 99"
    if kind == "half a manifest":
        manifest.write_text(manifest.read_text()[:300])
        return "cannot be read"
    if kind == "no manifest":
        manifest.unlink()
        return "it has no manifest.json"
    os.truncate(bundle / "unet.onnx.data", 100)
    return "unet.onnx.data has 100 bytes"


@pytest.mark.parametrize("kind", ["missing file", "another version", "half a manifest", "no manifest", "short file"])
def test_damaged_bundles(refused: Any, run: list[Any], bundle_copy: Path, kind: str) -> None:
    word = damage(bundle_copy, kind)
    assert word in refused(*without(run, "--bundle"), "--bundle", bundle_copy)
    assert word in refused("verify", bundle_copy)


def test_verify(command: Any, refused: Any, bundle_copy: Path) -> None:
    outcome = command("verify", bundle_copy)
    assert outcome.status == 0
    assert f"{bundle_copy} is whole" in outcome.out
    found = json.loads(command("verify", bundle_copy, "--json").out)
    assert found["bytes"] == sum(
        p.stat().st_size for p in bundle_copy.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    path = bundle_copy / "controlnet_seg.onnx.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    assert "is damaged: controlnet_seg.onnx.data changed" in refused("verify", bundle_copy)
    assert "no bundle at" in refused("verify", bundle_copy / "nowhere")


# ---------------------------------------------------------------------------------------------------------- export


def test_export_of_what_is_there_already(command: Any, tiny: Any) -> None:
    outcome = command("export", "--model", tiny.checkpoint, "--cond", "seg", "--out", tiny.bundle)
    assert (outcome.status, outcome.out) == (0, f"{tiny.bundle}\n")
    assert "nothing to export" in outcome.err
    found = command("export", "--model", tiny.checkpoint, "--cond", "seg", "--out", tiny.bundle, "--json")
    assert json.loads(found.out)["digest"] == tiny.pipeline.bundle.digest


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "/nowhere", "--cond", "seg"], "there is no '/nowhere'"),
        (["--cond", "pose"], "unknown condition 'pose'"),
        (["--cond", "all"], "no ControlNet for 'canny'"),
        (["--cond", "seg", "--cond", "hed"], "no ControlNet for 'hed'"),
        (["--cond", "seg", "--size", "100x100"], "size 100x100 cannot be used"),
        (["--cond", "seg", "--size", "63"], "size 63x63 cannot be used"),
        (["--cond", "seg", "--size", "4096"], "size 4096x4096 cannot be used"),
        (["--cond", "seg", "--size", "64x64x64"], "cannot read size"),
        (["--cond", "seg", "--size", "-64"], "cannot read size '-64'"),
        (["--cond", "seg", "--precision", "int4"], "unknown precision 'int4'"),
        (["--cond", "seg", "--controlnet", "seg"], "give COND=SOURCE"),
        (["--cond", "seg", "--controlnet", "seg="], "give COND=SOURCE"),
        (["--cond", "seg", "--controlnet", "seg=/nowhere"], "seg ControlNet: there is no '/nowhere'"),
    ],
)
def test_exports_that_cannot_be_made(
    refused: Any, tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    if "--model" not in arguments:
        arguments = ["--model", str(tiny_checkpoint), *arguments]
    assert word in refused("export", "--out", tmp_path / "bundle", *arguments)
    assert not (tmp_path / "bundle").exists()


# ---------------------------------------------------------------------------------------------- doctor and signals


def test_doctor(command: Any, artifacts: Path) -> None:
    import onnxruntime

    found = json.loads(command("doctor", "--json").out)
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    assert found["home"] == str(artifacts)
    assert found["works"]["run on ONNX Runtime, CPU"] is None
    assert found["works"]["export checkpoints"] is None
    text = command("doctor").out
    for line in (f"cnpp-trt {__version__}, Python", "  torch 2.", "home: ", "ok       run on ONNX Runtime, CPU"):
        assert line in text


def test_doctor_on_a_bare_machine(tmp_path: Path) -> None:
    """Nothing but the standard library: it must still say what to install. The home need not exist."""
    import cnpp_trt

    init = Path(str(cnpp_trt.__file__))
    program = Path(__file__).parent.parent / "programs" / "bare_machine.py"
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path / "deep" / "home")}
    ended = subprocess.run(
        [sys.executable, program, init, init.parent], capture_output=True, text=True, timeout=60, env=env
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(f"missing  run on ONNX Runtime, CPU: {hint('cpu')}", ended.stdout), ended.stdout
    assert re.search(f"missing  export checkpoints: {hint('export,cpu')}", ended.stdout), ended.stdout
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("kind", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_interrupted_while_running(
    run: list[Any], tmp_path: Path, kind: signal.Signals, status: int, word: str
) -> None:
    long = ["--scheduler", "euler", "--steps", 1000, "--images", 16]
    arguments = [str(a) for a in [SCRIPT, *without(run, "--steps"), *long]]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        # It is in its loop once it has loaded the native libraries and used some CPU time.
        import psutil

        watched = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while process.poll() is None and watched.cpu_times().user < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert len(err.splitlines()) == 1
    assert word in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_traceback(tiny: Any) -> None:
    ended = subprocess.run(
        ["bash", "-c", f"'{SCRIPT}' verify '{tiny.bundle}' | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr


def test_debug_shows_the_traceback(tiny: Any) -> None:
    line = [SCRIPT, "verify", "--debug", tiny.bundle / "nowhere"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "Traceback" in ended.stderr
    assert "BundleError: no bundle at" in ended.stderr
