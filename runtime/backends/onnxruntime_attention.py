"""Attention as ONNX Runtime's CPU provider computes it with the least memory.

Opset 23's `Attention` keeps the score matrix of every head (at 512×512 that of SD 1.5's largest is 1 GiB), and
`com.microsoft.MultiHeadAttention` works through it in tiles. A bundle stays portable: its graphs have the standard
operator, and are rewritten in memory when a session is made.

What is read of the ONNX format is declared here (field numbers of onnx/onnx.proto); protobuf, which ONNX Runtime itself
needs, keeps all other fields as they are. So the package onnx is not needed.
"""

import struct
from collections import Counter
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
_INT64 = 7  # TensorProto.DataType
_FLOAT_ATTRIBUTE, _INT_ATTRIBUTE = 1, 2  # AttributeProto.AttributeType
_SWAPPED = [0, 2, 1, 3]


def tile_attention(model: bytes) -> bytes:
    """A model whose `Attention` nodes are `MultiHeadAttention` where that computes the same.

    That is where queries, keys and values were brought from [B,S,H·D] to [B,H,S,D] before the node and the result back
    after it, and there is no mask: the operator reads and writes [B,S,H·D].

    Args:
        model: an ONNX file's bytes; weights may lie beside it.

    Returns:
        `model` itself where nothing is rewritten.
    """
    parsed = _model_class().FromString(model)
    graph = parsed.graph
    made_by = {output: node for node in graph.node for output in node.output}
    shapes = {t.name: values for t in graph.initializer if (values := _whole_numbers(t)) is not None}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    rewritten = 0
    for node in graph.node:
        if node.op_type == "Attention" and not node.domain:
            rewritten += _rewrite(node, made_by, users, shapes)
    if not rewritten:
        return model
    _remove_unused(graph)
    parsed.opset_import.add(domain="com.microsoft", version=1)
    found: bytes = parsed.SerializeToString()
    return found


def _rewrite(node: Any, made_by: dict[str, Any], users: dict[str, list[Any]], shapes: dict[str, list[int]]) -> bool:
    attributes = {a.name: a for a in node.attribute}
    plain = not any(a.i or a.f for name, a in attributes.items() if name != "scale")
    if len(node.input) != 3 or len(node.output) != 1 or not plain:
        return False
    sources = []
    for name in node.input:
        swap = made_by.get(name)
        split = made_by.get(swap.input[0]) if swap is not None and _swaps(swap) else None
        if split is None or split.op_type != "Reshape":
            return False
        sources.append(split)
    heads = shapes.get(sources[0].input[1], [])
    after = users.get(node.output[0], [])
    if len(heads) != 4 or heads[2] < 1 or len(after) != 1 or not _swaps(after[0]):
        return False
    joined = users.get(after[0].output[0], [])
    if len(joined) != 1 or joined[0].op_type != "Reshape" or len(shapes.get(joined[0].input[1], [])) != 3:
        return False
    output = joined[0].output[0]
    del joined[0].output[:]  # nothing else may make it; the node goes with those that nobody reads
    node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
    node.input[:] = [source.input[0] for source in sources]
    node.output[:] = [output]
    scale = attributes.get("scale")
    del node.attribute[:]
    node.attribute.add(name="num_heads", i=heads[2], type=_INT_ATTRIBUTE)
    if scale is not None:
        node.attribute.add(name="scale", f=scale.f, type=_FLOAT_ATTRIBUTE)
    return True


def _swaps(node: Any) -> bool:
    """Whether a node makes [B,H,S,D] of [B,S,H,D], or the other way round."""
    return node.op_type == "Transpose" and any(list(a.ints) == _SWAPPED for a in node.attribute)


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


def _whole_numbers(tensor: Any) -> list[int] | None:
    """The values of a small tensor of int64 that lies in the model itself."""
    if tensor.data_type != _INT64 or len(tensor.dims) != 1:
        return None
    if tensor.int64_data:
        return list(tensor.int64_data)
    raw: bytes = tensor.raw_data
    return list(struct.unpack(f"<{len(raw) // 8}q", raw)) if raw and len(raw) % 8 == 0 else None


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
