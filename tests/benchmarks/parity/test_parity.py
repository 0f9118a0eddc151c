"""Parity: the reference is diffusers; a wrong graph is named, and a step's error told from what became of it."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.benchmarks import records
from cnpp_trt.benchmarks.parity.command import ParitySettings, measure_parity
from cnpp_trt.benchmarks.parity.graph_parity import compare_launches, compare_steps, request_of_both
from cnpp_trt.benchmarks.parity.launch_comparison import Tally, compare_graphs, tensor_difference
from cnpp_trt.benchmarks.parity.measure import compare_images, heatmap
from cnpp_trt.benchmarks.parity.pytorch_backend import TorchModules
from cnpp_trt.benchmarks.parity.thresholds import read_thresholds, violations
from cnpp_trt.benchmarks.pytorch import PyTorch
from cnpp_trt.benchmarks.records import NOT_FINITE
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.benchmarks.result import read_result
from cnpp_trt.bundles.bundle import Bundle, Manifest
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.onnx_graph import compare as compare_as_exported
from cnpp_trt.files import sha256_of
from cnpp_trt.runtime.backends.host_memory import view
from cnpp_trt.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from cnpp_trt.runtime.settings.request import ResolvedRequest
from scipy.spatial.distance import cosine

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of PyTorch that wait for each other take minutes where something else runs too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def modules(tiny: Any) -> TorchModules:
    return TorchModules(tiny.pipeline.bundle, Checkpoint(str(tiny.checkpoint)))


@pytest.fixture(scope="module")
def diffusers(tiny: Any) -> PyTorch:
    return PyTorch(Checkpoint(str(tiny.checkpoint)))


@pytest.fixture
def ask(tiny: Any, control_image: Callable[..., np.ndarray]) -> Callable[..., ResolvedRequest]:
    """`ask("seg", "depth", scheduler="lcm")`"""

    def make(*conditions: str, **fields: Any) -> ResolvedRequest:
        controls = [Control(c, control_image(*tiny.size, i), 0.8) for i, c in enumerate(conditions or ("seg",))]
        fields = {"num_inference_steps": STEPS, "seed": 3, **fields}
        return Request("a red house", controls=controls, **fields).resolve(SamplingDefaults())

    return make


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# --- the reference


@pytest.mark.parametrize(
    ("conditions", "fields"),
    [
        (("seg",), {"scheduler": "unipc", "num_inference_steps": 20, "negative_prompt": "blurry"}),
        (("depth",), {"scheduler": "euler", "num_images_per_prompt": 2}),
        (("seg", "depth"), {"scheduler": "ddim"}),
        (("seg",), {"scheduler": "lcm", "guidance_scale": 1.0}),
    ],
)
def test_the_reference_is_diffusers(modules, diffusers, ask, conditions, fields):
    request = ask(*conditions, **fields)
    latents: list[np.ndarray] = []
    found = modules.pipeline()(request, callback_on_step_end=lambda k, t, x: latents.append(x))
    expected = diffusers(request)
    assert len(latents) == len(expected.trajectory) == request.num_inference_steps
    for k, (a, b) in enumerate(zip(latents, expected.trajectory, strict=True)):
        assert relative(a, b) <= 1e-5, f"step {k}"
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert found.images.std() > 1


def test_the_reference_of_the_miniature_is_diffusers(miniature):
    checkpoint = Checkpoint("miniature")
    (request,) = make_requests(miniature.pipeline, "depth", [0])
    latents: list[np.ndarray] = []
    TorchModules(miniature.pipeline.bundle, checkpoint).pipeline()(
        request, callback_on_step_end=lambda k, t, x: latents.append(x)
    )
    for k, (a, b) in enumerate(zip(latents, PyTorch(checkpoint)(request).trajectory, strict=True)):
        assert relative(a, b) <= 1e-5, f"step {k}"


def test_the_reference_of_an_fp16_bundle_is_in_fp32(tiny, modules):
    """As the fp32 bundle's, and without the second decoder."""

    def rounded(tensors: Any) -> Any:
        # The sampler's own tensors are float32 in every bundle.
        kept = ("timestep", "scales", "latents", "state", "new_state", "magnitude", "guidance", "coefficients", "noise",
                "x0_limit", "timesteps")  # fmt: skip
        return tuple(replace(t, dtype="float16") if t.dtype == "float32" and t.name not in kept else t for t in tensors)

    m = tiny.pipeline.bundle.manifest
    graphs = {n: replace(g, inputs=rounded(g.inputs), outputs=rounded(g.outputs)) for n, g in m.graphs.items()}
    graphs["vae_decoder_fp32"] = graphs["vae_decoder"]
    half = Bundle(tiny.bundle, replace(m, precision="fp16", graphs=graphs))
    assert TorchModules(half, Checkpoint(str(tiny.checkpoint))).bundle.manifest == m


