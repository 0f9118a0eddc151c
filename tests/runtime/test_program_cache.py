"""Five conditions on one pipeline: what stays loaded, and on a GPU what goes first when its memory is short.

The GPU is the simulated one (tests/simulated_gpu), whose stand-in for TensorRT takes device memory for every engine:
the driver checks at every launch that weights, scratch and buffers are still there, and counts every byte.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle, GraphSpec, TensorSpec
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.errors import UserError

pytestmark = pytest.mark.slow

CORE = ["text_encoder", "unet", "update", "vae_decoder"]
EACH = [f"{role}_{condition}" for condition in CONDITIONS for role in ("hint", "controlnet")]


@pytest.fixture(scope="module")
def five(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with every condition: copies of its two under other names; and two extractors that do little."""
    folder = shutil.copytree(tiny.bundle, tmp_path_factory.mktemp("five") / "bundle")
    manifest = Bundle.open(folder).manifest

    def add(graph: str, spec: GraphSpec) -> None:
        content = (folder / f"{graph}.onnx").read_bytes()
        manifest.files[f"{graph}.onnx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.graphs[graph] = replace(spec, file=f"{graph}.onnx")

    for condition in CONDITIONS:
        if condition in manifest.conditions:
            continue
        like = "depth" if condition == "hed" else "seg"
        manifest.conditions[condition] = manifest.conditions[like]
        for role in ("hint", "controlnet"):
            shutil.copy(folder / f"{role}_{like}.onnx", folder / f"{role}_{condition}.onnx")
            add(f"{role}_{condition}", manifest.graphs[f"{role}_{like}"])
    for channel, condition in enumerate(("hed", "depth")):
        image, gray = ("images", manifest.height, manifest.width, 3), ("images", manifest.height, manifest.width)
        onnx.save(one_channel(channel, image, gray), folder / f"extractor_{condition}.onnx")
        inputs, outputs = (TensorSpec("image", "uint8", image),), (TensorSpec("map", "uint8", gray),)
        add(f"extractor_{condition}", replace(manifest.graphs["update"], inputs=inputs, outputs=outputs))
    (folder / "manifest.json").write_text(manifest.dumps())
    return Bundle.open(folder)


def one_channel(channel: int, image: tuple[int | str, ...], gray: tuple[int | str, ...]) -> onnx.ModelProto:
    uint8 = onnx.TensorProto.UINT8
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["image", "channel"], ["map"], axis=3)],
        "one_channel",
        [onnx.helper.make_tensor_value_info("image", uint8, image)],
        [onnx.helper.make_tensor_value_info("map", uint8, gray)],
        [onnx.helper.make_tensor("channel", onnx.TensorProto.INT64, [], [channel])],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def ask(five: Bundle, control_image: Callable[..., np.ndarray]) -> Callable[..., Request]:
    m = five.manifest

    def make(condition: str, seed: int = 1) -> Request:
        control = Control(condition, control_image(m.width, m.height))
        return Request("a house", controls=[control], num_inference_steps=1, seed=seed)

    return make


# --- a condition swap


def test_a_swap_loads_no_graph_again_in_onnxruntime(five, ask, sessions):
    pipeline = Pipeline.open(five, "onnxruntime-cpu", threads=1)
    swap(pipeline, ask)
    assert sorted(sessions) == sorted([*CORE, *EACH])


def test_a_swap_compiles_no_graph_again_in_openvino(five, ask):
    pytest.importorskip("openvino")
    pipeline = Pipeline.open(five, "openvino", threads=1)
    compiled: list[str] = []
    backend: Any = pipeline.backend
    compile_ = backend.compile
    backend.compile = lambda graph, model: [compiled.append(graph), compile_(graph, model)][1]
    swap(pipeline, ask)
    assert sorted(compiled) == sorted([*CORE, *EACH])


def swap(pipeline: Pipeline, ask: Callable[..., Request]) -> None:
    """50 requests that alternate five conditions; each condition's program is made once."""
    programs = set()
    first: dict[str, Any] = {}
    for i in range(50):
        condition = list(CONDITIONS)[i % 5]
        latents = pipeline(ask(condition)).latents
        np.testing.assert_array_equal(first.setdefault(condition, latents), latents)
        programs |= set(pipeline._preparation.programs.programs.values())
    assert len(programs) == 5


# --- on a GPU

START = """
import fake_tensorrt
gpu = fake_tensorrt.install()
import sys
from pathlib import Path
import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.errors import DeviceMemoryError

bundle, plans = Bundle.open(sys.argv[1]), Path(sys.argv[2])
fake_tensorrt.make_plans(bundle, plans)
m = bundle.manifest
IMAGES = np.random.default_rng(0).integers(0, 256, (2, m.height, m.width, 3), np.uint8)
MIB = 1 << 20   # what every engine takes
CORE = 4 * MIB
loaded = fake_tensorrt.loaded

def ask(*conditions, image=0, steps=1, **fields):
    controls = [Control(c, IMAGES[image]) for c in conditions]
    return Request(**{"prompt": "a house", "seed": 1, **fields}, controls=controls, num_inference_steps=steps)

def same(a, b):
    return np.array_equal(a.images, b.images) and np.array_equal(a.latents, b.latents)

def loads(pipeline, condition, **fields):
    before = len(loaded)
    result = pipeline(ask(condition, **fields))
    return loaded[before:], result

def opened(**options):
    return Pipeline.open(bundle, "tensorrt", plans=plans, **options)

cpu = Pipeline.open(bundle, "onnxruntime-cpu", threads=1)
"""


