"""What the tests of the engines share: a bundle written by hand, a build that is none, and one real fp16 bundle."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cnpp_trt.bundles.bundle import Bundle, GraphSpec, Manifest, TensorSpec, write_bundle
from cnpp_trt.bundles.manifest import Defaults
from cnpp_trt.engines.flavor import Flavor, load_flavor
from cnpp_trt.engines.fusion import FusionReport
from cnpp_trt.engines.plan import BuildResult
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from fixture_cache import exported
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int | str, ...]
NO_FUSION = FusionReport(1, 0, 0, 0, 0, 0, 0, ())


@pytest.fixture(scope="session")
def rtx() -> Flavor:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'cnpp-trt[rtx]'")
    return load_flavor("tensorrt-rtx")


def write_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray] | None = None,
    dtype: int = TensorProto.FLOAT16,
    opset: int = 20,
) -> Path:
    """An ONNX file of these nodes; the weights lie inside it."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def write_product(path: Path, seed: int = 0, batch: int | str = "batch") -> Path:
    """`y = x @ w`, x fp16 [batch,16]: the smallest graph with weights; `seed` draws them."""
    weights = np.random.default_rng(seed).standard_normal((16, 16)).astype(np.float16)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    return write_onnx(path, [node], {"x": (batch, 16)}, {"y": (batch, 16)}, {"w": weights})


# The graphs of a bundle by hand, with the dimension that is free in each. The sizes grow, as in a real one.
GRAPHS: dict[str, int | str] = {
    "unet": "batch",
    "update": "guidance",
    "hint_seg": 1,
    "controlnet_seg": "batch",
    "extractor_seg": "images",
    "hint_depth": 1,
    "controlnet_depth": "batch",
}


@pytest.fixture(scope="session")
def onnx_file() -> Callable[..., Path]:
    return write_onnx


@pytest.fixture(scope="session")
def product() -> Callable[..., Path]:
    return write_product


def write_small_bundle(folder: Path, seed: int = 0, guidance_scale: float | None = None) -> Bundle:
    """A bundle with `seg` and `depth` whose graphs are a matrix product each: plans of it build in no time."""
    defaults: Defaults = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    manifest = Manifest(
        "small", f"base-{seed}", "fp16", 64, 64, 4, 8, 2, {"prediction_type": "epsilon"}, defaults=defaults
    )
    manifest.conditions = {"seg": {"controlnet": "1"}, "depth": {"controlnet": "2"}}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_bundle(folder, manifest) as staging:
        for i, (name, batch) in enumerate(GRAPHS.items()):
            write_product(staging / f"{name}.onnx", seed * len(GRAPHS) + i, batch)
            x, y = (TensorSpec(t, "float16", (batch, 16)) for t in ("x", "y"))
            manifest.graphs[name] = GraphSpec(f"{name}.onnx", (x,), (y,), 0.0, 0.0, "relative L2", 2e-2)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def small_bundle() -> Callable[..., Bundle]:
    return write_small_bundle


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A bundle of its own, that a test may damage."""
    return write_small_bundle(tmp_path / "small")


@pytest.fixture(scope="session")
def fake_built() -> Callable[..., BuildResult]:
    return make_built


def make_built(plan: bytes = b"an engine", **changes: Any) -> BuildResult:
    """What a build returns, without TensorRT."""
    fields: dict[str, Any] = {
        "fusion": NO_FUSION,
        "seconds": 1.25,
        "weights": 3,
        "activations": 5,
        "timing_cache": None,
        "peak": 7,
    }
    return BuildResult(plan=plan, **{**fields, **changes})


@pytest.fixture(scope="session")
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A real fp16 bundle with `seg`: the miniature's where it is in this checkout, else of random weights. Read only.

    The VAE's graphs are left out: they take long to export and have nothing that the others lack.
    """
    from cnpp_trt.export import graphs

    present = (MINIATURE / "unet" / "config.json").is_file()
    checkpoint = "miniature" if present else str(request.getfixturevalue("tiny_checkpoint"))
    everything = graphs.base_graphs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "base_graphs", lambda *a: (g for g in everything(*a) if not g[0].startswith("vae_")))
        folder = tmp_path_factory.mktemp("fp16") / "bundle"
        exported(
            f"fp16-without-vae-{'miniature' if present else 'tiny'}",
            folder,
            lambda out: export_bundle(Checkpoint(checkpoint), ["seg"], out, precision="fp16"),
        )
        return Bundle.open(folder)


@pytest.fixture
def real_copy(real: Bundle, tmp_path: Path) -> Bundle:
    """The real bundle, for a test that changes it."""
    return Bundle.open(shutil.copytree(real.folder, tmp_path / "bundle"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, all of it in single lines."""
    caplog.set_level("INFO", "cnpp_trt")
    yield caplog
    assert not any("\n" in message for message in caplog.messages)
