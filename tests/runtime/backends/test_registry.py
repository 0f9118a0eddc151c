"""Which backend is chosen and why, on any machine; what each refuses; which bundle it gets; and starting warm."""

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cnpp_trt
import numpy as np
import onnxruntime
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import find_bundle
from cnpp_trt.errors import BackendError, BundleError, UserError
from cnpp_trt.gpu import Gpu, GpuSearch, find_gpu
from cnpp_trt.runtime.backends import cuda, onnxruntime_cuda, tensorrt
from cnpp_trt.runtime.backends import registry as choose
from cnpp_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
from cnpp_trt.runtime.backends.onnxruntime_session import OLDEST
from cnpp_trt.runtime.backends.registry import open_backend, preferred_precisions
from cnpp_trt.runtime.settings.options import BACKENDS, RuntimeOptions
from hints import hint
from PIL import Image

GPU = Gpu("NVIDIA Imaginary 9000", (12, 0), 24 << 30, "13.0")
NO_DRIVER = "no NVIDIA driver (libcuda.so.1)"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever this machine has."""
    for module in (choose, cuda):
        monkeypatch.setattr(module, "find_gpu", lambda device=0: GpuSearch(reason=NO_DRIVER))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is found when the backend is chosen; there is none to run on."""
    monkeypatch.setattr(choose, "find_gpu", lambda device=0: GpuSearch(GPU))
    monkeypatch.setattr(cuda, "find_gpu", lambda device=0: GpuSearch(reason=NO_DRIVER))


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    said = str(error.value)
    assert said
    assert "\n" not in said
    return said


# --- arguments


@pytest.mark.parametrize("name", ["", "cuda", "TensorRT", "tensorrt-rtx", "onnxruntime", "auto "])
def test_unknown_names(tiny, name):
    with pytest.raises(UserError) as error:
        open_backend(tiny.pipeline.bundle, RuntimeOptions(name))
    said = one_line(error)
    assert said.startswith(f"unknown backend {name!r}: ") and said.endswith(f"choose from {', '.join(BACKENDS)}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [0, -1, 1025, 2**40, True, False, 1.0, "2"])
def test_threads_that_are_none(tiny, no_gpu, name, threads):
    with pytest.raises(UserError) as error:
        open_backend(tiny.pipeline.bundle, RuntimeOptions(name, threads=threads))
    assert one_line(error) == f"threads must be a whole number from 1 to 1024, not {threads!r}"


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_that_are_some(tiny, threads):
    backend, reason = open_backend(tiny.pipeline.bundle, RuntimeOptions("onnxruntime-cpu", threads=threads))
    assert backend.name == "onnxruntime-cpu"
    assert reason == "asked for"
    assert backend.memory() == {}


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "openvino"])
def test_the_precision_is_the_bundles(tiny, no_gpu, name):
    with pytest.raises(UserError, match=r"is fp32 and is computed in that, not in fp16: give another bundle") as error:
        open_backend(tiny.pipeline.bundle, RuntimeOptions(name, precision="fp16"))
    one_line(error)


def test_openvino_has_no_fp16(tiny, no_gpu):
    with pytest.raises(UserError, match="openvino computes in fp32 or bf16, not in fp16"):
        open_backend(tiny.pipeline.bundle, RuntimeOptions("openvino", precision="fp16"))


# --- without a GPU


def test_auto_without_a_gpu_is_the_cpu_and_names_the_driver(tiny, no_gpu):
    backend, reason = open_backend(tiny.pipeline.bundle, RuntimeOptions())
    assert (backend.name, reason) == ("onnxruntime-cpu", NO_DRIVER)


def test_auto_on_this_machine(tiny):
    if find_gpu().gpu:
        pytest.skip("there is a GPU: tests/gpu covers it")
    pipeline = Pipeline.open(tiny.bundle)
    assert pipeline.backend.name == "onnxruntime-cpu"
    assert "NVIDIA driver" in pipeline.reason


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime-cuda"])
def test_a_gpu_backend_without_a_gpu_is_one_line(tiny, no_gpu, name):
    with pytest.raises(BackendError) as error:
        open_backend(tiny.pipeline.bundle, RuntimeOptions(name))
    assert one_line(error) == f"no GPU to run on: {NO_DRIVER}"


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime-cuda"])
def test_the_command_with_a_gpu_backend_without_a_gpu(tiny, no_gpu, command, name):
    outcome = command("run", "--bundle", tiny.bundle, "--backend", name)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == f"error: no GPU to run on: {NO_DRIVER}\n"


