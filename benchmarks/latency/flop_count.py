"""How much a graph computes and moves at least, counted in its ONNX file: for the floor that no implementation beats.

Counted are the operations that multiply matrices (convolutions, products, attention), where a multiply-add is two.
Elementwise operations and normalizations are left out: they are a few percent, and a fused kernel hides them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from ...bundles.bundle import Bundle
from ...errors import CnppError
from ...install import cannot_import
from ...runtime.backends.interface import Allocate, Backend, Buffer, Step
from ...runtime.loop import Program
from ...runtime.shape import LoopShape, Schedule
from ..records import OpCount

Shape = tuple[int, ...]
# A tensor's shape by its name; raises where it is unknown.
_Shapes = Callable[[str], Shape]

# They multiply matrices and would go uncounted, or hide what does.
_REFUSED = {
    *("Einsum", "DeformConv", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "LSTM", "GRU", "RNN"),
    *("If", "Loop", "Scan"),
}
# A tensor of so many values may be a shape; weights are never looked into.
_SHAPE_VALUES = 64


def count_ops(bundle: Bundle, graph: str, sizes: Mapping[str, int]) -> OpCount:
    """What one launch of a graph asks for.

    FLOP as counted above. Bytes: every weight, input and output once; of a table that is only looked up in, what is
    read. What lies between its nodes is not counted, nor whether weights are still in a cache from the last launch.

    Args:
        bundle: that has the graph.
        graph: its name.
        sizes: of the free dimensions that the graph has: `batch`, `tokens`, `prompts`, `images`, `guidance`,
            `steps`.

    Raises:
        CnppError: a node's operations cannot be counted.
    """
    model = _load(bundle, graph)
    types = _types(model, sizes)
    shape = _shape_of(types, graph)
    flop = sum(_flop(node, shape, graph) for node in model.graph.node)
    return OpCount(flop=float(flop), bytes=float(_bytes(model, shape, types)))


def split_flop(bundle: Bundle, graph: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The operations of `count_ops`: those whose factors both come out of a DequantizeLinear, and the others."""
    model = _load(bundle, graph)
    shape = _shape_of(_types(model, sizes), graph)
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    quantized = others = 0
    for node in model.graph.node:
        if dequantized.issuperset(node.input[:2]):
            quantized += _flop(node, shape, graph)
        else:
            others += _flop(node, shape, graph)
    return quantized, others


def request_op_counts(
    bundle: Bundle, shape: LoopShape, schedule: Schedule
) -> tuple[dict[str, OpCount], dict[str, int]]:
    """By stage, what one launch asks for, and how many launches a request of this loop shape and schedule has.

    Where a stage launches several graphs (two controls), the work is their mean.
    """
    launched: dict[str, list[OpCount]] = {}
    known: dict[tuple[Any, ...], OpCount] = {}
    for step in launches(bundle, shape, schedule):
        sizes = free_sizes(bundle, step)
        key = (step.graph, *sorted(sizes.items()))
        if key not in known:
            known[key] = count_ops(bundle, step.graph, sizes)
        launched.setdefault(step.stage, []).append(known[key])
    mean = {
        stage: OpCount(flop=sum(w["flop"] for w in all_) / len(all_), bytes=sum(w["bytes"] for w in all_) / len(all_))
        for stage, all_ in launched.items()
    }
    return mean, {stage: len(all_) for stage, all_ in launched.items()}


def launches(bundle: Bundle, shape: LoopShape, schedule: Schedule) -> list[Step]:
    """Every launch of a graph in a request of this loop shape and schedule; none of them can be run."""
    program = Program(cast(Backend, NullBackend()), bundle, shape, schedule)
    steps = (program.text, *program.hoists.steps(), *program.hints, *program.launches())
    return [step for step in steps if step.graph]


def free_sizes(bundle: Bundle, step: Step) -> dict[str, int]:
    """Of the graph that a step launches, the sizes of the free dimensions."""
    return {
        dimension: size
        for tensor in bundle.graph(step.graph).inputs
        for dimension, size in zip(tensor.shape, step.inputs[tensor.name].shape, strict=True)
        if isinstance(dimension, str)
    }


class NullBackend:
    """As much of a backend as a program needs to list its launches; nothing runs and nothing is allocated."""

    def reserve(self, graphs: Any, nbytes: int) -> None:
        """There is room for everything."""

    def arena(self, nbytes: int) -> Allocate:
        """Buffers without memory."""
        import numpy as np

        return lambda shape, dtype: Buffer(0, tuple(shape), np.dtype(dtype), None)

    def load(self, graph: str) -> "NullBackend":
        """Loads nothing."""
        return self

    def bind(self, buffers: Mapping[str, Buffer]) -> Callable[[], None]:
        """A launch that does nothing."""
        return lambda: None

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Callable[[], None]:
        """A launch that does nothing."""
        return lambda: None

    def join(self) -> None:
        """There is nothing to wait for."""


