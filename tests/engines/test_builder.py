"""One graph → one plan, by the real TensorRT-RTX: what comes out, what is refused, and that it can be stopped."""

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines import builder
from cnpp_trt.engines.build import Sizes
from cnpp_trt.engines.builder import build_plan
from cnpp_trt.engines.flavor import Flavor
from cnpp_trt.engines.fusion import parse_layers
from cnpp_trt.engines.plan import BuilderSettings, BuildResult, Range
from cnpp_trt.errors import BackendError, UserError
from onnx import TensorProto, helper

pytestmark = pytest.mark.slow


def fixed(*shape: int) -> Range:
    return Range(shape, shape, shape)


@pytest.fixture
def engine_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT itself says of every engine that is built: its layers, then its inputs and outputs."""
    texts: list[str] = []
    monkeypatch.setattr(builder, "parse_layers", lambda text: (texts.append(text), parse_layers(text))[1])
    return texts


def tensors(log: str) -> dict[str, tuple[str, list[tuple[int, ...]]]]:
    """Of every input and output of an engine: its type, and min, opt and max of every profile one after another."""
    found = {}
    for name, dtype, rest in re.findall(r"^ Name: (\w+), IOMode: \w+, DataType: (\w+), (.*)$", log, re.MULTILINE):
        sizes = re.findall(r"(?:Min|Opt|Max)Shape: \[([\d,]*)\]", rest)
        found[name] = (dtype, [tuple(map(int, filter(None, size.split(",")))) for size in sizes])
    return found


def refusal(*arguments: Any) -> str:
    with pytest.raises(BackendError) as refused:
        build_plan(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ----------------------------------------------------------------------------------------------------- what comes out


def test_a_static_plan(rtx: Flavor, product: Any, tmp_path: Path, engine_log: list[str]) -> None:
    built = build_plan(rtx, product(tmp_path / "a.onnx"), [{"x": fixed(2, 16)}], BuilderSettings())
    assert tensors(engine_log[0]) == {"x": ("Half", [(2, 16)] * 3), "y": ("Half", [])}
    assert bytes(built.plan)[1:4] == b"trt"
    assert built.fusion.layers == 1
    assert built.weights >= 16 * 16 * 2
    assert built.seconds > 0
    assert built.peak > 2**20
    assert built.timing_cache is None


def test_several_profiles_in_one_plan(rtx: Flavor, product: Any, tmp_path: Path, engine_log: list[str]) -> None:
    profiles = [{"x": fixed(n, 16)} for n in (1, 3, 5)]
    build_plan(rtx, product(tmp_path / "a.onnx"), profiles, BuilderSettings())
    assert tensors(engine_log[0])["x"][1] == [(n, 16) for n in (1, 3, 5) for _ in range(3)]


def test_a_range_of_sizes(rtx: Flavor, product: Any, tmp_path: Path, engine_log: list[str]) -> None:
    build_plan(rtx, product(tmp_path / "a.onnx"), [{"x": Range((1, 16), (2, 16), (8, 16))}], BuilderSettings(1))
    assert tensors(engine_log[0])["x"][1] == [(1, 16), (2, 16), (8, 16)]


def test_the_weights_are_in_the_plan(rtx: Flavor, product: Any, tmp_path: Path) -> None:
    def plan(name: str, seed: int) -> bytes:
        return bytes(build_plan(rtx, product(tmp_path / name, seed), [{"x": fixed(2, 16)}], BuilderSettings()).plan)

    first = plan("a.onnx", 0)
    assert len(first) > 16 * 16 * 2
    assert plan("b.onnx", 0) == first
    assert plan("c.onnx", 1) != first


def test_the_types_are_the_graphs_own(
    rtx: Flavor, onnx_file: Any, product: Any, tmp_path: Path, engine_log: list[str]
) -> None:
    """A picture stays uint8 on both sides: nothing is converted on the host."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT16, name="in"),
        helper.make_node("Add", ["f", "f"], ["g"], name="add"),
        helper.make_node("Cast", ["g"], ["y"], to=TensorProto.UINT8, name="out"),
    ]
    picture = onnx_file(tmp_path / "p.onnx", nodes, {"x": ("n", 8)}, {"y": ("n", 8)}, dtype=TensorProto.UINT8)
    built = build_plan(rtx, picture, [{"x": fixed(2, 8)}], BuilderSettings())
    assert {name: dtype for name, (dtype, _) in tensors(engine_log[0]).items()} == {"x": "UInt8", "y": "UInt8"}
    assert (built.fusion.casts, built.fusion.casts_left) == (2, 0)
    weights = np.ones((8, 8), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    exact = onnx_file(tmp_path / "f.onnx", [node], {"x": ("n", 8)}, {"y": ("n", 8)}, {"w": weights}, TensorProto.FLOAT)
    build_plan(rtx, exact, [{"x": fixed(2, 8)}], BuilderSettings())
    assert {dtype for dtype, _ in tensors(engine_log[1]).values()} == {"Float"}


@pytest.mark.parametrize("sizes", [Sizes((1, 3)), Sizes((1, 3), dynamic=True)], ids=["profiles", "range"])
def test_a_real_text_encoder(real: Bundle, rtx: Flavor, engine_log: list[str], sizes: Sizes) -> None:
    spec = real.graph("text_encoder")
    profiles = sizes.profiles(spec)
    built = build_plan(rtx, real.folder / spec.file, profiles, BuilderSettings())
    length, width = 77, spec.outputs[0].shape[-1]
    assert isinstance(width, int)
    wanted = [2, 2, 6] if sizes.dynamic else [2, 2, 2, 6, 6, 6]
    assert tensors(engine_log[0])["input_ids"] == ("Int64", [(n, length) for n in wanted])
    assert tensors(engine_log[0])["clip_skip"] == ("Int64", [(n,) for n in wanted])
    assert tensors(engine_log[0])["prompt_embeds"][0] == "Half"
    stored = sum(np.prod(t.dims) for t in onnx.load(real.folder / spec.file).graph.initializer if len(t.dims) > 1)
    assert len(bytes(built.plan)) > 2 * stored > 2 * width * width


def test_the_real_update_graph(real: Bundle, rtx: Flavor, engine_log: list[str]) -> None:
    """Guided, guided as before, or not; one image or two; the sampler's tensors are float32."""
    spec = real.graph("update")
    build_plan(rtx, real.folder / spec.file, Sizes((1, 2), (True, False)).profiles(spec), BuilderSettings(0))
    found = tensors(engine_log[0])
    assert found["x0_limit"] == ("Float", [(1,)] * 18)
    assert found["coefficients"] == ("Float", [(5, 7)] * 18)
    assert found["new_state"][0] == "Float"


def test_a_real_picture_graph(real: Bundle, rtx: Flavor, engine_log: list[str]) -> None:
    if "extractor_seg" not in real.manifest.graphs:
        pytest.skip("the miniature's weights are not in this checkout (miniature/model)")
    spec = real.graph("extractor_seg")
    build_plan(rtx, real.folder / spec.file, Sizes((1, 2)).profiles(spec), BuilderSettings(0))
    height, width = real.manifest.height, real.manifest.width
    assert tensors(engine_log[0]) == {"image": ("UInt8", [(1, height, width, 3)] * 3), "map": ("UInt8", [])}


# ------------------------------------------------------------------------------------------------------ what is refused


def test_an_operator_that_does_not_exist(
    rtx: Flavor, onnx_file: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="/down/fine"),
        helper.make_node("Frobnicate", ["r"], ["y"], name="/down/the_bad_one"),
    ]
    path = onnx_file(tmp_path / "bad.onnx", nodes, {"x": ("n", 8)}, {"y": ("n", 8)})
    line = refusal(rtx, path, [{"x": fixed(2, 8)}], BuilderSettings())
    assert "Frobnicate" in line
    assert "/down/the_bad_one" in line
    assert "/down/fine" not in line
    assert str(path) in line
    assert f" capability {path}" in line  # the command that says more
    assert rtx.version in line
    assert capfd.readouterr() == ("", "")


