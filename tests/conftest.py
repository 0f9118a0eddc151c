"""What the tests share: models with their bundles, exported once per session, and the command.

Every bundle here comes out of the real export. The tiny checkpoint has random weights: what it draws means nothing, but
it takes every path that real weights take, and parity does not depend on what the weights are.
"""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graph_cache
import numpy as np
import pytest
from cnpp_trt import Pipeline, cli
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.embedded import assemble
from cnpp_trt.bundles.manifest import GraphOptions
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from cnpp_trt.runtime.backends import onnxruntime_cpu, onnxruntime_cuda, onnxruntime_session
from fixture_cache import exported
from PIL import Image

# No test reaches the hub, or reads what this machine has of it: huggingface_hub looks at these when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cnpp-trt-hub-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# A shell that starts the tests in the background has them ignore SIGINT, and every process would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

graph_cache.install()

pytest_plugins = ["root_folder", "fast_round", "simulated_gpu.plugin"]

EXAMPLES = {
    "defaults": {"guidance_scale": 3.0, "num_inference_steps": 2},
    "examples": {"seg": {"image": "mine.png", "prompt": "a house of blocks", "seed": 4}},
}
SCRIPT = Path(sys.executable).parent / "cnpp-trt"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the simulated GPU or a real one is marked by what it asks for, and by its folder.

    Files with slow tests come first: workers that share the files out then end together.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if "simulated_gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.simulated_gpu)
        if item.path.is_relative_to(Path(__file__).parent / "gpu"):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """Importing the test files makes a million objects that live until the end.

    Looking for garbage among them took a third of that time; afterwards they are not looked at again.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@dataclass(frozen=True)
class Model:
    """A checkpoint, its fp32 bundle with `seg` and `depth`, and that bundle opened on the CPU.

    Compared by identity, so that fixtures and caches may be keyed by it.
    """

    name: str
    checkpoint: Path
    bundle: Path
    pipeline: Pipeline

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pipeline.bundle.manifest.width, self.pipeline.bundle.manifest.height


@pytest.fixture(scope="session", autouse=True)
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own artifacts, or depends on what is there."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNPP_TRT_HOME", str(home))
        patch.delenv("CNPP_TRT_DEBUG", raising=False)
        yield home


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny=True, conditions=("seg", "depth"))


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    exported("tiny", bundle, lambda out: export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg", "depth"], out))
    return Model("tiny", tiny_checkpoint, bundle, Pipeline.open(bundle, threads=1))


@pytest.fixture(scope="session")
def tiny_half(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp16 bundle of the tiny checkpoint, with `seg` alone. Read only."""
    folder, checkpoint = tmp_path_factory.mktemp("half") / "bundle", Checkpoint(str(tiny_checkpoint))
    return exported("tiny-fp16", folder, lambda out: export_bundle(checkpoint, ["seg"], out, precision="fp16"))


@pytest.fixture(scope="session")
def tiny_as_one(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The fp32 bundle of the tiny checkpoint whose networks compute everything at every step."""

    def export(out: Path) -> None:
        options = GraphOptions(hoist_prompt=False, hoist_time=False)
        export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg", "depth"], out, options=options)

    return Bundle.open(exported("tiny-as-one", tmp_path_factory.mktemp("bundles") / "as-one", export))


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Model:
    if not (MINIATURE / "unet" / "config.json").is_file():
        pytest.skip("the miniature's weights are not in this checkout (miniature/model)")
    bundle = tmp_path_factory.mktemp("bundles") / "miniature"
    assemble("miniature", bundle)
    return Model("miniature", MINIATURE, bundle, Pipeline.open(bundle))


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Model:
    """The miniature where it is there, else the tiny model."""
    present = (MINIATURE / "unet" / "config.json").is_file()
    found: Model = request.getfixturevalue("miniature" if present else "tiny")
    return found


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that ONNX Runtime loads from now on, in their order."""
    loaded: list[str] = []

    class Counted(onnxruntime_session.Session):
        def __init__(self, ort: Any, bundle: Any, graph: str, *arguments: Any, **options: Any) -> None:
            loaded.append(graph)
            super().__init__(ort, bundle, graph, *arguments, **options)

    for backend in (onnxruntime_cpu, onnxruntime_cuda):
        monkeypatch.setattr(backend, "Session", Counted)
    return loaded


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the package has logged since this was last called, as the command would print it."""
    caplog.set_level("INFO", "cnpp_trt")

    def take() -> list[str]:
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("cnpp_trt")]
        caplog.clear()
        return lines

    return take


@pytest.fixture
def bundle_copy(tiny: Model, tmp_path: Path) -> Path:
    """A bundle of its own for a test that damages it."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle"))


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test that damages it."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended and everything it wrote."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`command("run", "--steps", 3)`: the command in this process, with its exit status and both streams.

    Streams are taken at the file descriptors: what a native library prints counts too.
    """
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: Any) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["cnpp-trt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        return Outcome(exit_.value.code if isinstance(exit_.value.code, int) else 1, captured.out, captured.err)

    yield call
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """The command must refuse its arguments with one line and status 2; the line is returned."""

    def call(*arguments: Any) -> str:
        outcome = command(*arguments)
        lines = outcome.err.splitlines()
        assert outcome.status == 2, outcome
        assert len(lines) == 1, outcome.err
        assert outcome.out == ""
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


def run_script(*arguments: Any, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed `cnpp-trt` in a process of its own."""
    line = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}, **options
    )


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_script


def blocks(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A control image of random colored blocks: uint8 [H,W,3]."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    return np.ascontiguousarray(cells[rows][:, columns])


@pytest.fixture(scope="session")
def control_image() -> Callable[..., np.ndarray]:
    return blocks


@pytest.fixture(scope="session")
def v_prediction(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A v-prediction checkpoint with `seg` and an example, at a size that its UNet's downsampling does not divide.

    It is exported by the command, in a process of its own.
    """
    folder = tmp_path_factory.mktemp("v")
    checkpoint = make_checkpoint(folder / "checkpoint", tiny=True, prediction="v_prediction", seed=1)
    (checkpoint / "examples").mkdir()
    Image.fromarray(blocks(40, 40)).save(checkpoint / "examples" / "mine.png")
    (checkpoint / "examples" / "examples.json").write_text(json.dumps(EXAMPLES))
    bundle = folder / "bundle"

    def export(out: Path) -> None:
        ended = run_script("export", "--model", checkpoint, "--cond", "seg", "--size", "72x104", "--out", out)
        assert ended.returncode == 0, ended.stderr

    exported("v_prediction", bundle, export)
    return Model("v_prediction", checkpoint, bundle, Pipeline.open(bundle, threads=1))
