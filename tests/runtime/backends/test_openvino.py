"""The backend `openvino` draws what ONNX Runtime draws from the same graphs: f32 the same images, bf16 nearly."""

import builtins
import gc
import hashlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.graph_names import STEPS_AT_ONCE
from cnpp_trt.errors import BackendError, BundleError
from cnpp_trt.runtime.backends import host_memory
from cnpp_trt.runtime.backends.interface import Buffer
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.backends.openvino import OpenVino
from hints import hint
from manifests import edit
from mapped import resident

pytestmark = pytest.mark.slow

openvino = pytest.importorskip("openvino")

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="OpenVINO has no bfloat16 on this CPU")

RELATIVE = 1e-4
# dB to the f32 images. Measured on the miniature over 16 requests: 38.8 to 52.7, the lowest with LCM's four steps at
# guidance 7.5; 42 upwards for the requests here.
BF16_PSNR = 35.0


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - expected) ** 2)))


def bound(bundle: Bundle, backend: Any, graph: str, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Buffer]:
    """Buffers for every tensor of a graph, the floating inputs filled with noise."""
    spec, rng, buffers = bundle.graph(graph), np.random.default_rng(seed), {}
    for tensor in (*spec.inputs, *spec.outputs):
        known: dict[str, Any] = {"tokens": 77, "prompts": sizes.get("batch"), "steps": STEPS_AT_ONCE, **sizes}
        shape = tuple(known[d] if isinstance(d, str) else d for d in tensor.shape)
        buffers[tensor.name] = backend.arena(0)(shape, tensor.dtype)
        if tensor in spec.inputs and tensor.dtype.startswith("float"):
            backend.upload(buffers[tensor.name], rng.standard_normal(shape).astype(tensor.dtype))
    return buffers


@pytest.fixture(scope="module")
def opened() -> Callable[..., Pipeline]:
    """A model's bundle on this backend, opened once for each precision."""
    pipelines: dict[Any, Pipeline] = {}

    def open_(model: Any, precision: str = "f32") -> Pipeline:
        key = (model, precision)
        if key not in pipelines:
            bundle = model.pipeline.bundle
            pipelines[key] = Pipeline(bundle, OpenVino(bundle, precision=precision))
        return pipelines[key]

    return open_


@pytest.fixture
def make(control_image: Callable[..., np.ndarray]) -> Callable[..., Request]:
    """A request of so many controls for a model; fields of `Request` as keywords."""

    def request(model: Any, controls: int = 1, **fields: Any) -> Request:
        chosen = ("seg", "depth")[:controls]
        made = [Control(c, control_image(*model.size, seed=i), (0.8, 0.6)[i]) for i, c in enumerate(chosen)]
        defaults = {"num_inference_steps": 4 if fields.get("scheduler") == "lcm" else 10, "seed": 5}
        return Request("a red house, with Snow", "blurry", made, **{**defaults, **fields})

    return request


CASES = [
    ("unipc", 7.5, 1, 1),
    ("unipc", 1.0, 2, 3),
    ("unipc", 7.5, 2, 3),
    ("lcm", 1.0, 1, 1),
    ("lcm", 7.5, 2, 1),
    ("unipc", 7.5, 0, 1),
]


# Trained weights take one of the cases: what is compared is how graphs are run, which the tiny model shows as well.
@pytest.mark.parametrize(
    ("name", "scheduler", "guidance_scale", "controls", "images"),
    [*(("tiny", *case) for case in CASES), pytest.param("miniature", *CASES[2], marks=pytest.mark.slow)],
)
def test_f32_draws_the_images_of_onnx_runtime(request, opened, make, name, scheduler, guidance_scale, controls, images):
    model = request.getfixturevalue(name)
    asked = make(model, controls, scheduler=scheduler, guidance_scale=guidance_scale, num_images_per_prompt=images)
    found, expected = opened(model)(asked), model.pipeline(asked)
    assert relative(found.latents, expected.latents) <= RELATIVE
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert expected.images.std() > 1


def test_the_same_request_gives_the_same_bytes(model, opened, make):
    request = make(model, 2, num_images_per_prompt=2)
    pipeline = opened(model)
    first, _, again = pipeline(request), pipeline(make(model, seed=6)), pipeline(request)
    assert first.images.tobytes() == again.images.tobytes()
    assert first.latents.tobytes() == again.latents.tobytes()


@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bf16)])
def test_extraction_is_exact_in_every_precision(miniature, opened, control_image, precision):
    """Extractors are small convolutional networks with an arg-max or rounding behind: next to no value may differ."""
    image = control_image(*miniature.size)
    for condition in ("seg", "depth"):
        found = opened(miniature, precision).extract(condition, image).astype(int)
        expected = miniature.pipeline.extract(condition, image)
        assert (np.abs(found - expected) > 1).mean() < 1e-3
        assert expected.std() > 1


