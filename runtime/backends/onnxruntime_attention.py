"""Attention as ONNX Runtime computes it with the least memory.

Graphs in fp32 have opset 23's `Attention`, which on a CPU keeps the score matrix of every head (at 512×512 that of SD
1.5's largest is 1 GiB). Graphs in fp16 have opset 20's MatMul, Softmax and MatMul, which keep it on a GPU too. ONNX
Runtime's own `com.microsoft.MultiHeadAttention` works through it in tiles: on a CPU by rows, on a GPU by flash or
memory-efficient attention. A bundle stays portable: its graphs have the standard operators, and are rewritten in memory
when a session is made.

What is read of the ONNX format is declared here (field numbers of onnx/onnx.proto); protobuf, which ONNX Runtime itself
needs, keeps all other fields as they are. So the package onnx is not needed.
"""

import struct
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

# onnx.proto's messages with the fields that are used: (name, number, type, message); "*" marks a repeated field.
_FIELDS = {
    "Attribute": [
        ("name", 1, "string"),
        ("f", 2, "float"),
        ("i", 3, "int64"),
        ("ints", 8, "*int64"),
        ("type", 20, "int32"),
    ],
    "Node": [
        ("input", 1, "*string"),
        ("output", 2, "*string"),
        ("name", 3, "string"),
        ("op_type", 4, "string"),
        ("attribute", 5, "*Attribute"),
        ("domain", 7, "string"),
    ],
    "Tensor": [
        ("dims", 1, "*int64"),
        ("data_type", 2, "int32"),
        ("int64_data", 7, "*int64"),
        ("name", 8, "string"),
        ("raw_data", 9, "bytes"),
    ],
    "Value": [("name", 1, "string")],
    "Graph": [("node", 1, "*Node"), ("initializer", 5, "*Tensor"), ("output", 12, "*Value")],
    "Opset": [("domain", 1, "string"), ("version", 2, "int64")],
    "Model": [("graph", 7, "Graph"), ("opset_import", 8, "*Opset")],
}
_FLOAT, _INT64, _FLOAT16 = 1, 7, 10  # TensorProto.DataType
_FLOAT_ATTRIBUTE, _INT_ATTRIBUTE = 1, 2  # AttributeProto.AttributeType
_SWAPPED = [0, 2, 1, 3]


def fuse_attention(model: bytes) -> bytes:
    """A model whose attention is `MultiHeadAttention` where that computes the same.

    That is where queries, keys and values were brought from [B,S,H·D] to [B,H,S,D] before it and the result back after
    it, and there is no mask: the operator reads and writes [B,S,H·D].

    Args:
        model: an ONNX file's bytes; weights may lie beside it.

    Returns:
        `model` itself where nothing is rewritten.
    """
    parsed = _model_class().FromString(model)
    graph = _Graph(parsed.graph)
    found = [match for node in parsed.graph.node if (match := graph.attention(node)) is not None]
    if not found:
        return model
    for match in found:
        match.rewrite()
    _remove_unused(parsed.graph)
    parsed.opset_import.add(domain="com.microsoft", version=1)
    rewritten: bytes = parsed.SerializeToString()
    return rewritten


@dataclass
class _Match:
    """Attention that `MultiHeadAttention` can compute.

    Attributes:
        node: makes softmax(scale · q·kᵀ)·v as [B,H,S,D]; it becomes the operator.
        joined: the Reshape that makes [B,S,H·D] of its result.
        inputs: queries, keys and values as [B,S,H·D].
        heads: how many.
        scale: None is the operator's own, 1/√D.
    """

    node: Any
    joined: Any
    inputs: list[str]
    heads: int
    scale: float | None

    def rewrite(self) -> None:
        output = self.joined.output[0]
        del self.joined.output[:]  # nothing else may make it; the node goes with those that nobody reads
        self.node.op_type, self.node.domain = "MultiHeadAttention", "com.microsoft"
        self.node.input[:] = self.inputs
        self.node.output[:] = [output]
        del self.node.attribute[:]
        self.node.attribute.add(name="num_heads", i=self.heads, type=_INT_ATTRIBUTE)
        if self.scale is not None:
            self.node.attribute.add(name="scale", f=self.scale, type=_FLOAT_ATTRIBUTE)


