"""`cnpp-trt quantize`: scales are those of ONNX Runtime's own quantizer, images stay near, bad input is one line."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.bundles.library import find_bundle
from cnpp_trt.errors import ExportError, UserError
from cnpp_trt.quantization import quantizer
from cnpp_trt.quantization.calibration import largest_magnitudes
from cnpp_trt.quantization.effects import choose_kept
from cnpp_trt.quantization.formats import FP8, INT8
from cnpp_trt.quantization.layers import KEPT, with_kept
from cnpp_trt.quantization.quantizer import QuantizationSettings, quantize_bundle
from cnpp_trt.quantization.recording import record_inputs
from cnpp_trt.quantization.rewriting import open_network, write_quantized
from cnpp_trt.runtime.output.metadata import read_record
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

pytestmark = pytest.mark.slow

FEW = QuantizationSettings(requests=1, launches=3, measured=0, threads=1)


@pytest.fixture(scope="module")
def quantized(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantize_bundle(Bundle.open(tiny.bundle), tmp_path_factory.mktemp("quantized") / "int8", FEW)


@pytest.fixture
def ask(tiny: Any, control_image: Any) -> Request:
    return Request("a house", controls=Control("seg", control_image(*tiny.size)), num_inference_steps=3, seed=1)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((found.astype(float) - expected) ** 2)))


def constants(file: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}


def test_numbers_are_those_of_onnxruntimes_quantizer(tiny, ask, tmp_path) -> None:
    """The largest magnitudes, the scales and the rounded weights, layer by layer."""
    bundle = Bundle.open(tiny.bundle)
    source = bundle.graph_file("controlnet_seg")
    inputs = record_inputs(tiny.pipeline, [tiny.pipeline.resolve(ask)], ["controlnet_seg"], 3)["controlnet_seg"]
    assert len(inputs) == 3
    layers = with_kept(open_network(source).groups(), KEPT)
    ranges = largest_magnitudes(source, list({layer.activation for layer in layers}), inputs)
    write_quantized(source, tmp_path / "ours.onnx", layers, ranges, INT8)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(
        source,
        tmp_path / "theirs.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_quantize=[layer.node for layer in layers],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    ours, theirs = constants(tmp_path / "ours.onnx"), constants(tmp_path / "theirs.onnx")
    assert layers
    for layer in layers:
        # It takes half of the range -127 … 127 too, as a number of steps: 254.
        np.testing.assert_allclose(ours[f"{layer.activation}_scale"], theirs[f"{layer.activation}_scale"], rtol=1e-4)
        np.testing.assert_allclose(ours[f"{layer.weight}_scale"], theirs[f"{layer.weight}_scale"], rtol=1e-4)
        found, expected = ours[f"{layer.weight}_int8"], theirs[f"{layer.weight}_quantized"]
        assert found.dtype == np.int8 and np.abs(found.astype(int) - expected).max() <= 1
        assert np.mean(found != expected) < 0.01


def test_fp8_is_rounded_as_onnx_says(tmp_path) -> None:
    """ONNX's own reference evaluator takes the weights back."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 8)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 3, (1, 8)))
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    kinds = [onnx.helper.make_tensor_value_info(n, 1, shape) for n, shape in (("x", [2, 4]), ("y", [2, 8]))]
    initializer = onnx.numpy_helper.from_array(weight, "w")
    graph = onnx.helper.make_graph([node], "g", kinds[:1], kinds[1:], [initializer])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "a.onnx")
    [layer] = open_network(tmp_path / "a.onnx").layers
    x = rng.standard_normal((2, 4)).astype(np.float32)
    for number, error in ((FP8, 0.04), (INT8, 0.02)):
        write_quantized(tmp_path / "a.onnx", tmp_path / "b.onnx", [layer], {"x": float(np.abs(x).max())}, number)
        model = onnx.load(tmp_path / "b.onnx")
        onnx.checker.check_model(model, full_check=True)
        found: Any
        [found] = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
        difference = np.linalg.norm(found - x @ weight, axis=0) / np.linalg.norm(x @ weight, axis=0)
        assert 0 < difference.mean() < error
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(np.asarray(session.run(None, {"x": x})[0]), found, rtol=2e-2, atol=1e-3)


def test_an_activation_of_zeros_has_a_scale() -> None:
    for dtype in (np.float32, np.float16):
        scale = INT8.scale(0.0, np.dtype(dtype))
        assert scale.dtype == dtype and scale > 0 and np.isfinite(1 / scale.astype(np.float64))


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "openvino"])
def test_images_stay_near_on_every_cpu_backend(tiny, quantized, ask, backend) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    expected = tiny.pipeline(ask).images
    found = Pipeline.open(quantized, backend, threads=1)(ask).images
    assert psnr(found, expected) > 25  # random weights magnify rounding; the miniature is below


def test_the_bundle_says_what_was_done(tiny, quantized) -> None:
    before, after = Bundle.open(tiny.bundle), Bundle.open(quantized.folder)
    assert after.verify() > 0 and after.digest != before.digest
    record = after.manifest.quantization
    assert record is not None and record["format"] == "int8" and record["effects"] == {}
    assert set(record["kept"]) == {"unet", "controlnet_seg", "controlnet_depth"}
    assert "shortcut" in record["kept"]["unet"] and "conv_out" in record["kept"]["unet"]
    assert (after.manifest.precision, after.manifest.number_format) == ("fp32", "int8")
    others = {name for name in before.manifest.files if not name.startswith(("unet.", "controlnet_"))}
    assert all(after.manifest.files[name] == before.manifest.files[name] for name in others)
    sizes = [bundle.manifest.files["unet.onnx.data"]["size"] for bundle in (before, after)]
    assert sizes[1] < sizes[0]
    for graph in record["kept"]:
        spec = after.graph(graph)
        assert 0 < spec.difference < spec.tolerance and spec.measure == "relative L2 to fp32"
        assert (spec.inputs, spec.outputs) == (before.graph(graph).inputs, before.graph(graph).outputs)