def test_the_name_tells_the_precision(tiny, opened):
    assert opened(tiny).backend.name == "openvino"
    if HAS_BF16:
        assert opened(tiny, "bf16").backend.name == "openvino-bf16"


@needs_bf16
@pytest.mark.parametrize(("scheduler", "guidance_scale", "controls", "images"), CASES[:4])
def test_bf16_is_near(miniature, opened, make, scheduler, guidance_scale, controls, images):
    asked = make(miniature, controls, scheduler=scheduler, guidance_scale=guidance_scale, num_images_per_prompt=images)
    exact, near, again = (opened(miniature, p)(asked) for p in ("f32", "bf16", "bf16"))
    assert psnr(near.images, exact.images) > BF16_PSNR
    # It would not be worth its name if it computed in f32.
    assert relative(near.latents, exact.latents) > 1e-3
    assert near.images.tobytes() == again.images.tobytes()


@needs_bf16
@pytest.mark.parametrize("graph", ["update", "hint_seg", "text_encoder", "text_kv_seg", "time_embeds", "add_residuals"])
def test_what_stays_f32_in_bf16(tiny, graph):
    bundle = tiny.pipeline.bundle
    found = []
    for precision in ("f32", "bf16"):
        backend = OpenVino(bundle, 1, precision)
        buffers = bound(bundle, backend, graph, {"batch": 2, "images": 1, "guidance": 2})
        backend.load(graph).bind(buffers)()
        found.append([backend.download(buffers[t.name]) for t in bundle.graph(graph).outputs])
    for exact, near in zip(*found, strict=True):
        np.testing.assert_array_equal(near, exact)


@needs_bf16
def test_the_decoder_that_is_there_to_be_exact_stays_f32_in_bf16(tiny):
    backend = OpenVino(tiny.pipeline.bundle, 1, "bf16")
    assert backend.precision_of("vae_decoder") == "bf16"
    assert backend.precision_of("vae_decoder_fp32") == "f32"


@needs_bf16
@pytest.mark.parametrize("graph", ["unet", "controlnet_seg"])
def test_bf16_does_not_round_the_timestep(tiny_as_one, graph):
    """In bfloat16 999 is 1000."""
    bundle = tiny_as_one
    backend = OpenVino(bundle, 1, "bf16")
    buffers = bound(bundle, backend, graph, {"batch": 1, "images": 1})
    launch = backend.load(graph).bind(buffers)
    found = []
    for timestep in (999, 1000, 999):
        backend.upload(buffers["timestep"], np.array([timestep], np.float32))
        launch()
        found.append([backend.download(buffers[t.name]).tobytes() for t in bundle.graph(graph).outputs])
    assert found[0] == found[2]
    assert found[0] != found[1]