class _Graph:
    """Who makes and who reads each tensor of a graph, and its small constants."""

    def __init__(self, graph: Any) -> None:
        self._made_by = {output: node for node in graph.node for output in node.output}
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        for output in graph.output:
            self._users.setdefault(output.name, []).append(None)
        self._constants = {t.name: values for t in graph.initializer if (values := _values(t)) is not None}

    def attention(self, node: Any) -> _Match | None:
        """What the attention that `node` completes can be rewritten to."""
        if node.domain or len(node.output) != 1:
            return None
        if node.op_type == "Attention":
            attributes = {a.name: a for a in node.attribute}
            if len(node.input) != 3 or any(a.i or a.f for name, a in attributes.items() if name != "scale"):
                return None
            scale = attributes.get("scale")
            return self._match(node, list(node.input), None if scale is None else scale.f)
        if node.op_type == "MatMul":
            return self._of_products(node)
        return None

    def _of_products(self, node: Any) -> _Match | None:
        """Opset 20's: softmax((s·q)·(s·kᵀ))·v, where kᵀ was transposed as [B·H,S,D]."""
        softmax = self._maker(node.input[0], "Softmax")
        scores = softmax and self._maker(softmax.input[0], "MatMul")
        if scores is None or not any(a.name == "axis" and a.i == -1 for a in softmax.attribute):
            return None
        query, key = (self._scaled(name) for name in scores.input)
        if query is None or key is None:
            return None
        name = key[0]
        for op_type, order in (("Reshape", None), ("Transpose", [0, 2, 1]), ("Reshape", None)):
            made = self._maker(name, op_type)
            if made is None or (order and not _orders(made, order)):
                return None
            name = made.input[0]
        return self._match(node, [query[0], name, node.input[1]], query[1] * key[1])

    def _match(self, node: Any, inputs: list[str], scale: float | None) -> _Match | None:
        """For an operation whose inputs are [B,H,S,D]."""
        sources, heads = [], set()
        for name in inputs:
            swap = self._maker(name, "Transpose")
            split = self._maker(swap.input[0], "Reshape") if swap and _orders(swap, _SWAPPED) else None
            if split is None or len(sizes := self._sizes(split.input[1])) != 4:
                return None
            sources.append(split.input[0])
            heads.add(int(sizes[2] or 0))
        swapped = self._only_user(node.output[0], "Transpose")
        joined = self._only_user(swapped.output[0], "Reshape") if swapped and _orders(swapped, _SWAPPED) else None
        if joined is None or len(self._sizes(joined.input[1])) != 3 or len(heads) != 1 or min(heads) < 1:
            return None
        return _Match(node, joined, sources, heads.pop(), scale)

    def _sizes(self, name: str) -> list[float | None]:
        """What a Reshape makes the dimensions, None where that is a size of another tensor; empty if unknown."""
        constant = self._constants.get(name)
        if constant is not None:
            return list(constant)
        sizes: list[float | None] = []
        concat = self._maker(name, "Concat")
        for part in concat.input if concat else []:
            known = self._constants.get(part)
            measured = {a.name: a.i for a in shape.attribute} if (shape := self._maker(part, "Shape")) else {}
            if known is not None and len(known) == 1:
                sizes.append(known[0])
            elif "end" in measured and measured["end"] - measured.get("start", 0) == 1:
                sizes.append(None)
            else:
                return []
        return sizes

    def _maker(self, name: str, op_type: str) -> Any:
        node = self._made_by.get(name)
        return node if node is not None and node.op_type == op_type else None

    def _only_user(self, name: str, op_type: str) -> Any:
        users = self._users.get(name, [])
        alone = users[0] if len(users) == 1 else None
        return alone if alone is not None and alone.op_type == op_type else None

    def _scaled(self, name: str) -> tuple[str, float] | None:
        """A tensor and the number that it was multiplied by."""
        product = self._maker(name, "Mul")
        factor = self._constants.get(product.input[1], []) if product else []
        return (product.input[0], factor[0]) if len(factor) == 1 else None


def _orders(node: Any, order: list[int]) -> bool:
    """Whether a Transpose brings the dimensions into this order."""
    return any(list(a.ints) == order for a in node.attribute)


def _remove_unused(graph: Any) -> None:
    """Removes nodes that nobody reads, and then those that only they read."""
    used = Counter(name for node in graph.node for name in node.input) + Counter(o.name for o in graph.output)
    kept = []
    for node in reversed(graph.node):
        if any(used[name] for name in node.output):
            kept.append(node)
        else:
            used.subtract(node.input)
    nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(nodes)


def _values(tensor: Any) -> list[float] | None:
    """The values of a small tensor of one dimension or none that lies in the model itself: shapes and factors."""
    letter = {_FLOAT: "f", _INT64: "q", _FLOAT16: "e"}.get(tensor.data_type)
    if letter is None or len(tensor.dims) > 1:
        return None
    if tensor.int64_data:
        return list(tensor.int64_data)
    raw: bytes = tensor.raw_data
    count = len(raw) // struct.calcsize(letter)
    return list(struct.unpack(f"<{count}{letter}", raw)) if 0 < count <= 4 else None


@cache
def _model_class() -> Any:
    """ModelProto of the fields above."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="cnpp_trt/onnx_fields.proto", package="cnpp_trt.onnx", syntax="proto2"
    )
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind in fields:
            word = kind.lstrip("*")
            field = described.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if kind != word else kinds.LABEL_OPTIONAL
            if word in _FIELDS:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".cnpp_trt.onnx.{word}"
            else:
                field.type = getattr(kinds, f"TYPE_{word.upper()}")
            if kind != word and word == "int64":
                field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("cnpp_trt.onnx.Model"))
