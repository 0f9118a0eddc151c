"""What the tests on an NVIDIA GPU share. Without one every test here is skipped, for one reason.

Where there is one, each backend that is not installed or that refuses this GPU is skipped with its own words. With
CNPP_TRT_GPU_REPORT=FILE the tests append what they found and measured to that file.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.engines.build import Sizes, build_engines
from cnpp_trt.engines.flavor import load_flavor
from cnpp_trt.engines.plan import BuilderSettings
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import BackendError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.gpu import Gpu, find_gpu
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from cnpp_trt.runtime.backends.tensorrt import TensorRt
from requested import controls_of

FLAVORS = ("tensorrt", "tensorrt-rtx")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture, and in one place: pytest prints the reason once for all tests."""
    found = find_gpu()
    if found.gpu is None:
        pytest.skip(f"these tests need an NVIDIA GPU, and there is none: {found.reason}")


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    found = find_gpu().gpu
    assert isinstance(found, Gpu)
    return found


@pytest.fixture(scope="session")
def report() -> Callable[[str], None]:
    """Prints a line, and appends it to the file that CNPP_TRT_GPU_REPORT names."""
    file = os.environ.get("CNPP_TRT_GPU_REPORT")

    def tell(line: str) -> None:
        print(line)
        if file:
            with Path(file).open("a", encoding="utf-8") as f:
                f.write(f"{line}\n")

    return tell


# --- bundles and the reference


def _export(folder: Path, precision: str) -> Bundle:
    if not (MINIATURE / "unet" / "config.json").is_file():
        pytest.skip("the miniature's weights are not in this checkout (miniature/model)")
    return export_bundle(Checkpoint("miniature"), list(CONDITIONS), folder / precision, precision=precision)


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The miniature with every condition."""
    return _export(tmp_path_factory.mktemp("bundles"), "fp32")


@pytest.fixture(scope="session")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _export(tmp_path_factory.mktemp("bundles"), "fp16")


class Remembering:
    """A pipeline that draws the image of a condition and a seed once: several backends are compared with it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.bundle, self.extract = pipeline.bundle, pipeline.extract
        self._pipeline = pipeline
        self._drawn: dict[tuple[Any, ...], Any] = {}

    def __call__(self, request: Request) -> Any:
        key = (controls_of(request)[0].condition, request.seed)
        if key not in self._drawn:
            self._drawn[key] = self._pipeline(request)
        return self._drawn[key]


@pytest.fixture(scope="session")
def reference(fp32: Bundle) -> Remembering:
    """ONNX Runtime on the CPU in fp32. For `compare` only: it knows a request by its condition and seed."""
    return Remembering(Pipeline.open(fp32, "onnxruntime-cpu"))


# --- backends


@dataclass(frozen=True)
class Tried:
    """What became of a flavor here.

    Attributes:
        version: empty where it is not installed.
        plans: the store with its plans; None where there is not one.
        refusal: why it does not run here, in its own words; empty where it does.
    """

    version: str
    plans: Path | None
    refusal: str


Try = Callable[[str], Tried]


@pytest.fixture(scope="session")
def try_flavor(fp16: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Try:
    """Builds a flavor's plans and loads one, the first time that it is asked for."""
    tried: dict[str, Tried] = {}

    def find(name: str) -> Tried:
        if name not in tried:
            tried[name] = _try(name, fp16, tmp_path_factory.mktemp(name))
        return tried[name]

    return find


def _try(name: str, bundle: Bundle, folder: Path) -> Tried:
    try:
        flavor = load_flavor(name)
    except BackendError as e:
        return Tried("", None, str(e))
    store = PlanStore(folder)
    sizes = Sizes((1, 2), (True, False))
    try:
        build_engines(bundle, list(bundle.manifest.conditions), flavor, store, sizes, BuilderSettings())
    except BackendError as e:
        if store.plans():
            raise  # it builds here, and not this graph
        return Tried(flavor.version, None, str(e))
    try:
        load_plan(bundle, folder)
    except BackendError as e:
        return Tried(flavor.version, folder, str(e))
    return Tried(flavor.version, folder, "")


def load_plan(bundle: Bundle, folder: Path) -> None:
    """Loads the plan of `update` and makes a context of it. Raises: BackendError where TensorRT refuses."""
    backend = TensorRt(bundle, folder)
    plan = backend._plans("update")[0]
    shapes = {name: sizes.opt for name, sizes in plan._profiles()[0].items()}
    backend.engine(plan).context(0, shapes)


Open = Callable[..., Pipeline]


@pytest.fixture(scope="session", params=FLAVORS)
def open_tensorrt(request: pytest.FixtureRequest, fp16: Bundle, try_flavor: Try) -> Open:
    """`open_tensorrt(warm=…)`: a new pipeline on a flavor's plans of the fp16 bundle."""
    return _plans_opener(fp16, try_flavor(request.param))


@pytest.fixture(scope="session")
def open_cuda(fp32: Bundle) -> Open:
    """`open_cuda(warm=…)`: a new pipeline on `onnxruntime-cuda` and the fp32 bundle."""
    try:
        Pipeline.open(fp32, "onnxruntime-cuda")
    except BackendError as e:
        if str(e).startswith("CUDA failed"):
            raise  # CUDA works here, and we use it wrongly
        pytest.skip(str(e))
    return _opener(fp32, "onnxruntime-cuda", None)


def _plans_opener(bundle: Bundle, tried: Tried) -> Open:
    if tried.refusal:
        pytest.skip(tried.refusal)
    return _opener(bundle, "tensorrt", tried.plans)


def _opener(bundle: Bundle, backend: str, plans: Path | None) -> Open:
    def opened(**options: Any) -> Pipeline:
        return Pipeline.open(bundle, backend, plans=plans, **options)

    opened.arguments = (bundle.folder, backend, plans or "")  # type: ignore[attr-defined]
    return opened


@pytest.fixture(scope="session", params=[*FLAVORS, "onnxruntime-cuda"])
def open_any(request: pytest.FixtureRequest, fp16: Bundle, try_flavor: Try) -> Open:
    """Each backend of a GPU."""
    if request.param == "onnxruntime-cuda":
        opener: Open = request.getfixturevalue("open_cuda")
        return opener
    return _plans_opener(fp16, try_flavor(request.param))


@pytest.fixture(scope="session")
def tensorrt(open_tensorrt: Open) -> Pipeline:
    return open_tensorrt()


@pytest.fixture(scope="session")
def cuda(open_cuda: Open) -> Pipeline:
    return open_cuda()


@pytest.fixture(scope="session")
def pipeline(open_any: Open) -> Pipeline:
    return open_any()


# --- requests


@pytest.fixture(scope="session")
def ask(fp32: Bundle, control_image: Callable[..., np.ndarray]) -> Callable[..., Request]:
    """`ask("seg", "depth", image=2, scale=0.5, steps=3, …)`: a request; `image` draws the control image."""
    m = fp32.manifest

    def make(*conditions: str, image: int = 0, scale: float = 1.0, steps: int = 6, **fields: Any) -> Request:
        controls = [Control(c, control_image(m.width, m.height, image), scale) for c in conditions or ("seg",)]
        given = {"controls": controls, "prompt": "a house", "guidance_scale": 4.0, "seed": 1, **fields}
        return Request(num_inference_steps=steps, **given)

    return make


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """`python(program, argument, …)`: what a program of tests/programs prints in a fresh interpreter."""

    def run(program: str, *arguments: Any) -> str:
        script = Path(__file__).parent.parent / "programs" / f"{program}.py"
        line = [sys.executable, str(script), *map(str, arguments)]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    return run
