"""The user's own data: what is read, and that every mistake in it is one line that says where."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt.benchmarks.consistency.dataset import Folder, Scenes, open_data, read_segmentation
from cnpp_trt.benchmarks.requests import FIRST_SCENE
from cnpp_trt.errors import UserError
from cnpp_trt.miniature.scenes import draw_scene
from cnpp_trt.runtime.control.palette import colors_from_labels
from cnpp_trt.runtime.images.image_files import resize
from PIL import Image

LABELS = np.random.default_rng(0).integers(0, 6, (96, 96)).astype(np.uint8)
LABELS[0] = 255


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder({"prompt": …}, "a broken line")`, with a picture of every kind to name in them."""
    colors = colors_from_labels(LABELS)
    Image.fromarray(colors).save(tmp_path / "colors.png")
    Image.fromarray(LABELS).save(tmp_path / "labels.png")
    Image.fromarray(colors).convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(tmp_path / "palette.png")
    Image.fromarray(colors).save(tmp_path / "lossy.jpg")
    Image.fromarray(colors).save(tmp_path / "lossy.webp")
    Image.fromarray(LABELS.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(LABELS + np.uint8(145)).save(tmp_path / "beyond.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / "noise.png")
    Image.fromarray(colors[:3, :3]).save(tmp_path / "small.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "colors.png").read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 36)

    def make(*lines: Any) -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "prompts.jsonl").write_text("\n".join(texts) + "\n")
        return tmp_path

    return make


def opened(folder: Path, model: Any, *conditions: str, count: int | None = None) -> Folder:
    return Folder(folder, model.pipeline, conditions or ("seg",), count)


@pytest.mark.parametrize("file", ["colors.png", "labels.png", "palette.png"])
def test_segmentation_is_read_from_colors_and_labels(folder, file):
    np.testing.assert_array_equal(read_segmentation(folder() / file), colors_from_labels(LABELS))


def test_a_folder(tiny, folder):
    path = folder({"prompt": "a", "condition": "colors.png"}, "", {"id": "x", "prompt": "", "condition": "labels.png"})
    data = opened(path, tiny)
    assert data.ids == ["1", "x"]
    assert data.title == f"2 prompts of {path.name}"
    assert [data.prompt(i) for i in range(2)] == ["a", ""]
    width, height = tiny.size
    for i in range(2):  # resized without a color of its own
        np.testing.assert_array_equal(
            data.control(i, "seg"), resize(colors_from_labels(LABELS), width, height, "nearest")
        )
    depth = resize(colors_from_labels(LABELS), width, height, "lanczos")
    np.testing.assert_array_equal(opened(path, tiny, "depth").control(0, "depth"), depth)
    fewer = opened(path, tiny, count=1)
    assert fewer.ids == ["1"]
    assert fewer.digest == data.digest  # so that more prompts go on from fewer


@pytest.mark.slow
def test_photos_are_extracted(canny, photos):
    pipeline = canny[1]
    data = Folder(photos(2), pipeline, ["canny"])
    photo = np.asarray(Image.open(photos(2, "again") / "1.png"))
    np.testing.assert_array_equal(data.control(1, "canny"), pipeline.extract("canny", photo))
    assert data.ids == ["photo 0", "photo 1"]


def test_the_digest_is_of_prompts_and_pictures(tiny, folder):
    line = {"prompt": "a", "condition": "colors.png"}
    before = opened(folder(line), tiny).digest
    assert opened(folder({**line, "prompt": "b"}), tiny).digest != before
    path = folder(line)
    assert opened(path, tiny).digest == before
    (path / "colors.png").write_bytes((path / "labels.png").read_bytes())
    assert opened(path, tiny).digest != before


GOOD = {"prompt": "a", "condition": "colors.png"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no prompt: "),
        ("\x00\x00", "is no prompt: "),
        ("3", "is no prompt: Expected `object`, got `int`"),
        ("[" * 100_000, "is no prompt: "),
        ('{"prompt": "\\ud800", "image": "x"}', "is no prompt: "),
        ({"prompt": "a"}, "has neither a condition"),
        ({"prompt": "a", "condition": ""}, "has neither a condition"),
        ({"condition": "colors.png"}, "is no prompt: Object missing required field `prompt`"),
        ({"prompt": 3, "condition": "colors.png"}, r"is no prompt: Expected `str`, got `int` - at `\$.prompt`"),
        ({"prompt": "a", "condition": 3}, r"is no prompt: Expected `str`, got `int` - at `\$.condition`"),
        ({"prompt": "a", "image": None}, r"is no prompt: Expected `str`, got `null` - at `\$.image`"),
        ({**GOOD, "id": 7}, r"is no prompt: Expected `str`, got `int` - at `\$.id`"),
        ({**GOOD, "id": "x" * 201}, r"is no prompt: Expected `str` of length <= 200 - at `\$.id`"),
        ({**GOOD, "id": "\x1b[31m"}, r"has the id '\\x1b\[31m': give one of printable characters"),
        ({**GOOD, "prompt": "x" * 100_001}, r"is no prompt: Expected `str` of length <= 100000 - at `\$.prompt`"),
        ({**GOOD, "prompt": "x" * (1 << 20)}, "has 1,048,617 bytes, more than 1,048,576"),
        ({**GOOD, "conditon": "x"}, "is no prompt: Object contains unknown field `conditon`"),
        ({**GOOD, "id": "1"}, "has the id '1' of line 1"),
        ({"prompt": "a", "condition": "nowhere.png"}, r"there is no .*nowhere.png \(No such file or directory\)"),
        ({"prompt": "a", "condition": "x" * 300}, r"there is no .*\(File name too long\)"),
        ({"prompt": "a", "condition": "x\0y"}, r"there is no .*x\\x00y \((\w+: )?embedded null (byte|character)\b.*\)"),
        ({"prompt": "a", "condition": "."}, ".* is no file"),
        ({"prompt": "a", "condition": "/dev/zero"}, "/dev/zero is no file"),
        ({"prompt": "a", "image": "pipe"}, ".*pipe is no file"),
        ({"prompt": "a", "image": "huge.png"}, ".*huge.png has 68,719,476,736 bytes, more than"),
    ],
)
def test_a_broken_line_is_named(tiny, folder, line, message):
    with pytest.raises(UserError, match=rf"prompts.jsonl, line 2: {message}") as refusal:
        opened(folder(GOOD, line), tiny)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("lossy.jpg", "is a JPEG: give a PNG; lossy compression changes labels"),
        ("lossy.webp", "is a WEBP: give a PNG"),
        ("deep.png", "has samples of mode 'I;16': save labels as a PNG with one channel of 8 bits"),
        ("beyond.png", "label 150 .*ADE20K's own files count from 1"),
        ("noise.png", r"\d+% of .* in none of ADE20K's colors"),
        ("small.png", "3x3|3×3|small"),
        ("torn.png", "truncated"),
        ("empty.png", "is empty"),
        ("prompts.jsonl", "is not an image"),
    ],
)
def test_a_bad_segmentation_is_named(tiny, folder, file, message):
    data = opened(folder(GOOD, {"prompt": "b", "condition": file}), tiny)
    data.control(0, "seg")
    with pytest.raises(UserError, match=rf"prompts.jsonl, line 2: .*({message})") as refusal:
        data.control(1, "seg")
    assert "\n" not in str(refusal.value)


