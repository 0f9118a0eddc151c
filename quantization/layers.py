"""What of a network can be quantized: layers with constant weights, in groups that are quantized or kept together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Kept by default.
# conv_in, conv_out: every network's first and last convolution, some 0.1 % of the work.
# time_embedding: one row each, no work at all.
# shortcut: 1x1 convolutions of the upward path on a concatenation that a normalization reads too. OpenVINO moves the
#   rounding in front of the concatenation, so that the normalization reads rounded values: on the miniature's UNet that
#   makes 0.009 of relative error 0.15.
KEPT = ("conv_in", "conv_out", "shortcut", "time_embedding")


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight.

    Attributes:
        node: its name.
        activation: the tensor that it reads.
        weight: the name of its weight.
        axis: of the weight's output channels.
        group: what it is in the network.
    """

    node: str
    activation: str
    weight: str
    axis: int
    group: str


class Network:
    """An ONNX graph and its layers.

    Args:
        model: of onnx, without its weights.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every Conv, MatMul and Gemm with a constant weight, in the graph's order."""
        return tuple(self._find())

    def groups(self) -> dict[str, list[Layer]]:
        """The layers by group, in the order of their first."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.group, []).append(layer)
        return found

    def _find(self) -> Iterator[Layer]:
        graph = self.model.graph
        dims = {t.name: tuple(t.dims) for t in graph.initializer}
        made_by = {name: node for node in graph.node for name in node.output}
        inputs, outputs = {i.name for i in graph.input}, {o.name for o in graph.output}
        for node in graph.node:
            if node.op_type not in ("Conv", "MatMul", "Gemm") or node.input[1] not in dims or node.input[0] in dims:
                continue
            shape = dims[node.input[1]]
            if len(shape) != (4 if node.op_type == "Conv" else 2):
                continue
            flags = {a.name: a.i for a in node.attribute if a.name in ("transA", "transB")}
            if flags.get("transA"):
                continue
            axis = 0 if node.op_type == "Conv" or flags.get("transB") else 1
            source = "" if node.input[0] in inputs else made_by[node.input[0]].op_type
            group = _group(node.op_type, shape, source, is_last=node.output[0] in outputs)
            yield Layer(node.name, node.input[0], node.input[1], axis, group)


def _group(op: str, shape: Sequence[int], source: str, *, is_last: bool) -> str:
    """What a layer is, by its operator, its weight's shape and the operator that makes what it reads ("": an input)."""
    if op == "Gemm":
        return "time_embedding"
    if op == "MatMul":
        # A LayerNormalization feeds queries, keys, values and the first layer of a feed-forward block; attention's
        # result comes from a Reshape (opset 23) or a MatMul's Reshape (opset 20), the product of GEGLU from a Mul.
        return {"": "text", "Mul": "feed_forward_out", "LayerNormalization": "after_norm"}.get(source, "attention_out")
    if is_last:
        return "conv_out"
    if source == "":
        return "conv_in"
    if shape[2:] == (1, 1):
        return "shortcut" if source == "Concat" else "projection"
    return "resnet" if source == "Mul" else "resample"


def with_kept(groups: Mapping[str, Sequence[Layer]], kept: Sequence[str]) -> list[Layer]:
    """The layers that are quantized where these groups are kept."""
    return [layer for group, layers in groups.items() if group not in kept for layer in layers]
