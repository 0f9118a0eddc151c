"""What graphs are counted to ask for: against PyTorch's own counter on the modules that they were exported from."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cnpp_trt.benchmarks.latency.flop_count import count_ops, request_op_counts, split_flop
from cnpp_trt.benchmarks.records import roofline_seconds
from cnpp_trt.bundles.bundle import Bundle, GraphSpec, Manifest, TensorSpec
from cnpp_trt.bundles.graph_names import STEPS_AT_ONCE
from cnpp_trt.errors import CnppError
from cnpp_trt.export import graphs
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.export.onnx_graph import ExportSpec
from cnpp_trt.runtime.shape import LoopShape, Schedule
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_fp16(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With the graphs whose operators differ from those of fp32."""
    everything = graphs.base_graphs
    with pytest.MonkeyPatch.context() as patch:
        kept = ("text_encoder", "text_kv", "time_embeds", "unet", "vae_decoder")
        patch.setattr(graphs, "base_graphs", lambda *a: (g for g in everything(*a) if g[0] in kept))
        folder = tmp_path_factory.mktemp("fp16") / "tiny"
        return export_bundle(Checkpoint(str(tiny_checkpoint)), ["seg"], folder, precision="fp16")


def sources(checkpoint: Path, bundle: Bundle) -> Iterator[ExportSpec]:
    """Of the bundle's graphs, but for those of `depth`, which are as large as those of `seg`."""
    opened = Checkpoint(str(checkpoint))
    geometry = graphs.GraphDims.of(opened, bundle.manifest)
    for described in (graphs.base_graphs(opened, geometry), graphs.condition_graphs(opened, "seg", geometry)):
        yield from (make() for name, make in described if name in bundle.manifest.graphs)


def resized(source: ExportSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The example inputs with their free dimensions cut or repeated to these sizes."""

    def fit(name: str, tensor: Tensor) -> Tensor:
        for dimension, free in source.free.get(name, {}).items():
            index = torch.arange(sizes[free]) % tensor.shape[dimension]
            tensor = tensor.index_select(dimension, index)
        return tensor

    return {
        argument: tuple(fit(name, t) for name, t in zip(source.nested[argument], given, strict=True))
        if isinstance(given, tuple)
        else fit(argument, given)
        for argument, given in source.inputs.items()
    }


def counted_by_torch(source: ExportSpec, sizes: Mapping[str, int]) -> int:
    # Attention as plain products: the counter knows those on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        source.module(**resized(source, sizes))
    return counter.get_total_flops()


# Guided, one image; unguided, three.
SIZES = (
    {"batch": 2, "images": 1, "guidance": 2, "prompts": 2, "tokens": 77, "steps": STEPS_AT_ONCE},
    {"batch": 3, "images": 3, "guidance": 1, "prompts": 3, "tokens": 77, "steps": STEPS_AT_ONCE},
)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_graph_asks_for_the_operations_that_torch_counts(request, tiny, precision):
    bundle = tiny.pipeline.bundle if precision == "fp32" else request.getfixturevalue("tiny_fp16")
    seen = set()
    for source in sources(tiny.checkpoint, bundle):
        seen.add(source.name)
        for sizes in SIZES:
            expected = counted_by_torch(source, sizes)
            assert count_ops(bundle, source.name, sizes)["flop"] == expected, (source.name, sizes)
            assert (expected == 0) == (source.name == "add_residuals"), source.name
    assert seen == {name for name in bundle.manifest.graphs if not name.endswith("_depth")}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bytes_are_those_of_weights_inputs_and_outputs(request, tiny, precision):
    bundle = tiny.pipeline.bundle if precision == "fp32" else request.getfixturevalue("tiny_fp16")
    sizes = SIZES[1]
    for source in sources(tiny.checkpoint, bundle):
        if source.name not in ("unet", "text_encoder"):
            continue  # other modules hold weights that they do not use, as the decoder's the encoder's
        expected = sum(p.nbytes for p in source.module.parameters())
        if source.name == "text_encoder":  # of its tables it reads a row for each token, and one for each place
            tokens, places = (m.weight for m in source.module.modules() if isinstance(m, torch.nn.Embedding))
            expected += sizes["prompts"] * places.nbytes - tokens.nbytes
            expected += places.shape[0] ** 2  # the causal mask, a byte a place
        for tensor in (*bundle.graph(source.name).inputs, *bundle.graph(source.name).outputs):
            expected += (
                math.prod(sizes[d] if isinstance(d, str) else d for d in tensor.shape) * np.dtype(tensor.dtype).itemsize
            )
        # Weights that are equal, as norms' ones, are exported once.
        assert count_ops(bundle, source.name, sizes)["bytes"] == pytest.approx(expected, rel=0.02), source.name


def test_a_request_asks_for_what_its_program_launches(tiny):
    bundle = tiny.pipeline.bundle
    schedule = Schedule(((True, True, True, False), (False, True, False, False)), (False,) * 4)
    guided = LoopShape(images=1, guided=True, controls=("seg", "depth"))
    asked, launches = request_op_counts(bundle, guided, schedule)
    once = {"text_encoder": 1, "text_kv": 3, "time_embeds": 3, "hint": 2}
    assert launches == {**once, "controlnet": 5, "unet": 4, "update": 4, "vae_decoder": 1}
    sizes = SIZES[0]
    for stage in ("text_encoder", "unet", "update", "vae_decoder"):
        assert asked[stage] == count_ops(bundle, stage, sizes)
    parts = [*[count_ops(bundle, "controlnet_seg", sizes)] * 3, count_ops(bundle, "controlnet_depth", sizes)]
    parts.append(count_ops(bundle, "add_residuals", sizes))
    for name in ("flop", "bytes"):
        assert 5 * asked["controlnet"][name] == pytest.approx(sum(part[name] for part in parts))

    unguided = LoopShape(images=3, guided=False, controls=("seg",), uncontrolled=False)
    asked, launches = request_op_counts(bundle, unguided, Schedule(((True,),), (True,)))
    both = ("text_kv", "time_embeds")  # of the UNet and of the ControlNet
    assert launches == {s: 2 if s in both else 1 for s in launches}
    for s in set(launches) - set(both):
        assert asked[s] == count_ops(bundle, f"{s}_seg" if s in ("hint", "controlnet") else s, SIZES[1])


def test_the_floor_is_the_longer_of_computing_and_moving():
    assert roofline_seconds({"flop": 6e9, "bytes": 1e9}, 2e9, 1e9) == 3
    assert roofline_seconds({"flop": 6e9, "bytes": 4e9}, 2e9, 1e9) == 4


# ----------------------------------------------------------------------------------------------------- single nodes


def graph_of(
    folder: Path, node: onnx.NodeProto, x: tuple[int | str, ...], weights: Mapping[str, np.ndarray] | None = None
) -> Bundle:
    """A bundle whose only graph `g` is this node, of x, float32."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", x), ("y", None))]
    constants = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "g.onnx")
    manifest = Manifest("m", "b", "fp32", 8, 8, 4, 8, 2, {})
    manifest.graphs["g"] = GraphSpec("g.onnx", (TensorSpec("x", "float32", x),), (), 0, 0, "", 0)
    return Bundle(folder, manifest)