def test_lossy_files_do_for_other_conditions(tiny, folder):
    path = folder({"prompt": "a", "condition": "lossy.jpg"})
    width, height = tiny.size
    assert opened(path, tiny, "depth").control(0, "depth").shape == (height, width, 3)


def test_one_control_image_is_of_one_condition(tiny, folder):
    with pytest.raises(
        UserError, match=r"line 1: colors.png is one condition of seg, depth: say which with one --cond"
    ):
        opened(folder(GOOD), tiny, "seg", "depth")


def test_folders_without_prompts(tiny, tmp_path):
    with pytest.raises(UserError, match=r"there is no .*prompts.jsonl: write one JSON object a line"):
        opened(tmp_path, tiny)
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"prompts.jsonl is empty"):
        opened(tmp_path, tiny)
    (tmp_path / "folder" / "prompts.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot read"):
        opened(tmp_path / "folder", tiny)


def test_prompts_that_are_no_bounded_file(tiny, tmp_path):
    (tmp_path / "prompts.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"cannot read .*prompts.jsonl: it is not a regular file"):
        opened(tmp_path, tiny)
    (tmp_path / "prompts.jsonl").unlink()
    (tmp_path / "prompts.jsonl").write_bytes(b"\n" * 1_000_001)
    with pytest.raises(UserError, match=r"has 1,000,002 lines, more than 1,000,000"):
        opened(tmp_path, tiny)
    (tmp_path / "prompts.jsonl").write_bytes(b"\n" * ((64 << 20) + 1))
    with pytest.raises(UserError, match=r"cannot read .*: it has 67,108,865 bytes, more than"):
        opened(tmp_path, tiny)


def test_scenes_are_for_the_embedded_models(tiny, miniature):
    with pytest.raises(UserError, match=r"there are no prompts for .*: give a folder of them with --data FOLDER"):
        open_data(tiny.pipeline, ["seg"], None, None)
    data = open_data(miniature.pipeline, ["seg"], None, None)
    assert isinstance(data, Scenes)
    assert (len(data.ids), data.title) == (64, "64 fresh scenes")
    scene = draw_scene(FIRST_SCENE + 5)
    assert data.prompt(5) == scene.caption
    np.testing.assert_array_equal(data.control(5, "seg"), colors_from_labels(scene.labels))
    np.testing.assert_array_equal(data.control(5, "depth"), miniature.pipeline.extract("depth", scene.image))
    assert Scenes(miniature.pipeline, 3).digest == data.digest