def test_a_gpu_without_cuda_python(tiny, fake_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "find_gpu", lambda device=0: GpuSearch(GPU))
    for module in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cuda", None)
    for name in ("tensorrt", "onnxruntime-cuda"):
        with pytest.raises(BackendError) as error:
            open_backend(tiny.pipeline.bundle, RuntimeOptions(name))
        said = one_line(error)
        extra = "rtx" if importlib.util.find_spec("tensorrt_rtx") else "gpu"
        assert re.search(f"running on a GPU needs cuda, which is not installed: .*{hint(extra)}", said), said


# --- auto, where a GPU is found


def test_auto_falls_through_and_tells_why_for_each(tiny, fake_gpu):
    backend, reason = open_backend(tiny.pipeline.bundle, RuntimeOptions())
    assert backend.name == "onnxruntime-cpu"
    why = f"no GPU to run on: {NO_DRIVER}"
    assert reason == f"not tensorrt: {why}; not onnxruntime-cuda: {why}"


@pytest.mark.parametrize(
    ("works", "expected", "reason"),
    [
        ({"tensorrt", "onnxruntime-cuda"}, "tensorrt", f"on {GPU.name}"),
        ({"onnxruntime-cuda"}, "onnxruntime-cuda", f"on {GPU.name}; not tensorrt: tensorrt is broken"),
        ((), "onnxruntime-cpu", "not tensorrt: tensorrt is broken; not onnxruntime-cuda: onnxruntime-cuda is broken"),
    ],
)  # fmt: skip
def test_auto_takes_the_first_that_works(tiny, fake_gpu, monkeypatch, tmp_path, works, expected, reason):
    given = []

    def maker(name: str) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            given.append((name, *arguments))
            if name not in works:
                raise BackendError(f"{name} is broken")
            return SimpleNamespace(name=name)

        return make

    monkeypatch.setattr(tensorrt, "TensorRt", maker("tensorrt"))
    monkeypatch.setattr(onnxruntime_cuda, "OnnxRuntimeCuda", maker("onnxruntime-cuda"))
    backend, said = open_backend(tiny.pipeline.bundle, RuntimeOptions(plans=tmp_path))
    assert (backend.name, said) == (expected, reason)
    assert given[0] == ("tensorrt", tiny.pipeline.bundle, tmp_path, None, 0, "step")
    assert given[1:] in ([], [("onnxruntime-cuda", tiny.pipeline.bundle, 0)])


def test_auto_does_not_hide_what_the_user_must_mend(tiny, fake_gpu, monkeypatch):
    def damaged(*arguments: Any) -> None:
        raise BundleError("unet.onnx is damaged")

    monkeypatch.setattr(tensorrt, "TensorRt", damaged)
    with pytest.raises(BundleError, match="is damaged"):
        open_backend(tiny.pipeline.bundle, RuntimeOptions())


# --- onnxruntime-cuda