@pytest.fixture
def simulate(simulated_gpu: Any, five: Bundle, tmp_path: Path) -> Callable[..., str]:
    def run(code: str, **options: Any) -> str:
        return str(simulated_gpu.run(START + code, five.folder, tmp_path / "plans", timeout=300, **options))

    return run


def test_a_swap_loads_and_records_nothing_again_on_a_gpu(simulate):
    simulate(
        """
pipeline = opened()
for i in range(50):
    if i == 10:
        recorded = gpu.trace().count("cuGraphInstantiateWithParams") + gpu.trace().count("cuGraphInstantiate_v2")
        before = sorted(loaded)
        gpu.clear()
    result = pipeline(ask(list(CONDITIONS)[i % 5]))
    assert i < 5 or "loop" in result.timings
each = [f"{role}_{c}" for c in CONDITIONS for role in ("hint", "controlnet")]
assert before == sorted(loaded) == sorted(["text_encoder", "unet", "update", "vae_decoder", *each])
assert not any("Instantiate" in call or "MemAlloc" in call for call in gpu.trace())
"""
    )


BUDGETS = [("opened(vram_budget=LIMIT)", {}), ("opened()", {"memory": 9 << 20})]


@pytest.mark.parametrize(("open_", "options"), BUDGETS, ids=["budget", "full card"])
def test_what_was_used_longest_ago_goes_first(simulate, open_, options):
    """Room for the core, two conditions, and their buffers."""
    simulate(
        f"""
LIMIT = 9 * MIB
pipeline = {open_}
"""
        """
first, expected = loads(pipeline, "seg")
assert first == ["text_encoder", "hint_seg", "controlnet_seg", "unet", "vae_decoder"]   # update was, when opening
assert same(expected, cpu(ask("seg")))
def pair(condition): return [f"hint_{condition}", f"controlnet_{condition}"]
for condition, new in [
    ("depth", True), ("seg", False), ("hed", True),      # depth was used longest ago
    ("seg", False), ("depth", True),                      # hed went
    ("seg", False), ("depth", False), ("hed", True),      # seg went
    ("depth", False), ("seg", True), ("canny", True), ("lineart", True), ("canny", False), ("seg", True),
]:
    found, result = loads(pipeline, condition)
    assert found == (pair(condition) if new else []), (condition, found)
    assert same(result, cpu(ask(condition))), condition
    again = loads(pipeline, condition)[1]
    assert same(result, again) and "loop" in again.timings, condition
    assert gpu.live_bytes() <= gpu.peak_bytes() <= LIMIT
parts = pipeline.backend.memory()
assert sum(parts.values()) == gpu.peak_bytes(), parts
""",
        **options,
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_two_hundred_mixed_requests_within_a_budget(simulate, lazy):
    simulate(
        """
LIMIT = 8 * MIB
pipeline = opened(vram_budget=LIMIT)
rng = np.random.default_rng(1)
names = list(CONDITIONS)
used = []
for i in range(200):
    one, other = rng.permutation(names)[:2]
    wanted = ask(*[one, other][: 2 if i % 7 == 0 else 1], image=i % 2, steps=1 + i % 2, seed=i, prompt=f"p {i % 20}",
                 num_images_per_prompt=1 + i % 3 % 2, guidance_scale=float(rng.choice([1.0, 5.0])))
    try:
        result = pipeline(wanted)
    except DeviceMemoryError:
        assert i % 7 == 0   # two conditions alone may not fit
        continue
    if i % 10 == 3:
        assert same(result, cpu(wanted)), i
    assert gpu.peak_bytes() <= LIMIT, i
    used.append((gpu.live_objects()["device"], gpu.live_objects()["exec"], gpu.live_objects()["pinned"]))
assert len(used) > 170 and len(loaded) > 100
assert np.max(used[100:], axis=0).tolist() <= (np.max(used[:100], axis=0) * 1.25).tolist(), used
""",
        lazy=lazy,
    )


def test_scratch_that_nothing_needs_any_more_goes_too(simulate):
    """Two images need twice the scratch, beside which the contexts of one image keep theirs until room is short."""
    simulate(
        """
import gc
def size(context):
    return context.shapes["model_input"][0] << 19 if "model_input" in context.shapes else 4096
fake_tensorrt.Context.update_device_memory_size_for_shapes = size
pipeline = opened(vram_budget=1 << 40)
wanted = {n: ask("seg", num_images_per_prompt=n) for n in (1, 2)}
LIMIT = CORE + 2 * MIB + pipeline.memory_needed(wanted[2])["buffers"] + (2 << 20) + (256 << 10)
pipeline.close()
del pipeline
gc.collect()
pipeline = opened(vram_budget=LIMIT)
for images in (1, 2, 1, 2, 1):
    assert same(pipeline(wanted[images]), cpu(wanted[images]))
assert 3 * MIB + LIMIT // 2 < gpu.peak_bytes() <= LIMIT
assert loaded.count("unet") == loaded.count("controlnet_seg") == 1
"""
    )


def test_a_budget_that_one_request_exceeds(simulate):
    """Nothing that fits is harmed by what does not."""
    out = simulate(
        """
pipeline = opened(vram_budget=CORE + 3 * MIB)
expected = pipeline(ask("seg"))
try:
    pipeline(ask("seg", "depth"))
except DeviceMemoryError as e:
    print(e)
assert same(pipeline(ask("seg")), expected) and same(pipeline(ask("depth")), cpu(ask("depth")))
small = opened(vram_budget=3 * MIB)
gpu.clear()
try:
    small(ask("seg"))
except DeviceMemoryError as e:
    print(e)
assert not any("MemAlloc" in call for call in gpu.trace())
"""
    )
    two, none = out.splitlines()
    assert two.startswith("weights 0.00 GiB + activations 0.00 GiB + buffers 0.00 GiB together: ")
    assert "of device memory is needed beside 0.01 GiB that is held, and the budget is 0.01 GiB: raise it to" in two
    assert (
        "is needed beside 0.00 GiB that is held, and the budget is 0.00 GiB: raise it to 0.01 GiB, draw fewer" in none
    )


def test_a_program_that_is_held_outside_keeps_its_engines(simulate):
    """A recording may still be replayed after its program and engines were dropped: they go when it goes."""
    simulate(
        """
import gc
gc.disable()   # nothing here may depend on it
pipeline = opened()
pipeline(ask("seg"))
program = pipeline._preparation.programs.programs[next(iter(pipeline._preparation.programs.programs))]
expected = pipeline.backend.download(program.workspace.latents)
held = gpu.live_bytes()
for graph in ("hint_seg", "controlnet_seg"):
    pipeline.backend.release(graph)
pipeline._preparation.programs.programs.clear()
assert gpu.live_bytes() == held
assert pipeline.backend.held()["weights"] == 6 * MIB
program.recording()
assert np.isfinite(pipeline.backend.download(program.workspace.latents)).all()
del program
assert pipeline.backend.held()["weights"] == CORE
assert gpu.live_bytes() <= held - 2 * MIB
assert loads(pipeline, "seg")[0] == ["hint_seg", "controlnet_seg"]
"""
    )


def test_extractors_are_loaded_on_demand_too(simulate):
    """Also by a callback, while the loop runs that holds everything it needs."""
    simulate(
        """
LIMIT = CORE + 4 * MIB
pipeline = opened(vram_budget=LIMIT)
photo = IMAGES[0]
pipeline.extract("hed", photo)
pipeline.backend.release("extractor_hed")
assert fake_tensorrt.compiled == []
pipeline.extract("hed", photo)
assert fake_tensorrt.compiled == [b"compiled"]   # what was compiled before it was unloaded
for condition in ("hed", "depth", "hed", "depth"):
    assert np.array_equal(pipeline.extract(condition, photo), cpu.extract(condition, photo))
    inside = []
    watched = pipeline(ask(condition), callback_on_step_end=lambda *step: inside.append(pipeline.extract("hed", photo)))
    assert same(watched, cpu(ask(condition))) and same(pipeline(ask(condition)), watched)
    assert np.array_equal(inside[0], cpu.extract("hed", photo))
    assert gpu.peak_bytes() <= LIMIT
assert loaded.count("unet") == 1
assert loaded.count("controlnet_hed") > 1 and loaded.count("extractor_depth") > 1
"""
    )


# --- who keeps a budget


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino", "onnxruntime-cuda"])
def test_a_backend_that_cannot_keep_a_budget_refuses_it(five, refused, backend):
    with pytest.raises(UserError, match=f"{backend} .* cannot keep a vram budget"):
        Pipeline.open(five, backend, vram_budget=1 << 30)
    assert "cannot keep a vram budget" in refused(
        "run", "--bundle", five.folder, "--backend", backend, "--vram-budget", "6GiB"
    )


def test_a_budget_without_a_gpu(five, monkeypatch):
    from cnpp_trt.gpu import GpuSearch
    from cnpp_trt.runtime.backends import registry as choose

    monkeypatch.setattr(choose, "find_gpu", lambda device=0: GpuSearch(reason="no driver"))
    with pytest.raises(UserError, match="a vram budget is for a GPU: no driver"):
        Pipeline.open(five, vram_budget=1 << 30)


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "6GiB"])
def test_budgets_that_are_none(five, budget):
    with pytest.raises(UserError, match="whole number of bytes above 0"):
        Pipeline.open(five, vram_budget=budget)