@pytest.mark.parametrize("graph", ["update", "controlnet_seg", "unet", "add_residuals", "vae_decoder"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_launch_reads_and_writes_its_own_buffers(tiny, graph, n):
    """Two launches of one graph with different buffers, called in turn; scalars and free dimensions included."""
    bundle = tiny.pipeline.bundle
    sizes = {"batch": n * 3, "images": 3, "guidance": n}
    outputs = [t.name for t in bundle.graph(graph).outputs]
    results: list[list[list[np.ndarray]]] = []
    for backend in (OpenVino(bundle, 1), OnnxRuntimeCpu(bundle, 1)):
        sets = [bound(bundle, backend, graph, sizes, seed) for seed in (0, 1)]
        launches = [backend.load(graph).bind(buffers) for buffers in sets]
        launches[0]()
        assert not any(backend.download(sets[1][name]).any() for name in outputs)
        first = [backend.download(sets[0][name]) for name in outputs]
        launches[1]()
        for name, before in zip(outputs, first, strict=True):
            np.testing.assert_array_equal(backend.download(sets[0][name]), before)
        # What is uploaded after binding counts.
        changed = next(t for t in bundle.graph(graph).inputs if t.name in ("noise", "model_input", "mid", "latents"))
        backend.upload(sets[0][changed.name], backend.download(sets[1][changed.name]))
        launches[0]()
        results.append([first, *[[backend.download(s[name]) for name in outputs] for s in sets]])
    for found, expected in zip(*results, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert b.any()
            if b.dtype == np.uint8:
                assert np.abs(a.astype(int) - b).max() <= 1
            else:
                assert relative(a, b) <= RELATIVE


def test_launches_hold_their_buffers(tiny):
    bundle = tiny.pipeline.bundle
    backend = OpenVino(bundle, 1)
    buffers = bound(bundle, backend, "update", {"images": 1, "guidance": 1})
    owners = [weakref.ref(b.owner) for b in buffers.values()]
    launch, state = backend.load("update").bind(buffers), buffers["new_state"]
    del buffers
    gc.collect()
    launch()
    assert all(owner() is not None for owner in owners)
    assert np.isfinite(backend.download(state)).all()


def test_a_graph_is_compiled_once_for_each_size(tiny):
    bundle = tiny.pipeline.bundle
    backend = OpenVino(bundle, 1)
    assert backend.load("update") is backend.load("update")
    for images in (1, 2, 1):
        backend.load("update").bind(bound(bundle, backend, "update", {"images": images, "guidance": 1}))
    assert len(backend.load("update")._compiled) == 2


def test_what_the_loop_does_not_need_is_compiled_again_for_a_new_prompt(
    tiny, make, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where weights are large; those of the files are not kept in memory once they are compiled."""
    bundle, request = tiny.pipeline.bundle, make(tiny)
    expected = Pipeline(bundle, OpenVino(bundle, 1))(request).images
    monkeypatch.setattr(host_memory, "LARGE", 0)
    bundle = Bundle.open(bundle_copy)  # which nothing else has mapped
    backend = OpenVino(bundle, 1)
    compiled, compile_ = list[str](), backend.compile

    def counted(graph: str, model: Any) -> list[Any]:
        compiled.append(graph)
        return compile_(graph, model)

    monkeypatch.setattr(backend, "compile", counted)
    pipeline = Pipeline(bundle, backend)
    np.testing.assert_array_equal(pipeline(request).images, expected)
    once = Counter(compiled)
    pipeline(request)  # its prompt and its condition are known
    assert Counter(compiled) == once
    pipeline(replace(request, prompt="a tree"))
    assert Counter(compiled) - once == {"text_encoder": 1, "text_kv": 1, "text_kv_seg": 1}
    if sys.platform == "linux":
        weights = bundle.folder / "unet.onnx.data"
        assert resident(weights) < weights.stat().st_size / 10


def test_without_the_package(tiny, monkeypatch):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError(name, name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendError, match=f"needs openvino, which is not installed: {hint('openvino')}"):
        OpenVino(tiny.pipeline.bundle)


def test_an_unknown_precision(tiny):
    with pytest.raises(BackendError, match="no precision 'fp8': choose f32 or bf16"):
        OpenVino(tiny.pipeline.bundle, precision="fp8")


def test_a_cpu_without_bfloat16(tiny, monkeypatch):
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(BackendError, match="this CPU has no bfloat16"):
        OpenVino(tiny.pipeline.bundle, precision="bf16")
    OpenVino(tiny.pipeline.bundle)


@pytest.mark.parametrize("file", ["unet.onnx", "controlnet_seg.onnx", "unet.onnx.data"])
def test_a_damaged_file(bundle_copy: Path, make, tiny, file):
    """It is found by its digest; one that is the manifest's and still no graph, by OpenVINO."""
    path = bundle_copy / file
    path.write_bytes(bytes(path.stat().st_size // 2))
    edit(bundle_copy, lambda m: m["files"][file].update(size=path.stat().st_size))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(BundleError, match=f"is damaged: {file} changed since the export"):
        Pipeline(bundle, OpenVino(bundle, 1))(make(tiny))
    edit(bundle_copy, lambda m: m["files"][file].update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(BundleError, match=rf"cannot load .*{file[:-5]}.*cnpp-trt verify") as error:
        Pipeline(bundle, OpenVino(bundle, 1))(make(tiny))
    assert "\n" not in str(error.value)


def test_a_launch_that_fails(tiny):
    """A buffer of another type than the graph's."""
    bundle = tiny.pipeline.bundle
    backend = OpenVino(bundle, 1)
    buffers = bound(bundle, backend, "update", {"images": 1, "guidance": 1})
    launch = backend.load("update").bind({**buffers, "guidance": backend.arena(0)((1, 1), "float16")})
    with pytest.raises(BackendError, match="OpenVINO failed in update: ") as error:
        launch()
    assert "\n" not in str(error.value)


def test_sizes_that_a_graph_cannot_have(tiny):
    bundle = tiny.pipeline.bundle
    backend = OpenVino(bundle, 1)
    buffers = bound(bundle, backend, "update", {"images": 1, "guidance": 1})
    with pytest.raises(BackendError, match="OpenVINO cannot compile update: ") as error:
        backend.load("update").bind({**buffers, "coefficients": backend.arena(0)((4, 7), "float32")})
    assert "\n" not in str(error.value)


def test_sizes_that_nothing_is_bound_to_are_forgotten_but_for_the_last_two(tiny):
    bundle = tiny.pipeline.bundle
    backend = OpenVino(bundle)
    graph = backend.load("update")

    def bind(images: int) -> Any:
        return graph.bind(bound(bundle, backend, "update", {"guidance": 1, "images": images}))

    kept = bind(1)
    for images in (2, 3, 4):
        bind(images)
    gc.collect()
    assert sorted(key[0][1] for key in graph._compiled) == [1, 3, 4]
    again = bind(4)
    assert sorted(key[0][1] for key in graph._compiled) == [1, 3, 4]
    kept()
    again()
    del kept
    gc.collect()
    assert sorted(key[0][1] for key in graph._compiled) == [3, 4]