class FakeOnnxRuntime(SimpleNamespace):
    """An `onnxruntime` with a CUDA provider whose sessions end up with `found`; `asked` is what they were given."""

    def __init__(self, found: Sequence[str], available: Sequence[str] = ("CUDAExecutionProvider",)) -> None:
        super().__init__(asked=[], entries={})
        asked, entries = self.asked, self.entries

        class Options:
            def add_session_config_entry(self, key: str, value: str) -> None: ...
            def add_run_config_entry(self, key: str, value: str) -> None:
                entries[key] = value

        class Session:
            def __init__(self, model: str | bytes, options: Any, providers: Any = None, **others: Any) -> None:
                asked.append((model, providers))

            def get_providers(self) -> list[str]:
                return list(found)

            def get_inputs(self) -> list[Any]:
                return []

            get_outputs = get_inputs

            def io_binding(self) -> Any:
                return SimpleNamespace()

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                asked.append(("run", None))

        self.get_available_providers = lambda: list(available)
        self.SessionOptions = self.RunOptions = Options
        self.InferenceSession = Session


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA part of a backend without CUDA."""

    def start(self: Any, *arguments: Any, device: int = 0) -> None:
        self.gpu, self.stream, self.index = GPU, 4321, device

    monkeypatch.setattr(cuda.Cuda, "__init__", start)
    monkeypatch.setattr(cuda.Cuda, "active", lambda self: nullcontext())
    monkeypatch.setattr(choose, "find_gpu", lambda device=0: GpuSearch(GPU))


def test_a_silent_fall_back_to_the_cpu_is_an_error(tiny, on_a_gpu, monkeypatch):
    fake = FakeOnnxRuntime(["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(BackendError) as error:
        OnnxRuntimeCuda(tiny.pipeline.bundle)
    said = one_line(error)
    assert said.startswith("ONNX Runtime fell back to the CPU: ")
    assert len(fake.asked) == 1  # it shows with the first, smallest graph
    assert fake.asked[0][0].endswith("update.onnx")


def test_auto_passes_on_from_a_silent_fall_back(tiny, on_a_gpu, monkeypatch):
    # ONNX Runtime itself serves the CPU in the end, so only what is tried before is fake.

    class Falling(onnxruntime.InferenceSession):
        def __init__(self, path: Any, options: Any = None, providers: Any = None, **others: Any) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"], **others)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Falling)
    monkeypatch.setattr(tensorrt.TensorRt, "__init__", refuse)
    backend, reason = open_backend(tiny.pipeline.bundle, RuntimeOptions())
    assert backend.name == "onnxruntime-cpu"
    assert "; not onnxruntime-cuda: ONNX Runtime fell back to the CPU: a CUDA or cuDNN library" in reason


def refuse(self: Any, *arguments: Any) -> None:
    raise BackendError("there are no plans")


def test_it_runs_on_our_stream_in_full_precision(tiny, on_a_gpu, sessions, monkeypatch):
    fake = FakeOnnxRuntime(["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    backend = OnnxRuntimeCuda(tiny.pipeline.bundle)
    assert backend.load("unet") is backend.load("unet")
    # cuDNN is looked for with the first convolution.
    assert sessions == ["update", "hint_seg", "unet"]
    assert [isinstance(model, bytes) for model, _ in fake.asked] == [False, False, True]
    assert b"MultiHeadAttention" in fake.asked[-1][0]
    for _, [(provider, options)] in fake.asked:
        assert provider == "CUDAExecutionProvider"
        assert options["user_compute_stream"] == "4321"
        assert options["use_tf32"] == "0"
    assert fake.entries["disable_synchronize_execution_providers"] == "1"
    assert backend.cuda_graphs == "off"
    with pytest.raises(BackendError, match="records nothing"):
        backend.record([])


def test_every_run_is_within_the_backends_cuda_context(tiny, on_a_gpu, monkeypatch):
    """ONNX Runtime makes the device's context current, and leaves it so: the caller's own comes back afterwards."""
    fake = FakeOnnxRuntime(["CUDAExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)

    @contextmanager
    def active(self: Any) -> Iterator[None]:
        fake.asked.append(("in", None))
        yield
        fake.asked.append(("out", None))

    monkeypatch.setattr(cuda.Cuda, "active", active)
    launch = OnnxRuntimeCuda(tiny.pipeline.bundle).load("unet").bind({})
    fake.asked.clear()
    launch()
    assert [what for what, _ in fake.asked] == ["in", "run", "out"]


def test_an_onnxruntime_without_cuda(tiny, on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOnnxRuntime([], ["CPUExecutionProvider"]))
    with pytest.raises(BackendError, match=f"this onnxruntime has no CUDA provider.*{hint('gpu')}"):
        OnnxRuntimeCuda(tiny.pipeline.bundle)


def test_no_onnxruntime_at_all(tiny, on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=f"onnxruntime-gpu, which is not installed: .*{hint('gpu')}"):
        OnnxRuntimeCuda(tiny.pipeline.bundle)
    with pytest.raises(BackendError, match=f"needs onnxruntime, which is not installed: {hint('cpu')}"):
        open_backend(tiny.pipeline.bundle, RuntimeOptions("onnxruntime-cpu"))


# --- which bundle


@pytest.mark.parametrize("name", BACKENDS)
def test_on_the_cpu_fp32_is_preferred(no_gpu, name):
    expected = ("fp16", "fp32") if name in ("tensorrt", "onnxruntime-cuda") else ("fp32", "fp16")
    assert preferred_precisions(name) == expected


@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu_fp16_is_preferred(fake_gpu, name):
    expected = ("fp32", "fp16") if name in ("onnxruntime-cpu", "openvino") else ("fp16", "fp32")
    assert preferred_precisions(name) == expected


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`bundles("house-fp32-64x64", …)`: folders of these names are all the bundles there are."""
    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))

    def make(*names: str) -> None:
        for name in names:
            (tmp_path / "bundles" / name).mkdir(parents=True)

    return make


