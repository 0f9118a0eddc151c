"""A UNet in two graphs, its encoder beside the ControlNets: the images are those of the whole UNet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.manifest import GraphOptions
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from fixture_cache import exported

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def split(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def export(out: Path) -> None:
        options = GraphOptions(split_unet=True)
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg", "depth"], out, options=options)

    return exported("tiny-split", tmp_path_factory.mktemp("bundles") / "split", export)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_on_a_cpu_the_halves_run_one_after_the_other(tiny: Any, split: Path, backend: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (tiny.size[1], tiny.size[0], 3), np.uint8)
    controls = (Control("seg", image), Control("depth", image, 0.5, 0.0, 0.5))
    request = Request("a house " * 30, controls=controls, long_prompt=True, num_inference_steps=4, seed=1)
    expected, found = (Pipeline.open(bundle, backend, threads=1)(request) for bundle in (tiny.bundle, split))
    np.testing.assert_allclose(found.latents, expected.latents, atol=1e-5)
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        "draws_what_the_whole_unet_draws",
        "the_encoder_has_a_stream_and_a_scratch_of_its_own",
        "a_recording_holds_the_fork_and_the_join",
        "what_cannot_be_captured_leaves_nothing_to_join",
    ],
)
def test_on_the_simulated_gpu(
    simulated_gpu: Any, tiny: Any, split: Path, tmp_path: Path, function: str, lazy: bool
) -> None:
    """Lazily, nothing runs before something waits for it: a forgotten join would show as stale data."""
    places = split, tiny.bundle, tmp_path / "plans"
    simulated_gpu.program("split_simulated", function, *places, lazy=lazy, timeout=300)
