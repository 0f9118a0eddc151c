"""The backend `onnxruntime-cpu`: what it does to save memory changes nothing in what it draws."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.runtime.backends import host_memory
from cnpp_trt.runtime.backends.onnxruntime_attention import tile_attention

SIZES = {"batch": 2, "images": 1, "tokens": 77, "prompts": 2, "guidance": 2}


def operators(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.ModelProto.FromString(model).graph.node)


def outputs_of(bundle: Bundle, graph: str, model: bytes) -> list[np.ndarray]:
    """What a graph gives on random inputs, without any optimization of ONNX Runtime's."""
    rng, feeds = np.random.default_rng(0), {}
    for tensor in bundle.graph(graph).inputs:
        shape = [SIZES[d] if isinstance(d, str) else d for d in tensor.shape]
        values: Any = rng.standard_normal(shape) if tensor.dtype == "float32" else np.zeros(shape)
        feeds[tensor.name] = values.astype(tensor.dtype)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(found) for found in session.run(None, feeds)]


@pytest.mark.parametrize("graph", ["unet", "controlnet_seg", "vae_decoder"])
def test_tiled_attention_computes_what_the_standard_operator_does(model, graph) -> None:
    bundle = Bundle.open(model.bundle)
    before = bundle.graph_file(graph).read_bytes()
    after = tile_attention(before)
    count = operators(before)["Attention"]
    assert count and operators(after)["Attention"] == 0 and operators(after)["MultiHeadAttention"] == count
    for found, expected in zip(outputs_of(bundle, graph, after), outputs_of(bundle, graph, before), strict=True):
        if expected.dtype == np.uint8:
            assert np.abs(found.astype(int) - expected).max() <= 1
        else:
            assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)


def test_nodes_that_nobody_reads_any_more_are_gone(model) -> None:
    bundle = Bundle.open(model.bundle)
    graph = onnx.ModelProto.FromString(tile_attention(bundle.graph_file("unet").read_bytes())).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(set(node.output) & read for node in graph.node)


def test_attention_with_a_mask_and_graphs_without_any_stay_as_they_are(model) -> None:
    bundle = Bundle.open(model.bundle)
    for graph in ("text_encoder", "update"):
        content = bundle.graph_file(graph).read_bytes()
        assert tile_attention(content) is content


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
    assert tile_attention(content) is content


def test_a_scale_of_its_own_is_kept(model) -> None:
    bundle = Bundle.open(model.bundle)
    whole = onnx.ModelProto.FromString(bundle.graph_file("vae_decoder").read_bytes())
    [node] = [node for node in whole.graph.node if node.op_type == "Attention"]
    node.attribute.add(name="scale", f=0.7, type=1)
    content = whole.SerializeToString()
    found, expected = (outputs_of(bundle, "vae_decoder", m)[0].astype(int) for m in (tile_attention(content), content))
    assert np.abs(found - expected).max() <= 1


def test_graphs_are_unloaded_while_the_loop_runs_and_loaded_again(
    model, sessions: list[str], monkeypatch: pytest.MonkeyPatch, control_image: Any
) -> None:
    request = Request("a house", controls=Control("seg", control_image(*model.size)), num_inference_steps=2, seed=3)
    expected = model.pipeline(request).images
    monkeypatch.setattr(host_memory, "LARGE", 0)
    pipeline = Pipeline.open(model.bundle, "onnxruntime-cpu")
    del sessions[:]
    assert np.array_equal(pipeline(request).images, expected)
    once = Counter(sessions)
    pipeline(request)  # its prompt and its condition are known
    assert Counter(sessions) == once
    pipeline(Request("a tree", controls=request.controls, num_inference_steps=2, seed=3))
    again = Counter(sessions) - once
    assert again == {"text_encoder": 1, "text_kv": 1, "text_kv_seg": 1}


def test_sessions_of_several_pipelines_share_an_arena(model, control_image: Any) -> None:
    request = Request("a house", controls=Control("seg", control_image(*model.size)), num_inference_steps=2, seed=3)
    first, second = (Pipeline.open(model.bundle, "onnxruntime-cpu", threads=1) for _ in range(2))
    assert np.array_equal(first(request).images, second(request).images)
    first.close()
    assert np.array_equal(second(request).images, second(request).images)
