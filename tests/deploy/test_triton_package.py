"""`cnpp-trt package --triton`: what it writes, read by NVIDIA's own schema and by onnx, and what it refuses."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from cnpp_trt import Bundle
from cnpp_trt.engines.fusion import FusionReport
from cnpp_trt.engines.plan import BuildResult, PlanKey, graph_digest, system
from cnpp_trt.engines.store import PlanStore


@pytest.fixture
def package(command: Callable[..., Any], tiny: Any, tmp_path: Path) -> Callable[..., Any]:
    return lambda *more: command("package", tiny.bundle, "--triton", tmp_path / "models", *more)


@pytest.fixture
def parsed(tmp_path: Path) -> Callable[[str], Any]:
    """A model's configuration, as protobuf reads it with Triton's schema."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    def parse(name: str) -> Any:
        text = (tmp_path / "models" / name / "config.pbtxt").read_text("utf-8")
        return text_format.Parse(text, schema.ModelConfig())

    return parse


def test_the_model(package: Callable[..., Any], parsed: Callable[[str], Any], tiny: Any, tmp_path: Path) -> None:
    options = ("--name", "m", "--backend", "onnxruntime-cpu", "--threads", 2, "--max-batch", 8, "--batch-window", 0.05)
    outcome = package(*options, "--queue", 5, "--json")
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "models" / "m"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert json.loads(outcome.out) == {"model": "m", "version": 1, "graphs": [], "bytes": size}
    config = parsed("m")
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 8)
    assert config.dynamic_batching.max_queue_delay_microseconds == 50_000
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 5
    assert {p: config.parameters[p].string_value for p in config.parameters} == {
        "backend": "onnxruntime-cpu", "threads": "2", "plans": "",
    }  # fmt: skip
    [group] = config.instance_group
    assert group.kind == group.Kind.Value("KIND_CPU")
    assert config.version_policy.latest.num_versions == 1
    width, height = tiny.size
    image = next(tensor for tensor in config.output if tensor.name == "image")
    assert list(image.dims) == [height, width, 3]
    required = {tensor.name for tensor in config.input if not tensor.optional}
    assert required == {"prompt"}
    assert sorted(sample.batch_size for sample in config.model_warmup) == [1, 8]
    word = (folder / "warmup" / "condition").read_bytes()
    assert word[4:].decode() in tiny.pipeline.bundle.manifest.conditions
    assert struct.unpack("<I", word[:4]) == (len(word) - 4,)
    copy = Bundle.open(folder / "1" / "bundle")
    assert copy.verify() > 0
    assert copy.digest == tiny.pipeline.bundle.digest
    # onnx refuses weights with several links, also in the bundle that was packaged.
    assert onnx.load(tiny.bundle / "unet.onnx").graph.node


def test_a_gpu_and_no_batching(package: Callable[..., Any], parsed: Callable[[str], Any], tmp_path: Path) -> None:
    assert package("--name", "m", "--max-batch", 1).status == 0
    config = parsed("m")
    assert not config.HasField("dynamic_batching")
    [group] = config.instance_group
    assert group.kind == group.Kind.Value("KIND_AUTO")  # an instance on each GPU, or one on the CPU


def test_graphs_as_onnx_models(
    package: Callable[..., Any], parsed: Callable[[str], Any], tiny: Any, tmp_path: Path
) -> None:
    assert package("--name", "m", "--graphs", "onnx").status == 0
    types = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64", 10: "TYPE_FP16"}  # onnx.TensorProto → Triton
    graphs = tiny.pipeline.bundle.manifest.graphs
    assert len(graphs) > 5
    for graph in graphs:
        config = parsed(f"m_{graph}")
        assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 0)
        model = onnx.load(tmp_path / "models" / f"m_{graph}" / "1" / config.default_model_filename)  # with its weights
        for tensors, told in ((model.graph.input, config.input), (model.graph.output, config.output)):
            by_name = {tensor.name: tensor for tensor in told}
            assert set(by_name) == {tensor.name for tensor in tensors}
            for tensor in tensors:
                kind = tensor.type.tensor_type
                dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
                own = by_name[tensor.name]
                assert list(own.dims) == dims
                assert (
                    own.data_type
                    == type(config)
                    .DESCRIPTOR.file.enum_types_by_name["DataType"]
                    .values_by_name[types[kind.elem_type]]
                    .number
                )


def test_graphs_as_tensorrt_plans(
    package: Callable[..., Any], parsed: Callable[[str], Any], tiny: Any, tmp_path: Path
) -> None:
    """For two GPUs; a plan of TensorRT-RTX, which Triton does not load, is none."""
    bundle, store, h100 = tiny.pipeline.bundle, PlanStore(tmp_path / "plans"), "sm90-132-nvidia-h100"
    report = FusionReport(1, 0, 0, 0, 0, 0, 0, ())
    for graph in bundle.manifest.graphs:
        own = PlanKey(graph, graph_digest(bundle, graph), "tensorrt", "11.4.0", h100, system(), (), {})
        for key in (own, replace(own, target="sm120-170-nvidia-rtx-5090")):
            built = BuildResult(f"{graph} {key.target}".encode(), report, 1.0, 1, 1, None, 1)
            store.get_or_build(key, "m", partial(replace, built))
    assert package("--name", "m", "--graphs", "tensorrt", "--plans", tmp_path / "plans").status == 0
    config = parsed("m_unet")
    assert config.platform == "tensorrt_plan"
    files = dict(config.cc_model_filenames)
    assert set(files) == {"9.0", "12.0"}
    folder = tmp_path / "models" / "m_unet" / "1"
    assert (folder / files["9.0"]).read_bytes() == b"unet sm90-132-nvidia-h100"
    assert (folder / files["12.0"]).read_bytes() == b"unet sm120-170-nvidia-rtx-5090"


def test_nothing_is_overwritten(package: Callable[..., Any], tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in (tmp_path / "models").rglob("*") if p.is_file()}

    assert package("--name", "m").status == 0
    before = files()
    again = package("--name", "m")
    assert again.status == 2
    assert "has a version 1: add --version 2" in again.err
    other = package("--name", "m", "--version", 2, "--max-batch", 2)
    assert other.status == 2
    assert "config.pbtxt says something else" in other.err
    assert files() == before
    assert package("--name", "m", "--version", 2).status == 0
    assert {name: content for name, content in files().items() if name in before} == before
    assert Bundle.open(tmp_path / "models" / "m" / "2" / "bundle").verify() > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--name", "../x"), "cannot be a model's name"),
        (("--graphs", "onxn"), "onnx"),
        (("--backend", "cuda"), "backend"),
        (("--graphs", "tensorrt", "--plans", "nowhere"), "has no TensorRT plan of"),
    ],
)
def test_refusals(refused: Callable[..., str], tiny: Any, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    assert said in refused("package", tiny.bundle, "--triton", tmp_path / "models", *more)
    assert not list((tmp_path / "models").glob("*/config.pbtxt"))


def test_a_damaged_bundle(refused: Callable[..., str], bundle_copy: Path, tmp_path: Path) -> None:
    weights = bundle_copy / "unet.onnx.data"
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    assert "is damaged" in refused("package", bundle_copy, "--triton", tmp_path / "models")
    assert not list((tmp_path / "models").glob("*"))