def test_a_conditions_modules_go_with_its_programs(modules, ask):
    pipeline = modules.pipeline()
    pipeline.prepare(ask("seg"))
    assert "controlnet_seg" in modules._loaded
    unet = modules._loaded["unet"]
    pipeline = modules.pipeline()
    pipeline.prepare(ask("depth"))
    assert "controlnet_seg" not in modules._loaded
    assert "controlnet_depth" in modules._loaded
    assert modules._loaded["unet"] is unet


# --- comparing tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_differences_are_those_of_the_export_and_scipy(dtype):
    rng = np.random.default_rng(0)
    a, b = ((rng.random((3, 5, 7)) * 200).astype(dtype) for _ in range(2))
    found, expected = tensor_difference(a, b), compare_as_exported(a, b)
    assert found.max_abs == expected.max_abs
    assert found.relative_l2 == pytest.approx(expected.relative_l2, rel=1e-12)
    assert found.cosine == pytest.approx(1 - cosine(a.ravel().astype(float), b.ravel().astype(float)), rel=1e-12)


def test_differences_of_zeros_and_of_what_is_not_finite():
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert (tensor_difference(zero, zero).relative_l2, tensor_difference(zero, zero).cosine) == (0, 1)
    assert (tensor_difference(zero, one).relative_l2, tensor_difference(zero, one).cosine) == (2, 0)
    assert tensor_difference(one, -one).cosine == pytest.approx(-1)
    for bad in (np.nan, np.inf):
        wrong = one.copy()
        wrong[2] = bad
        assert tensor_difference(one, wrong).relative_l2 == np.inf
    tally = Tally()
    tally.add("unet step 1 (seg)", {"a": one, "b": one}, {"a": one, "b": wrong})
    record = tally.record("unet")
    assert record["relative_l2"] == record["max_abs"] == NOT_FINITE
    assert record["worst"] == "unet step 1 (seg): b, not finite"
    json.dumps(record, allow_nan=False)


def test_a_tally_keeps_the_worst():
    one = np.ones(4, np.float32)
    tally = Tally()
    for launch, error in (("first", 0.01), ("second", 0.5), ("third", 0.1)):
        tally.add(launch, {"x": one, "y": one}, {"x": one, "y": one + np.float32(error)})
    found = tally.record("unet")
    assert (found["launches"], found["worst"]) == (3, "second: y")
    assert found["relative_l2"] == found["max_abs"] == 0.5


# --- graphs


@pytest.fixture(scope="module")
def compared(tiny: Any, modules: TorchModules) -> tuple[list[records.GraphParity], list[records.StepParity]]:
    requests = [r for c in ("seg", "depth") for r in make_requests(tiny.pipeline, c, [0], num_inference_steps=STEPS)]
    checkpoint = Checkpoint(str(tiny.checkpoint))
    return compare_launches(tiny.pipeline, checkpoint, [*requests, *request_of_both(requests)])


def test_every_graph_of_a_request_is_compared(compared):
    graphs = {g["graph"]: g for g in compared[0]}
    assert {name: g["launches"] for name, g in graphs.items()} == {
        "text_encoder": 3,
        "text_kv": 3,
        "text_kv_seg": 2,
        "text_kv_depth": 2,
        "time_embeds": 3,
        "time_embeds_seg": 2,
        "time_embeds_depth": 2,
        "hint_seg": 2,
        "hint_depth": 2,
        "controlnet_seg": 2 * STEPS,
        "controlnet_depth": 2 * STEPS,
        "add_residuals": STEPS,
        "unet": 3 * STEPS,
        "update": 3 * STEPS,
        "vae_decoder": 3,
    }
    assert violations(read_thresholds("fp32"), *compared) == []
    assert all(g["cosine"] >= 1 - 1e-6 for g in graphs.values())
    # Were both sides the same graph, nothing would differ at all.
    assert all(graphs[name]["relative_l2"] > 0 for name in ("unet", "text_encoder", "controlnet_seg"))


def test_steps_are_compared_for_each_condition(compared):
    assert [s["condition"] for s in compared[1]] == ["seg", "depth"]
    for s in compared[1]:
        assert len(s["free"]) == len(s["forced"]) == STEPS
        assert min(*s["free"], *s["forced"]) > 0


