"""Shared by the benchmarks' tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Pipeline
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from fixture_cache import exported
from PIL import Image


@pytest.fixture(scope="session")
def canny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pipeline]:
    """A tiny random checkpoint whose one condition is extracted by an algorithm, and its bundle opened on the CPU."""
    folder = tmp_path_factory.mktemp("canny")
    checkpoint = make_checkpoint(folder / "checkpoint", tiny=True, conditions=("canny",))
    exported("canny", folder / "bundle", lambda out: export_bundle(Checkpoint(str(checkpoint)), ["canny"], out))
    return checkpoint, Pipeline.open(Bundle.open(folder / "bundle"), "onnxruntime-cpu", threads=1)


@pytest.fixture
def photos(tmp_path: Path, control_image: Callable[..., np.ndarray]) -> Callable[..., Path]:
    """`photos(6)`: a folder with so many prompts, each with a photo of blocks."""

    def make(count: int, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines: list[dict[str, Any]] = []
        for i in range(count):
            Image.fromarray(control_image(96, 96, i)).save(folder / f"{i}.png")
            lines.append({"id": f"photo {i}", "image": f"{i}.png", "prompt": f"{i} blocks"})
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
