"""ONNX Runtime's own attention in place of the standard operators: it changes nothing in what is computed."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.export.onnx_graph import ExportSpec, export_graph
from cnpp_trt.runtime.backends.onnxruntime_attention import fuse_attention
from diffusers.models.attention_processor import Attention

SIZES = {"batch": 2, "images": 1, "tokens": 77, "prompts": 2, "guidance": 2}


def operators(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.ModelProto.FromString(model).graph.node)


def outputs_of(bundle: Bundle, graph: str, model: bytes) -> list[np.ndarray]:
    """What a graph gives on random inputs, without any optimization of ONNX Runtime's."""
    rng, feeds = np.random.default_rng(0), {}
    for tensor in bundle.graph(graph).inputs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in tensor.shape]
        values: Any = rng.standard_normal(shape) if tensor.dtype.startswith("float") else np.zeros(shape)
        feeds[tensor.name] = values.astype(tensor.dtype)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(found) for found in session.run(None, feeds)]


def compare(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        if other.dtype == np.uint8:
            assert np.abs(one.astype(int) - other).max() <= 1
        else:
            assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("graph", ["unet", "controlnet_seg", "vae_decoder"])
def test_the_operator_computes_what_the_standard_operator_does(model, graph) -> None:
    bundle = Bundle.open(model.bundle)
    before = bundle.graph_file(graph).read_bytes()
    after = fuse_attention(before)
    count = operators(before)["Attention"]
    assert count and operators(after)["Attention"] == 0 and operators(after)["MultiHeadAttention"] == count
    compare(outputs_of(bundle, graph, after), outputs_of(bundle, graph, before), 2e-5)


@pytest.mark.parametrize("graph", ["unet", "controlnet_seg", "vae_decoder"])
def test_the_operator_computes_what_the_products_of_fp16_graphs_do(tiny_half: Path, graph: str) -> None:
    bundle = Bundle.open(tiny_half)
    before = bundle.graph_file(graph).read_bytes()
    after = fuse_attention(before)
    count = operators(before)["Softmax"]
    assert count and operators(after)["Softmax"] == 0 and operators(after)["MultiHeadAttention"] == count
    # Scores are no longer rounded to fp16.
    compare(outputs_of(bundle, graph, after), outputs_of(bundle, graph, before), 5e-3)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("context", [None, 12])
def test_the_operator_computes_what_pytorch_does(tmp_path: Path, opset: int, context: int | None) -> None:
    """At either opset, over the tokens of the image and over those of a prompt."""
    torch.manual_seed(0)
    module = Attention(query_dim=32, heads=4, dim_head=8, cross_attention_dim=context).eval()
    names = ["hidden_states", "encoder_hidden_states"][: 1 if context is None else 2]
    example = (torch.randn(2, 16, 32), torch.randn(2, 8, 12))[: len(names)]
    inputs = dict(zip(names, example, strict=True))
    free = {"hidden_states": {0: "batch"}, "encoder_hidden_states": {0: "batch", 1: "tokens"}, "out": {0: "batch"}}
    free = {name: axes for name, axes in free.items() if name in (*names, "out")}
    export_graph(ExportSpec("attention", module, inputs, ["out"], {}, free), tmp_path, "fp32", opset)
    model = fuse_attention((tmp_path / "attention.onnx").read_bytes())
    assert operators(model)["MultiHeadAttention"] == 1 and operators(model)["Softmax"] == 0
    given = [torch.randn(3, *tensor.shape[1:]) for tensor in example]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), module(*given), rtol=1e-5, atol=1e-5)


def test_nodes_that_nobody_reads_any_more_are_gone(model) -> None:
    bundle = Bundle.open(model.bundle)
    graph = onnx.ModelProto.FromString(fuse_attention(bundle.graph_file("unet").read_bytes())).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(set(node.output) & read for node in graph.node)


def test_attention_with_a_mask_and_graphs_without_any_stay_as_they_are(model) -> None:
    bundle = Bundle.open(model.bundle)
    for graph in ("text_encoder", "update"):
        content = bundle.graph_file(graph).read_bytes()
        assert fuse_attention(content) is content


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.attribute.add(name="softcap", f=30.0, type=1),
        lambda node: node.attribute.add(name="is_causal", i=1, type=2),
        lambda node: node.output.extend(["present_key", "present_value"]),
    ],
)
def test_attention_that_the_other_operator_has_not_stays(model, change) -> None:
    whole = onnx.ModelProto.FromString(Bundle.open(model.bundle).graph_file("vae_decoder").read_bytes())
    [node] = [node for node in whole.graph.node if node.op_type == "Attention"]
    del node.attribute[:]
    change(node)
    content = whole.SerializeToString()
    assert fuse_attention(content) is content


def test_a_scale_of_its_own_is_kept(model) -> None:
    bundle = Bundle.open(model.bundle)
    whole = onnx.ModelProto.FromString(bundle.graph_file("vae_decoder").read_bytes())
    [node] = [node for node in whole.graph.node if node.op_type == "Attention"]
    node.attribute.add(name="scale", f=0.7, type=1)
    content = whole.SerializeToString()
    found, expected = (outputs_of(bundle, "vae_decoder", m)[0].astype(int) for m in (fuse_attention(content), content))
    assert np.abs(found - expected).max() <= 1