def test_shapes_that_do_not_fit(rtx: Flavor, onnx_file: Any, tmp_path: Path) -> None:
    """The graph parses; only the sizes that are asked for make it wrong."""
    node = helper.make_node("Add", ["x", "z"], ["y"], name="/mid/the_sum")
    path = onnx_file(tmp_path / "add.onnx", [node], {"x": ("a", 8), "z": ("b", 8)}, {"y": ("c", 8)})
    assert build_plan(rtx, path, [{"x": fixed(2, 8), "z": fixed(2, 8)}], BuilderSettings()).plan
    line = refusal(rtx, path, [{"x": fixed(2, 8), "z": fixed(3, 8)}], BuilderSettings())
    assert "/mid/the_sum" in line
    several = [{"x": fixed(2, 8), "z": fixed(n, 8)} for n in (3, 5)]
    assert "/mid/the_sum" in refusal(rtx, path, several, BuilderSettings())


@pytest.mark.parametrize("content", [b"this is no model", b"", None], ids=["junk", "empty", "missing"])
def test_a_file_that_is_no_graph(rtx: Flavor, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "graph.onnx"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(rtx, path, [{"x": fixed(2, 8)}], BuilderSettings())


def test_what_tensorrt_raises_is_one_line(
    rtx: Flavor, product: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It builds in a thread of its own, whose exceptions Python prints and forgets."""

    def build(*arguments: Any) -> None:
        raise MemoryError("std::bad_alloc\nin TensorRT")

    monkeypatch.setattr(rtx.trt.Builder, "build_serialized_network", build)
    path = product(tmp_path / "a.onnx")
    said = refusal(rtx, path, [{"x": fixed(2, 16)}], BuilderSettings())
    assert said == f"tensorrt-rtx {rtx.version} cannot build {path}: std::bad_alloc in TensorRT"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("level", [-1, 6, 100])
def test_a_level_out_of_range(level: int) -> None:
    with pytest.raises(UserError, match=f"optimization level {level} cannot be used: 0 to 5"):
        BuilderSettings(level)


def test_plans_can_be_captured_and_are_built_for_the_gpus_that_were_asked_for(rtx: Flavor) -> None:
    """ "REQUIRE_USER_ALLOCATION ensures that inference will support graph capture" (TensorRT-RTX's documents)."""
    trt, log = rtx.trt, rtx.logger()
    made = rtx.create("start its builder", trt.Builder, log, log=log)
    config = builder._config(rtx, made, BuilderSettings(), None, log)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config = builder._config(rtx.building_for([89, 120, 89]), made, BuilderSettings(), None, log)
    assert config.num_compute_capabilities == 2
    first, second = (config.get_compute_capability(i) for i in range(2))
    assert (first, second) == (trt.ComputeCapability.SM89, trt.ComputeCapability.SM120)
    with pytest.raises(UserError, match="builds for no GPU of 90: choose of 75, 80, 86, 89, 120, 121"):
        rtx.building_for([90])


def test_the_largest_profile_counts() -> None:
    """TensorRT prints the activations of each profile."""
    log = "Total Activation Memory: 4096 bytes\nTotal Weights Memory: 10 bytes\nTotal Activation Memory: 2048 bytes"
    assert (builder._bytes(log, "Total Activation Memory"), builder._bytes(log, "Total Weights Memory")) == (4096, 10)
    assert builder._bytes(log, "Total Scratch Memory") == 0


def test_every_level_reaches_tensorrt(
    rtx: Flavor, product: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[Any] = []
    make = builder._config
    monkeypatch.setattr(builder, "_config", lambda *a: configs.append(make(*a)) or configs[-1])
    path = product(tmp_path / "a.onnx")
    levels = []
    for level in (None, 0, 5):
        build_plan(rtx, path, [{"x": fixed(2, 16)}], BuilderSettings(level))
        levels.append(configs.pop().builder_optimization_level)
    assert levels == [rtx.trt.Builder(rtx.trt.Logger()).create_builder_config().builder_optimization_level, 0, 5]


def test_every_other_setting_reaches_tensorrt(rtx: Flavor) -> None:
    log = rtx.logger()
    maker = rtx.create("start its builder", rtx.trt.Builder, log, log=log)

    def read(settings: BuilderSettings) -> tuple[int, str, int]:
        config = builder._config(rtx, maker, settings, None, log)
        return config.max_aux_streams, config.tiling_optimization_level.name, config.avg_timing_iterations

    default = read(BuilderSettings())
    for level, name in enumerate(("NONE", "FAST", "MODERATE", "FULL")):
        assert read(BuilderSettings(tiling_level=level)) == (default[0], name, default[2])
    assert read(BuilderSettings(aux_streams=3)) == (3, *default[1:])
    assert read(BuilderSettings(timing_iterations=9)) == (*default[:2], 9)


def test_a_range_knows_its_sizes() -> None:
    r = Range((1, 16), (2, 16), (8, 16))
    assert all((n, 16) in r for n in (1, 2, 5, 8))
    assert all(shape not in r for shape in [(0, 16), (9, 16), (2, 15), (2,), (2, 16, 1), [2, 16], None])


# ------------------------------------------------------------------------------------------------ progress, stopping


def unet(real: Bundle, progress: Callable[[str, float], None] | None, rtx: Flavor) -> BuildResult:
    spec = real.graph("unet")
    return build_plan(rtx, real.folder / spec.file, Sizes().profiles(spec), BuilderSettings(), progress=progress)


def no_build_goes_on() -> None:
    """Whatever TensorRT still ran in another thread would be cut off when the process ends, and crash it."""
    for thread in [t for t in threading.enumerate() if t.name == "tensorrt-build"]:
        thread.join(5)  # it may still have to return
        assert not thread.is_alive()


def test_progress_then_interrupted(real: Bundle, rtx: Flavor) -> None:
    """Ctrl-C in the main thread stops TensorRT in its own: it does not come to the end first."""
    whole: list[tuple[str, float]] = []
    unet(real, lambda phase, share: whole.append((phase, share)), rtx)
    phases = dict.fromkeys(phase for phase, _ in whole)
    assert len(phases) > 3
    assert all(isinstance(phase, str) and phase and "\n" not in phase for phase in phases)
    assert all(0 <= share <= 1 for _, share in whole)
    assert all(max(share for p, share in whole if p == phase) == 1 for phase in phases)

    seen: list[tuple[str, float]] = []

    def interrupt(phase: str, share: float) -> None:
        seen.append((phase, share))
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)  # Python runs its handler in the main thread

    with pytest.raises(KeyboardInterrupt):
        unet(real, interrupt, rtx)
    told = len(seen)
    no_build_goes_on()
    assert len(seen) == told
    missed = {event for event in whole if event not in seen}
    assert missed
    assert len(seen) < len(whole)


def test_terminated_by_a_signal_handler(real: Bundle, rtx: Flavor) -> None:
    """What the command makes of SIGTERM: an exception of another kind, in the midst of a build."""
    told: list[str] = []

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(143)

    def terminate(phase: str, share: float) -> None:
        told.append(phase)
        if len(told) == 1:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit) as ended:
            unet(real, terminate, rtx)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert told
    no_build_goes_on()
