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

CORE = ["text_encoder", "text_kv", "time_embeds", "unet", "update", "vae_decoder"]
ROLES = ("hint", "text_kv", "time_embeds", "controlnet")
EACH = [f"{role}_{condition}" for condition in CONDITIONS for role in ROLES]


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
        for role in ROLES:
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


@pytest.fixture
def simulate(simulated_gpu: Any, five: Bundle, tmp_path: Path) -> Callable[..., str]:
    """`simulate(function, argument, …)`: what a function of tests/programs/program_cache.py prints."""

    def run(function: str, *arguments: str, **options: Any) -> str:
        places = five.folder, tmp_path / "plans"
        return str(simulated_gpu.program("program_cache", function, *places, *arguments, timeout=300, **options))

    return run


def test_a_swap_loads_and_records_nothing_again_on_a_gpu(simulate):
    simulate("a_swap_loads_and_records_nothing_again_on_a_gpu")


@pytest.mark.parametrize(("limited", "options"), [("by a budget", {}), ("by the card", {"memory": 15 << 20})])
def test_what_was_used_longest_ago_goes_first(simulate, limited, options):
    """Room for the core, two conditions, and their buffers."""
    simulate(
        "what_was_used_longest_ago_goes_first",
        limited,
        **options,
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_two_hundred_mixed_requests_within_a_budget(simulate, lazy):
    simulate(
        "two_hundred_mixed_requests_within_a_budget",
        lazy=lazy,
    )


def test_scratch_that_nothing_needs_any_more_goes_too(simulate):
    """Two images need twice the scratch, beside which the contexts of one image keep theirs until room is short."""
    simulate("scratch_that_nothing_needs_any_more_goes_too")


def test_a_budget_that_one_request_exceeds(simulate):
    """Nothing that fits is harmed by what does not."""
    out = simulate("a_budget_that_one_request_exceeds")
    two, none = out.splitlines()
    assert two.startswith("weights 0.00 GiB + activations 0.00 GiB + buffers 0.00 GiB together: ")
    assert "of device memory is needed beside 0.01 GiB that is held, and the budget is 0.01 GiB: raise it to" in two
    assert (
        "is needed beside 0.00 GiB that is held, and the budget is 0.00 GiB: raise it to 0.01 GiB, draw fewer" in none
    )


def test_a_program_that_is_held_outside_keeps_its_engines(simulate):
    """A recording may still be replayed after its program and engines were dropped: they go when it goes."""
    simulate("a_program_that_is_held_outside_keeps_its_engines")


def test_extractors_are_loaded_on_demand_too(simulate):
    """Also by a callback, while the loop runs that holds everything it needs."""
    simulate("extractors_are_loaded_on_demand_too")


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
