"""Thresholds and what misses them."""

import tomllib
from pathlib import Path

import pytest
from cnpp_trt.benchmarks.parity.thresholds import DEFAULTS, PRECISIONS, read_thresholds, violations
from cnpp_trt.benchmarks.records import NOT_FINITE, GraphParity, ImageParity, StepParity
from cnpp_trt.errors import UserError


def graph(name: str, relative_l2: float) -> GraphParity:
    return GraphParity(
        graph=name, launches=1, max_abs=0.0, relative_l2=relative_l2, cosine=1.0, worst=f"{name} step 3 (seg): mid"
    )


STEPS = StepParity(condition="seg", free=[0.9, 0.2], forced=[0.1, 0.3])
IMAGES = ImageParity(condition="hed", max_difference=[1, 4], psnr=[None, 40.0], ssim=[1.0, 0.8], lpips=[0.0, 0.3])


@pytest.mark.parametrize(
    ("threshold", "met", "not_met", "named"),
    [
        ("graph_relative_l2", 0.5, 0.49, "graph unet, worst at unet step 3 (seg): mid: 0.5"),
        ("pixels_relative_l2", 0.4, 0.39, "graph vae_decoder, "),
        ("labels_relative_l2", 0.3, 0.29, "graph extractor_seg, "),
        ("forced_relative_l2", 0.3, 0.29, "seg, step 2 by itself"),
        ("free_relative_l2", 0.2, 0.19, "seg, latents of the whole loop"),
        ("image_max_difference", 4, 3, "hed, worst of 2 images, largest difference: 4"),
        ("image_psnr", 40, 40.1, "hed, worst of 2 images, PSNR: 40"),
        ("image_ssim", 0.8, 0.81, "hed, worst of 2 images, SSIM: 0.8"),
        ("image_lpips", 0.3, 0.29, "hed, worst of 2 images, LPIPS: 0.3"),
    ],
)
def test_a_value_at_its_threshold_is_met_and_beyond_it_is_not(threshold, met, not_met, named):
    graphs = [graph("unet", 0.5), graph("vae_decoder", 0.4), graph("extractor_seg", 0.3)]
    assert violations({threshold: met}, graphs, [STEPS], [IMAGES]) == []
    (line,) = violations({threshold: not_met}, graphs, [STEPS], [IMAGES])
    assert line.startswith(named)
    assert line.endswith(f"{not_met:.4g} ({threshold})")


def test_what_is_not_finite_or_equal_or_unknown():
    assert len(violations({"graph_relative_l2": 1e300}, [graph("unet", NOT_FINITE)])) == 1
    assert len(violations({"graph_relative_l2": 1.0}, [graph("unet", float("nan"))])) == 1
    equal = ImageParity(condition="hed", max_difference=[0], psnr=[None], ssim=[1.0], lpips=None)
    assert violations({"image_psnr": 1000.0, "image_lpips": 0.0}, [], [], [equal]) == []


def test_the_defaults_judge_every_kind_of_value():
    assert set(tomllib.loads(DEFAULTS.read_text("utf-8"))) == set(PRECISIONS)
    for precision in PRECISIONS:
        assert {"graph_relative_l2", "image_psnr"} <= read_thresholds(precision).keys()
        assert ("forced_relative_l2" in read_thresholds(precision)) == (precision in ("fp32", "fp16", "bf16"))
    assert read_thresholds("fp32")["image_max_difference"] == 1
    assert read_thresholds("fp16")["image_psnr"] == 35


def test_a_file_replaces_what_it_names(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[fp32]\nimage_psnr = 99\nimage_lpips = 0.5\n")
    defaults = read_thresholds("fp32")
    assert read_thresholds("fp32", file) == {**defaults, "image_psnr": 99.0, "image_lpips": 0.5}
    assert read_thresholds("fp16", file) == read_thresholds("fp16")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[fp32]\nimage_psnrr = 35", "unknown threshold fp32.image_psnrr"),
        (b"[fp64]\nimage_psnr = 35", "'fp64' is no table of thresholds"),
        (b"image_psnr = 35", "'image_psnr' is no table"),
        (b"[fp16]\nimage_psnr = '35'", "fp16.image_psnr must be a number, not '35'"),
        (b"[fp16]\nimage_psnr = true", "must be a number, not True"),
        (b"[fp16]\nimage_psnr = inf", "must be a number, not inf"),
        (b"[fp16]\nimage_psnr = nan", "must be a number, not nan"),
        (b"[fp16]\nimage_psnr = 1" + b"0" * 400, "fp16.image_psnr must be a number, not 1000"),
        (b"[fp16]\nimage_psnr = 1" + b"0" * 5000, "cannot read the thresholds"),
        (b"[fp16]\nimage_psnr = 2026-01-01", "must be a number, not datetime"),
        (b'[fp16]\n"\\u001b[31m" = 3', "unknown threshold fp16.\\\\x1b.31m: there are"),
        (b"a = " + b"[" * 100_000, "cannot read the thresholds .*: it is nested too deeply"),
        (b"#" * (1 << 20) + b"\n", "cannot read the thresholds .*: it has 1,048,577 bytes, more than"),
        (b"[fp32\n", "cannot read the thresholds"),
        (b"\xff\xfe", "cannot read the thresholds"),
        (None, "cannot read the thresholds"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, content, expected):
    """Whatever precision is asked for: a misspelt line of another table is a mistake too."""
    file = tmp_path / "mine.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=expected) as e:
        read_thresholds("fp32", file)
    assert "\n" not in str(e.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the thresholds"):
        read_thresholds("fp32", tmp_path)


def test_an_endless_file_is_refused():
    with pytest.raises(UserError, match="cannot read the thresholds /dev/zero: it is not a regular file"):
        read_thresholds("fp32", Path("/dev/zero"))