FP16, FP32 = ("fp16", "fp32"), ("fp32", "fp16")


@pytest.mark.parametrize(
    ("names", "preferred", "expected"),
    [
        (["house-fp16-64x64", "house-fp32-64x64"], FP16, "house-fp16-64x64"),
        (["house-fp16-64x64", "house-fp32-64x64"], FP32, "house-fp32-64x64"),
        (["house-fp32-64x64"], FP16, "house-fp32-64x64"),
        (["house-fp16-64x64"], FP32, "house-fp16-64x64"),
        (["house-fp16-64x64", "house-fp32-64x64", "house-fp32-128x128"], FP16, "house-fp16-64x64"),
        # Another model's precision, or one in the model's own name, is not the bundle's.
        (["house-fp32-64x64", "house-fp16-fp32-64x64", "mouse-fp16-64x64"], FP16, "house-fp32-64x64"),
    ],
)
def test_the_preferred_precision_of_those_there_are(bundles, names, preferred, expected):
    bundles(*names)
    assert find_bundle("house", preferred=preferred).name == expected


def test_a_precision_in_the_models_name_decides_nothing(bundles):
    bundles("house-fp16-fp32-64x64", "house-fp16-fp16-64x64")
    assert find_bundle("house-fp16", preferred=FP32).name == "house-fp16-fp32-64x64"
    assert find_bundle("house-fp16", preferred=FP16).name == "house-fp16-fp16-64x64"


def test_what_was_asked_for_comes_before_what_is_preferred(bundles):
    bundles("house-fp16-64x64", "house-fp32-64x64", "house-fp32-128x128")
    assert find_bundle("house", "fp32", (64, 64), FP16).name == "house-fp32-64x64"
    assert find_bundle("house", None, (128, 128), FP16).name == "house-fp32-128x128"


def test_sizes_are_never_chosen_by_preference(bundles):
    bundles("house-fp16-64x64", "house-fp32-64x64", "house-fp32-128x128")
    with pytest.raises(UserError, match="several bundles of 'house': house-fp32-128x128, house-fp32-64x64; choose"):
        find_bundle("house", preferred=FP32)
    with pytest.raises(UserError, match="several bundles of 'house'"):
        find_bundle("house")


# --- warm


@pytest.fixture
def request_(tiny: Any, control_image: Any) -> Callable[..., Request]:
    def make(condition: str = "seg", seed: int = 3, **fields: Any) -> Request:
        control = Control(condition, control_image(*tiny.size))
        return Request("a house", "", [control], num_inference_steps=2, seed=seed, **fields)

    return make


def test_a_cold_pipeline_loads_when_it_first_draws(tiny, sessions, request_):
    pipeline = Pipeline.open(tiny.bundle, "onnxruntime-cpu", threads=1)
    assert sessions == []
    pipeline(request_())
    once = ["text_encoder", "text_kv", "text_kv_seg", "time_embeds", "time_embeds_seg"]
    assert sorted(sessions) == ["controlnet_seg", "hint_seg", *once, "unet", "update", "vae_decoder"]


def test_warm_with_a_request_the_first_one_loads_nothing(tiny, sessions, request_):
    pipeline = Pipeline.open(tiny.bundle, "onnxruntime-cpu", threads=1, warm=request_("depth", seed=None))
    assert "controlnet_depth" in sessions
    assert "controlnet_seg" not in sessions
    sessions.clear()
    programs = list(pipeline._preparation.programs.programs.values())
    drawn = pipeline(request_("depth"))
    assert sessions == []
    assert list(pipeline._preparation.programs.programs.values()) == programs
    np.testing.assert_array_equal(drawn.images, tiny.pipeline(request_("depth")).images)
    sessions.clear()
    # A loop shape that it was not warmed for is still drawn.
    pipeline(request_("seg"))
    assert sorted(sessions) == ["controlnet_seg", "hint_seg", "text_kv_seg", "time_embeds_seg"]