CASES: dict[str, Any] = {
    "grouped convolution": (
        helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1]),
        {"w": (6, 2, 3, 3)},
        ("batch", 4, 8, 8),
        lambda x, w: functional.conv2d(x, w, groups=2, padding=1),
    ),
    "transposed convolution": (
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
        {"w": (4, 6, 2, 2)},
        ("batch", 4, 8, 8),
        lambda x, w: functional.conv_transpose2d(x, w, stride=2),
    ),
    "transposed Gemm": (
        helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1),
        {"w": (7, 3)},
        (3, 5),
        lambda x, w: x.T @ w.T,
    ),
    "product with a batch": (
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        {"w": (6, 7)},
        ("batch", 5, 6),
        lambda x, w: x @ w,
    ),
    "attention, heads apart": (
        helper.make_node("Attention", ["x", "k", "v"], ["y"]),
        {"k": (2, 3, 9, 8), "v": (2, 3, 9, 4)},
        ("batch", 3, 5, 8),
        functional.scaled_dot_product_attention,
    ),
    "attention, heads together": (
        helper.make_node("Attention", ["x", "k", "v"], ["y"], q_num_heads=3, kv_num_heads=3),
        {"k": (2, 9, 24), "v": (2, 9, 12)},
        ("batch", 5, 24),
        lambda x, k, v: functional.scaled_dot_product_attention(
            *(t.unflatten(2, (3, -1)).transpose(1, 2) for t in (x, k, v))
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_node_asks_for_the_operations_that_torch_counts(tmp_path, case):
    node, weights, x, call = CASES[case]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    bundle = graph_of(tmp_path, node, x, arrays)
    given = [torch.zeros([2 if d == "batch" else d for d in x]), *map(torch.from_numpy, arrays.values())]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = call(*given)
    assert count_ops(bundle, "g", {"batch": 2}) == {
        "flop": counter.get_total_flops(),
        "bytes": out.nbytes + sum(t.nbytes for t in given),
    }


def test_quantized_operations_are_those_between_quantize_and_dequantize(tmp_path):
    """Three products: with both factors quantized (6 columns), with one (3 columns), with none (3 columns)."""
    bundle = graph_of(tmp_path, helper.make_node("Identity", ["x"], ["y"]), (4, 8))
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    weights = {"a": (np.int8, 6), "b": (np.float32, 3), "c": (np.float32, 3)}
    constants = [numpy_helper.from_array(np.ones((8, n), dtype), name) for name, (dtype, n) in weights.items()]
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "scale"], ["xq"]),
        helper.make_node("DequantizeLinear", ["a", "scale"], ["aq"]),
        helper.make_node("MatMul", ["xq", "aq"], ["y"]),
        helper.make_node("MatMul", ["xq", "b"], ["half"]),
        helper.make_node("MatMul", ["x", "c"], ["whole"]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", (4, 8)), ("y", None))
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [scale, zero, *constants])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "g.onnx")
    assert count_ops(bundle, "g", {})["flop"] == 2 * 4 * 8 * (6 + 3 + 3)
    assert split_flop(bundle, "g", {}) == (2 * 4 * 8 * 6, 2 * 4 * 8 * (3 + 3))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("MatMul", ["x", "missing"], ["y"]), "the shape of 'y' is unknown"),
        (helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,ij->i"), "a node of kind Einsum"),
        (helper.make_node("Product", ["x"], ["y"], domain="mine"), "a node of kind Product"),
    ],
)
def test_what_cannot_be_counted_is_never_counted_as_nothing(tmp_path, node, message):
    with pytest.raises(CnppError, match=message):
        count_ops(graph_of(tmp_path, node, ("batch", 4)), "g", {"batch": 2})


def test_a_dimension_that_was_not_given_is_an_error(tiny):
    with pytest.raises(CnppError, match="operations of unet: the shape of 'conv2d' is unknown"):
        count_ops(tiny.pipeline.bundle, "unet", {})
