"""The few-step miniature as a bundle, its example images in a folder, and jobs on them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt import Pipeline
from cnpp_trt.bundles.embedded import assemble

Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """On one thread, as the jobs here are drawn."""
    folder = tmp_path_factory.mktemp("bundles") / "miniature-lcm"
    assemble("miniature-lcm", folder)
    return Pipeline.open(folder, "onnxruntime-cpu", threads=1)


@pytest.fixture
def here(lcm: Pipeline, tmp_path: Path) -> Path:
    """A folder with an example image of each condition, `seg.png`, … , and a photo."""
    bundle = lcm.bundle
    for name, condition in bundle.manifest.conditions.items():
        shutil.copy(bundle.file(condition.get("image", "")), tmp_path / f"{name}.png")
    result = lcm("a house", seed=3)
    result.pil()[0].save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def mixed(lcm: Pipeline) -> Rows:
    """Ten rows of five conditions."""
    conditions = list(lcm.bundle.manifest.conditions)
    return [
        {
            "prompt": f"a house number {i}",
            "seed": i,
            "num_inference_steps": 2,
            "controls": [{"condition": conditions[i % 5], "image": f"{conditions[i % 5]}.png"}],
        }
        for i in range(10)
    ]


@pytest.fixture
def written(here: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines; a row may be text as it stands."""

    def write(rows: list[Any], name: str = "jobs.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (here / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")
        return here / name

    return write


@pytest.fixture
def batch(command: Callable[..., Any], lcm: Pipeline, here: Path) -> Callable[..., Any]:
    """`batch(jobs, "--strict", out="other")`: the command on one thread, into a folder beside the rows."""

    def call(jobs: Path, *arguments: Any, out: str = "out") -> Any:
        options = ("--bundle", lcm.bundle.folder, "--backend", "onnxruntime-cpu", "--threads", 1)
        return command("batch", jobs, "--out", here / out, *options, *arguments)

    return call


def lines_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def results(here: Path) -> Callable[..., Rows]:
    """The lines of a job's results."""
    return lambda out="out": lines_of(here / out / "results.jsonl")


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file of a job, but for the times that it took."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name != "timings.jsonl"}

    return read