def _load(bundle: Bundle, graph: str) -> Any:
    try:
        import onnx
    except ImportError as e:
        raise CnppError(cannot_import("counting a graph's operations", e)) from None
    return onnx.load(bundle.folder / bundle.graph(graph).file, load_external_data=False)


def _types(model: Any, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The type (onnx.TypeProto) of every tensor, as far as it can be inferred, with the free dimensions bound.

    Node by node, and not by `onnx.shape_inference.infer_shapes`, which follows neither scalars (`Squeeze`, then `Mul`,
    in `update`) nor GroupNormalization.
    """
    import numpy as np
    import onnx
    from onnx.reference import ReferenceEvaluator

    versions = {spec.domain: spec.version for spec in model.opset_import}
    types: dict[str, Any] = {}
    values: dict[str, Any] = {}  # of what may be a shape
    for tensor in model.graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if math.prod(tensor.dims) <= _SHAPE_VALUES and tensor.data_location != onnx.TensorProto.EXTERNAL:
            values[tensor.name] = onnx.numpy_helper.to_array(tensor)
    for tensor in model.graph.input:
        types[tensor.name] = tensor.type
        for d in tensor.type.tensor_type.shape.dim:
            if d.dim_param in sizes:
                d.dim_value = sizes[d.dim_param]
    for node in model.graph.node:
        given = [name for name in node.input if name]
        if any(name not in types for name in given):
            continue  # whoever needs the shape says that it is unknown
        if node.op_type == "GroupNormalization":  # ONNX infers nothing for it
            types[node.output[0]] = types[given[0]]
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
            known = {name: onnx.numpy_helper.from_array(values[name]) for name in given if name in values}
            own = {name: types[name] for name in given}
            types |= onnx.shape_inference.infer_node_outputs(schema, node, own, known, opset_imports=model.opset_import)
        except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError):
            continue
        if node.op_type == "Shape" and (shape := _shape(types[given[0]])) is not None:
            feeds = {given[0]: np.broadcast_to(np.int8(0), shape)}
        elif all(name in values for name in given):
            feeds = {name: values[name] for name in given}
        else:
            continue
        outputs: Any = ReferenceEvaluator(node).run(None, feeds)
        results = zip(node.output, outputs, strict=True)
        values |= {name: v for name, v in results if v.size <= _SHAPE_VALUES}
    return types


def _shape(type_: Any) -> Shape | None:
    """A tensor's shape where all of it is known."""
    if type_ is None or not type_.tensor_type.HasField("shape"):
        return None
    dims = type_.tensor_type.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _bytes(model: Any, shape: _Shapes, types: Mapping[str, Any]) -> int:
    import onnx

    def nbytes(tensor: str) -> int:
        values = math.prod(shape(tensor))
        return values * int(onnx.helper.tensor_dtype_to_np_dtype(types[tensor].tensor_type.elem_type).itemsize)

    total = sum(nbytes(tensor.name) for tensor in (*model.graph.input, *model.graph.output))
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    for tensor in model.graph.initializer:
        reading = readers.get(tensor.name, [])
        looked_up = all(node.op_type == "Gather" and node.input[0] == tensor.name for node in reading)
        read = sum(nbytes(node.output[0]) for node in reading)
        total += min(read, nbytes(tensor.name)) if looked_up else nbytes(tensor.name)
    return total


def _shape_of(types: Mapping[str, Any], graph: str) -> _Shapes:
    def shape(tensor: str) -> Shape:
        found = _shape(types.get(tensor))
        if found is None:
            raise CnppError(f"cannot count the operations of {graph}: the shape of {tensor!r} is unknown")
        return found

    return shape


def _flop(node: Any, shape: _Shapes, graph: str) -> int:
    if node.op_type in _REFUSED or node.domain:
        raise CnppError(f"cannot count the operations of {graph}: it has a node of kind {node.op_type}")
    return _COUNTED[node.op_type](node, shape) if node.op_type in _COUNTED else 0


def _convolution(node: Any, shape: _Shapes) -> int:
    """Weights [Cout, Cin / groups, …kernel]: so many multiply-adds for each value of the output."""
    return 2 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])


def _transposed_convolution(node: Any, shape: _Shapes) -> int:
    """Weights [Cin, Cout / groups, …kernel]: so many multiply-adds for each value of the input."""
    return 2 * math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])


def _gemm(node: Any, shape: _Shapes) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[0 if transposed else 1]


def _product(node: Any, shape: _Shapes) -> int:
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _attention(node: Any, shape: _Shapes) -> int:
    """Q Kᵀ, then its product with V: for each of the T keys every value of Q once, and every value of the output.

    Holds for both layouts of the operator, [B,heads,T,d] and [B,T,heads · d].
    """
    query, keys = shape(node.input[0]), shape(node.input[1])[-2]
    if any(node.input[4:6]):
        raise CnppError(f"cannot count the attention {node.name}: it has keys and values of the past")
    return 2 * keys * (math.prod(query) + math.prod(shape(node.output[0])))


_COUNTED: dict[str, Callable[[Any, _Shapes], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Gemm": _gemm,
    "MatMul": _product,
    "Attention": _attention,
}