def test_the_miniatures_extractors_are_compared(miniature):
    requests = [
        r for c in ("seg", "depth") for r in make_requests(miniature.pipeline, c, [0], num_inference_steps=STEPS)
    ]
    graphs, _ = compare_launches(miniature.pipeline, Checkpoint("miniature"), requests, follow=False)
    extractors = {g["graph"]: g for g in graphs if g["graph"].startswith("extractor_")}
    assert set(extractors) == {"extractor_seg", "extractor_depth"}
    assert violations(read_thresholds("fp32"), graphs) == []


def sabotage(bundle: Path, graph: str) -> None:
    """Flips the sign of a quarter of the graph's largest weight; the bundle stays whole in every formal respect."""
    manifest = Manifest.loads((bundle / "manifest.json").read_text("utf-8"))
    spec = manifest.graphs[graph]
    model = onnx.load(bundle / spec.file, load_external_data=False)
    sizes: dict[int, int] = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}
    places = [
        ({entry.key: entry.value for entry in tensor.external_data}, sizes[tensor.data_type])
        for tensor in model.graph.initializer
        if tensor.data_type in sizes and tensor.external_data
    ]
    place, size = max(places, key=lambda found: int(found[0]["length"]))
    length = int(place["length"])
    values = np.memmap(bundle / f"{spec.file}.data", np.uint8, "r+", int(place["offset"]), length)
    values[size - 1 : length // 4 : size] ^= 0x80  # a little-endian float's last byte has its sign
    values.flush()
    name = f"{spec.file}.data"
    manifest.files[name]["sha256"] = sha256_of(bundle / name)
    (bundle / "manifest.json").write_text(manifest.dumps(), "utf-8")
    Bundle.open(bundle).verify()


@pytest.mark.parametrize(
    "graph", ["text_encoder", "text_kv", "time_embeds_depth", "hint_depth", "controlnet_depth", "unet", "vae_decoder"]
)
def test_a_wrong_graph_is_the_only_one_that_differs(tiny, bundle_copy, graph):
    """Every graph is given the reference's inputs, so that one graph's error is not another's."""
    sabotage(bundle_copy, graph)
    deployed = Pipeline.open(bundle_copy, "onnxruntime-cpu", threads=1)
    requests = list(make_requests(deployed, "depth", [0], num_inference_steps=2))
    graphs, _ = compare_launches(deployed, Checkpoint(str(tiny.checkpoint)), requests)
    found = violations(read_thresholds("fp32"), graphs)
    assert [line.split(",")[0] for line in found] == [f"graph {graph}"], graphs


# --- steps


class Disturbed(OnnxRuntimeCpu):
    """Adds an error to the latents that one step leaves."""

    def __init__(self, bundle: Bundle, step: int, error: float) -> None:
        super().__init__(bundle, threads=1)
        self.step, self.error = step, error
        self._now = -1

    def upload(self, buffer: Any, array: Any) -> None:
        if buffer.shape == (STEPS, 2, 64):  # the table of all steps, before the first one
            self._now = -1
        super().upload(buffer, array)

    def copy(self, source: Any, target: Any) -> None:
        self._now += source.shape == (2, 64)  # every step begins with its row
        super().copy(source, target)

    def load(self, graph: str) -> Any:
        loaded = super().load(graph)
        if graph != "update":
            return loaded
        outer = self

        class Update:
            def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
                launch = loaded.bind(buffers)

                def disturbed() -> None:
                    launch()
                    if outer._now == outer.step:
                        view(buffers["new_state"])[0] += outer.error

                return disturbed

        return Update()


@pytest.mark.parametrize("step", [0, 1, STEPS - 1])
def test_a_steps_error_is_told_from_what_becomes_of_it(tiny, modules, ask, step):
    deployed = Pipeline(tiny.pipeline.bundle, Disturbed(tiny.pipeline.bundle, step, 0.05))
    request = ask("seg")
    trajectory = compare_graphs(modules.pipeline(), deployed, request, {})
    found = compare_steps(deployed, request, trajectory)
    assert [e > 1e-3 for e in found["forced"]] == [k == step for k in range(STEPS)], found
    assert [e > 1e-3 for e in found["free"]] == [k >= step for k in range(STEPS)], found


# --- an fp16 decoder that overflows


class Overflowing(OnnxRuntimeCpu):
    """Its decoder's image is never finite."""

    def load(self, graph: str) -> Any:
        loaded = super().load(graph.removesuffix("_fp32"))
        if graph != "vae_decoder":
            return loaded

        class Decoder:
            def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
                launch = loaded.bind(buffers)

                def overflow() -> None:
                    launch()
                    view(buffers["magnitude"])[...] = np.inf

                return overflow

        return Decoder()


@pytest.mark.parametrize("second_decoder", [True, False])
def test_a_decoder_that_overflows_counts_unless_the_runtime_decodes_again(tiny, modules, ask, second_decoder):
    m = tiny.pipeline.bundle.manifest
    graphs = {**m.graphs, "vae_decoder_fp32": m.graphs["vae_decoder"]} if second_decoder else m.graphs
    bundle = Bundle(tiny.bundle, replace(m, graphs=graphs))
    deployed = Pipeline(bundle, Overflowing(bundle, threads=1))
    tallies: dict[str, Tally] = {}
    compare_graphs(modules.pipeline(), deployed, ask("seg"), tallies)
    assert ("vae_decoder" in tallies) is not second_decoder
    if second_decoder:
        assert tallies["vae_decoder_fp32"].relative_l2 <= 1e-3
    else:
        assert tallies["vae_decoder"].record("vae_decoder")["relative_l2"] == NOT_FINITE


# --- images


def test_the_heatmap_is_of_the_worst_image(ask):
    reference = [np.full((16, 16, 3), 100, np.uint8) for _ in range(3)]
    found = [image + np.uint8(error) for image, error in zip(reference, (1, 7, 0), strict=True)]
    requests = [ask(seed=seed) for seed in (20, 21, 22)]
    parity = compare_images("seg", reference, found)
    assert parity["max_difference"] == [1, 7, 0]
    assert parity["psnr"][2] is None
    assert parity["psnr"][0] == pytest.approx(20 * np.log10(255))
    assert parity["lpips"] is None
    shown = heatmap("seg", requests, reference, found)
    assert (shown["seed"], shown["scale"]) == (21, 7)


# --- the command


@pytest.fixture
def arguments(tiny: Any, tmp_path: Path) -> list[Any]:
    sizes = ["--steps", 2, "--images", 2, "--threads", 1]
    return ["parity", "--model", tiny.checkpoint, "--backend", "onnxruntime-cpu", *sizes, "--out", tmp_path / "p.json"]


def test_the_command(tiny, command, arguments, tmp_path):
    outcome = command(*arguments, "--bundle", tiny.bundle)
    assert outcome.status == 0, outcome.err
    for part in ("| `unet` |", "| depth | 2 |", "| PyTorch fp16: images |", "without LPIPS: "):
        assert part in outcome.out
    assert "worst PSNR on the same 2 images: PyTorch's own fp16 " in outcome.out
    assert "within every threshold of fp32" in outcome.out

    text = (tmp_path / "p.json").read_text("utf-8")
    assert str(tmp_path) not in text
    assert str(tiny.checkpoint) not in text
    result = read_result(tmp_path / "p.json")
    assert result.kind == "parity"
    data = result.data
    assert set(data) == set(records.Parity.__annotations__)
    for rows, record in (
        ("graphs", records.GraphParity),
        ("steps", records.StepParity),
        ("images", records.ImageParity),
        ("half", records.ImageParity),
        ("heatmaps", records.Heatmap),
    ):
        assert data[rows], rows
        assert all(set(row) == set(record.__annotations__) for row in data[rows])
    assert [i["condition"] for i in data["images"]] == ["seg", "depth"]
    assert all(max(i["max_difference"]) <= 1 and len(i["psnr"]) == 2 for i in data["images"])
    assert all(len(i["psnr"]) == 1 and max(i["max_difference"]) >= 1 for i in data["half"])
    assert (data["missed"], data["passed"]) == ([], True)


def test_json_is_one_object_without_pictures(tiny, command, arguments, tmp_path):
    outcome = command(*arguments, "--bundle", tiny.bundle, "--cond", "seg", "--half", 0, "--json")
    found = json.loads(outcome.out)
    assert outcome.status == 0
    assert found["result"] == str(tmp_path / "p.json")
    assert "heatmaps" not in found
    assert found["half"] == []
    assert "half" in found["unavailable"]


def test_a_wrong_graph_fails_the_command_and_is_named(command, arguments, bundle_copy, tmp_path):
    sabotage(bundle_copy, "unet")
    outcome = command(*arguments, "--bundle", bundle_copy, "--cond", "seg", "--half", 0)
    assert outcome.status == 1
    lines = [line for line in outcome.err.splitlines() if line.startswith("missed: ")]
    graphs = [line for line in lines if line.startswith("missed: graph ")]
    assert len(graphs) == 1
    assert graphs[0].startswith("missed: graph unet, worst at unet step ")
    assert f"{len(lines)} thresholds of fp32 missed" in outcome.out
    data = read_result(tmp_path / "p.json").data
    assert not data["passed"]
    assert [f"missed: {line}" for line in data["missed"]] == lines


def test_one_missed_threshold_of_a_file(tiny, command, arguments, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[fp32]\nimage_ssim = 2\n[fp16]\nimage_psnr = 500\n")
    outcome = command(*arguments, "--bundle", tiny.bundle, "--cond", "seg", "--half", 0, "--thresholds", file)
    lines = [line for line in outcome.err.splitlines() if line.startswith("missed: ")]
    assert outcome.status == 1
    assert len(lines) == 1
    assert "allowed is at least 2 (image_ssim)" in lines[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--cond", "canny"], "has no condition 'canny'"),
        (["--cond", "sketch"], "unknown condition 'sketch'"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--precision", "bf16"], "bf16 is a precision of the backend openvino"),
        (["--images", "0"], "--images"),
        (["--thresholds", "nowhere.toml"], "cannot read the thresholds nowhere.toml"),
        (["--size", "big"], "cannot read size 'big'"),
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--model", "miniature"], "was not exported from miniature"),
    ],
)
def test_bad_options_are_one_line(tiny, refused, options, expected):
    model = [] if "--model" in options else ["--model", tiny.checkpoint]
    backend = [] if "--backend" in options else ["--backend", "onnxruntime-cpu"]
    assert expected in refused("parity", "--bundle", tiny.bundle, *model, *backend, *options)


def test_a_bundle_that_is_not_there(refused):
    assert "cnpp-trt export --model miniature" in refused("parity", "--size", "4096")


def test_the_gate_runs_from_python(tiny, tmp_path, logged):
    settings = ParitySettings(
        ["seg"], images=1, half=0, steps=1, model=str(tiny.checkpoint), out=tmp_path / "results" / "p.json"
    )
    result, path = measure_parity(tiny.pipeline, settings)
    assert path == settings.out and read_result(path).data == result.data
    assert result.data["passed"] and not result.data["missed"] and len(logged()) == 2
    assert [i["condition"] for i in result.data["images"]] == ["seg"]
    strict = tmp_path / "strict.toml"
    strict.write_text("[fp32]\nimage_ssim = 2\n")
    gated, _ = measure_parity(tiny.pipeline, replace(settings, thresholds=strict))
    assert not gated.data["passed"] and "(image_ssim)" in gated.data["missed"][0]


# --- build --check


def test_build_checks_what_it_built(tiny_half, tiny_checkpoint, command, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'cnpp-trt[rtx]'")
    build = ["build", "--cond", "seg", "--flavor", "tensorrt-rtx", "--check", "--plans", tmp_path / "plans", "--json"]
    outcome = command(*build, "--bundle", tiny_half, "--model", tiny_checkpoint)
    assert outcome.status == 0, outcome.err
    (found,) = json.loads(outcome.out)
    assert found["check"]["passed"]
    graphs = {g["graph"]: g["relative_l2"] for g in found["check"]["graphs"]}
    assert set(graphs) == {p["key"]["graph"] for p in found["plans"]} - {
        "vae_encoder",
        "vae_encoder_fp32",
        "add_residuals",
    }
    assert 1e-5 < graphs["unet"] <= 2e-2, "fp16 differs, and not by much"

    wrong = Path(shutil.copytree(tiny_half, tmp_path / "wrong"))
    sabotage(wrong, "controlnet_seg")
    outcome = command(*build, "--bundle", wrong, "--model", tiny_checkpoint)
    assert outcome.status == 1
    (found,) = json.loads(outcome.out)
    assert found["built"] == ["controlnet_seg"]
    assert len(found["check"]["missed"]) == 1
    assert outcome.err.splitlines()[-1].startswith("missed: graph controlnet_seg, worst at controlnet_seg step ")


def test_build_needs_the_checkpoint_to_check(tiny_half, refused, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'cnpp-trt[rtx]'")
    build = ["build", "--cond", "seg", "--flavor", "tensorrt-rtx", "--check", "--plans", tmp_path]
    assert "--model PATH" in refused(*build, "--bundle", tiny_half)
    assert list(tmp_path.iterdir()) == []