def test_warm_takes_the_bundles_first_condition_and_defaults(v_prediction, control_image, sessions):
    """Its defaults are two steps at guidance 3: the first request of those loads and builds nothing."""
    pipeline = Pipeline.open(v_prediction.bundle, "onnxruntime-cpu", threads=1, warm=True)
    assert "controlnet_seg" in sessions
    sessions.clear()
    programs = list(pipeline._preparation.programs.programs.values())
    control = Control("seg", control_image(*v_prediction.size))
    first = Request("a house", "", [control], num_inference_steps=2, guidance_scale=3.0, seed=3)
    drawn = pipeline(first)
    assert sessions == []
    assert list(pipeline._preparation.programs.programs.values()) == programs
    np.testing.assert_array_equal(drawn.images, v_prediction.pipeline(first).images)


def test_what_cannot_be_warmed_is_refused_when_it_is_opened(tiny, request_):
    with pytest.raises(UserError, match="canny"):
        Pipeline.open(tiny.bundle, "onnxruntime-cpu", warm=request_("canny"))


# --- the command


@pytest.fixture
def picture(tiny: Any, control_image: Any, tmp_path: Path) -> Path:
    Image.fromarray(control_image(*tiny.size)).save(tmp_path / "control.png")
    return tmp_path / "control.png"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ([], "onnxruntime-cpu", NO_DRIVER),
        (["--backend", "onnxruntime-cpu"], "onnxruntime-cpu", "asked for"),
        (["--backend", "openvino", "--precision", "f32"], "openvino", "asked for"),
    ],
)
def test_the_report_of_a_run_names_backend_reason_and_memory(
    tiny, no_gpu, command, picture, tmp_path, options, name, reason
):
    if "openvino" in options:
        pytest.importorskip("openvino")
    outcome = command(
        "run", "--bundle", tiny.bundle, "--cond", "depth", "--image", picture, "--steps", 1, "--seed", 1,
        "--out", tmp_path / "out", "--json", *options,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["backend"], report["reason"], report["memory"]) == (name, reason, {})


@pytest.mark.parametrize("name", ["auto", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"])
def test_bf16_needs_openvino(tiny, no_gpu, refused, name):
    said = refused("run", "--bundle", tiny.bundle, "--backend", name, "--precision", "bf16")
    assert said == "bf16 is a precision of the backend openvino: add --backend openvino"


@pytest.mark.parametrize("name", ["fp32", "f32", "float32", "FP32"])
def test_precisions_have_several_names(tiny, no_gpu, refused, name):
    """What is refused is the next thing: the tiny model has no example."""
    assert "ships no example" in refused("run", "--bundle", tiny.bundle, "--precision", name)
    other = refused("run", "--bundle", tiny.bundle, "--precision", name.replace("32", "16"))
    assert other.startswith(f"{tiny.bundle} is fp32, not fp16")


def test_bf16_without_any_backend_named(tiny, no_gpu, refused):
    assert "add --backend openvino" in refused("run", "--bundle", tiny.bundle, "--precision", "bf16")


def test_an_onnxruntime_that_is_too_old_hears_which_one_is_needed(tiny, monkeypatch):
    """Its words are those of onnxruntime 1.22 for a graph of opset 23."""

    def session(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(
            "[ONNXRuntimeError] : 1 : FAIL : Load model from update.onnx failed: ONNX Runtime only *guarantees* "
            "support for models stamped with official released onnx opset versions. Opset 23 is under development and "
            "support for this is limited. Current official support for domain ai.onnx is till opset 22."
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.0")
    with pytest.raises(BackendError) as error:
        open_backend(tiny.pipeline.bundle, RuntimeOptions("onnxruntime-cpu"))[0].load("update")
    said = one_line(error)
    assert said.startswith("onnxruntime 1.22.0 is too old for ")
    assert f"version {OLDEST} or newer is needed" in said
    assert re.search(hint("cpu"), said)
    # What is promised is what is installed.
    requires = tomllib.loads((Path(cnpp_trt.__file__).parent / "pyproject.toml").read_text("utf-8"))
    assert f"onnxruntime>={OLDEST}" in requires["project"]["optional-dependencies"]["cpu"]
