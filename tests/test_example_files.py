"""Every program of examples/ runs as its docstring says, and its pictures are what it promises."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cnpp_trt
import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.runtime.sampling.scheduler_names import read_scheduler
from PIL import Image

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
# The PNG files that each writes.
WRITTEN = {
    "batch_of_requests": [
        f"{time}/{file}" for time in ("dawn", "dusk", "night", "noon") for file in ("image-0", "sheet")
    ],
    "image_to_image": ["first/image-0", "first/sheet", "variation/image-0", "variation/sheet"],
    "lora_and_lcm": ["image-0", "image-1", "sheet"],
    "miniature_on_cpu": ["image-0", "sheet"],
    "own_condition_and_scheduler": ["dpmpp_2m/image-0", "dpmpp_2m/sheet", "euler/image-0", "euler/sheet", "map"],
    "two_controls": ["image-0", "sheet"],
}


@pytest.fixture(scope="session")
def lcm(miniature: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "miniature-lcm"
    assemble("miniature-lcm", out)
    return out


@pytest.fixture
def ran(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """`ran(name)`: what the example prints and the folder that it writes."""

    def run(name: str) -> tuple[str, Path]:
        bundle = (
            request.getfixturevalue("lcm") if name == "lora_and_lcm" else request.getfixturevalue("miniature").bundle
        )
        out = tmp_path / "pictures" / name
        ended = subprocess.run(
            [sys.executable, FOLDER / f"{name}.py", bundle, out],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "CNPP_TRT_HOME": str(tmp_path / "home")},
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr == ""
        files = sorted(path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.png"))
        assert files == WRITTEN[name]
        for path in out.rglob("*.png"):
            if path.stem != "sheet":
                assert pixels(path).shape == (128, 128, 3), path
        return ended.stdout, out

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def example_map(pipeline: Pipeline) -> Path:
    return pipeline.bundle.file(pipeline.bundle.manifest.conditions["seg"].get("image", ""))


def seg_score(pipeline: Pipeline, image: Path, control: Path | None = None) -> float:
    return pipeline.score("seg", control or example_map(pipeline), image).value


def low(pipeline: Pipeline, condition: str = "seg") -> float:
    """What nine of ten pictures of the model reach."""
    typical = pipeline.bundle.manifest.conditions[condition].get("typical_score")
    assert typical is not None
    return typical["low"]


def test_there_are_examples() -> None:
    assert sorted(WRITTEN) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_uses_public_names_alone(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text("utf-8")
    assert len(source.splitlines()) <= 60
    tree = ast.parse(source)
    assert f"python examples/{name}.py [BUNDLE] [OUT]" in (ast.get_docstring(tree) or "")
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    for node in imported:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnpp_trt"):
            assert node.module == "cnpp_trt"
            assert {alias.name for alias in node.names} <= set(cnpp_trt.__all__)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cnpp_trt") for alias in node.names)


def test_the_picture_of_miniature_on_cpu(ran: Any, miniature: Any) -> None:
    said, out = ran("miniature_on_cpu")
    score = seg_score(miniature.pipeline, out / "image-0.png")
    assert score >= low(miniature.pipeline)
    assert f"mIoU {score:.2f}" in said
    # Another process, another number of threads, the same picture but for the order of additions.
    example = miniature.pipeline.bundle.manifest.conditions["seg"]
    control = Control("seg", example_map(miniature.pipeline))
    here = miniature.pipeline(example["prompt"], control, seed=example["seed"]).images[0]
    assert np.abs(here.astype(int) - pixels(out / "image-0.png")).max() <= 1


def test_the_variation_of_image_to_image_is_at_night(ran: Any, miniature: Any) -> None:
    _, out = ran("image_to_image")
    for name in ("first", "variation"):
        assert seg_score(miniature.pipeline, out / name / "image-0.png") > 85
    day, night = (pixels(out / name / "image-0.png").astype(float) for name in ("first", "variation"))
    assert night.mean() < 0.6 * day.mean()
    # It keeps the first picture's composition: a picture of another map has other edges.
    assert np.corrcoef(day.mean(2).ravel(), night.mean(2).ravel())[0, 1] > 0.4


def test_two_controls_are_both_followed(ran: Any, miniature: Any) -> None:
    said, out = ran("two_controls")
    assert seg_score(miniature.pipeline, out / "image-0.png") >= low(miniature.pipeline)
    depth = next(line for line in said.splitlines() if " depth: RMSE " in line)
    assert float(depth.partition("RMSE ")[2].partition(",")[0]) <= low(miniature.pipeline, "depth")


def test_lora_and_lcm_takes_four_unguided_steps(ran: Any, lcm: Path) -> None:
    said, out = ran("lora_and_lcm")
    assert said.startswith("lcm, 4 steps, guidance 1\n")
    pipeline = Pipeline.open(lcm, threads=1)
    assert all(seg_score(pipeline, out / f"image-{i}.png") >= 88 for i in range(2))
    assert (pixels(out / "image-0.png") != pixels(out / "image-1.png")).any()


def test_a_request_of_the_batch_is_the_one_it_is_alone(ran: Any, miniature: Any) -> None:
    said, out = ran("batch_of_requests")
    assert "step 20 of 20\n" in said
    control = Control("seg", example_map(miniature.pipeline))
    prompt = "a white house and oak trees in a golden field by a road, snowy mountains, at dusk"
    alone = miniature.pipeline(Request(prompt, controls=control, seed=2, guidance_scale=3.0)).images[0]
    assert np.abs(alone.astype(int) - pixels(out / "dusk" / "image-0.png")).max() <= 1
    for time in ("dawn", "noon", "dusk", "night"):
        assert seg_score(miniature.pipeline, out / time / "image-0.png") > 88


def test_the_drawn_map_is_followed_with_each_scheduler(ran: Any, miniature: Any) -> None:
    said, out = ran("own_condition_and_scheduler")
    for name in ("dpmpp_2m", "euler"):
        assert seg_score(miniature.pipeline, out / name / "image-0.png", out / "map.png") > 80
    for line in said.splitlines():
        name, in_diffusers = line.partition(".png: ")[2].split(": ")[0].split(", in diffusers ")
        assert read_scheduler(in_diffusers) == name


def test_an_example_draws_the_same_picture_again(ran: Any) -> None:
    _, out = ran("miniature_on_cpu")
    first = pixels(out / "image-0.png")
    (out / "image-0.png").unlink()
    (out / "sheet.png").unlink()
    _, out = ran("miniature_on_cpu")
    assert (pixels(out / "image-0.png") == first).all()