def test_the_picture_names_the_precision(quantized, tiny, control_image, tmp_path, command) -> None:
    from PIL import Image

    Image.fromarray(control_image(*tiny.size)).save(tmp_path / "map.png")
    line = [
        "run",
        "--bundle",
        quantized.folder,
        "--cond",
        "seg",
        "--image",
        tmp_path / "map.png",
        "--prompt",
        "a house",
    ]
    line += ["--steps", 2, "--precision", "int8", "--backend", "onnxruntime-cpu", "--out", tmp_path / "out", "--json"]
    outcome = command(*line)
    assert outcome.status == 0, outcome.err
    assert read_record(Path(json.loads(outcome.out)["images"][0])).bundle.precision == "int8"


def test_a_quantized_bundle_is_taken_where_it_is_asked_for(quantized, tiny, tmp_path, monkeypatch) -> None:
    import shutil

    monkeypatch.setenv("CNPP_TRT_HOME", str(tmp_path))
    for folder, name in ((tiny.bundle, "tiny-fp32-64x64"), (quantized.folder, "tiny-int8-64x64")):
        shutil.copytree(folder, tmp_path / "bundles" / name)
    model = quantized.manifest.model
    for preferred in (("fp32", "fp16"), ("fp16", "fp32")):
        assert find_bundle(model, preferred=preferred).name == "tiny-fp32-64x64"
        assert find_bundle(model, "int8", preferred=preferred).name == "tiny-int8-64x64"
    with pytest.raises(UserError, match=r"no bundle of .*: make one with `cnpp-trt quantize"):
        find_bundle(model, "fp8")


def test_bad_input_is_one_line_and_leaves_nothing(tiny, quantized, tmp_path) -> None:
    bundle = Bundle.open(tiny.bundle)
    with pytest.raises(UserError, match="is int8 already: give the bundle that it was made from"):
        quantize_bundle(quantized, tmp_path / "again", FEW)
    with pytest.raises(UserError, match="exists: choose another --out, or delete it first"):
        quantize_bundle(bundle, quantized.folder, FEW)
    with pytest.raises(UserError, match="unknown number format 'int4': choose from int8, fp8"):
        quantize_bundle(bundle, tmp_path / "four", QuantizationSettings("int4"))
    with pytest.raises(UserError, match=r"there is no .*prompts\.jsonl"):
        quantize_bundle(bundle, tmp_path / "data", QuantizationSettings(data=tmp_path, threads=1))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_no_bundle(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantizer, "TOLERANCE", 1e-6)
    with pytest.raises(ExportError, match=r"differs from the bundle's by .*: take more or other calibration data"):
        quantize_bundle(Bundle.open(tiny.bundle), tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_bundle(tiny, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(UserError, match=r"no space left for .*: free some, or choose another --out"):
            quantize_bundle(Bundle.open(tiny.bundle), disk / "int8", FEW)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interrupted_run_leaves_nothing(tiny, tmp_path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizer._Quantization, "_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_bundle(Bundle.open(tiny.bundle), tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_the_worst_groups_are_kept_until_the_rest_is_small_enough() -> None:
    effects = {"a": 5.0, "b": 0.5, "c": 3.0, "d": 0.25}
    assert choose_kept(effects, 10.0) == []
    assert choose_kept(effects, 4.0) == ["a"]
    assert choose_kept(effects, 0.3) == ["a", "c", "b"]
    assert choose_kept(effects, 0.0) == ["a", "c", "b", "d"]


def test_effects_are_measured_and_decide(tiny, tmp_path) -> None:
    """A goal that nothing reaches keeps every group, and the images are the bundle's."""
    settings = QuantizationSettings(requests=1, launches=2, measured=1, min_psnr=80.0, threads=1)
    made = quantize_bundle(Bundle.open(tiny.bundle), tmp_path / "out", settings)
    record = made.manifest.quantization
    assert record is not None and record["effects"]
    groups = open_network(made.graph_file("unet")).groups()
    for name, error in record["effects"].items():
        graph, _, group = name.partition(".")
        assert error >= 0
        if error > 255**2 / 10**8:
            assert group in record["kept"][graph]
    assert set(groups) >= {"resnet", "after_norm"}


def test_the_miniature_stays_near_in_every_condition(miniature, tmp_path) -> None:
    """Measured 39.9 to 48.8 dB on 12 images; `docs/precision.md` has consistency."""
    settings = QuantizationSettings(requests=1, launches=5, measured=0)
    made = quantize_bundle(Bundle.open(miniature.bundle), tmp_path / "int8", settings)
    deployed = Pipeline.open(made, "openvino")
    from cnpp_trt.benchmarks.requests import make_requests

    for condition in made.manifest.conditions:
        [request] = make_requests(miniature.pipeline, condition, [7])
        assert psnr(deployed(request).images, miniature.pipeline(request).images) > 33, condition
