"""A network's ONNX file with pairs of QuantizeLinear and DequantizeLinear around what is quantized."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .formats import NumberFormat
from .layers import Layer, Network


def open_network(file: Path) -> Network:
    """The network of an ONNX file; its weights stay on the disk."""
    import onnx

    return Network(onnx.load(file, load_external_data=False))


def write_quantized(
    source: Path, target: Path, layers: Iterable[Layer], ranges: Mapping[str, float], number: NumberFormat
) -> None:
    """Writes a network with these layers quantized, and its weights beside it in `<target>.data`.

    Each activation is rounded once, for all the layers that read it; what else reads it gets it as it was. Weights are
    stored rounded. Both have a DequantizeLinear behind them, so that the graph means the same on every runtime, and one
    that computes in the format fuses the pairs.

    Args:
        source: the network's ONNX file, its weights beside it.
        ranges: the largest magnitude of each activation that a layer reads.

    Raises:
        OSError: the target cannot be written.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    folder = str(source.parent)
    chosen = {layer.node: layer for layer in layers}
    nodes: list[Any] = []
    rounded: dict[str, str] = {}

    def add(name: str, values: NDArray[Any]) -> str:
        if name not in weights:
            weights[name] = onnx.numpy_helper.from_array(values, name)
            graph.initializer.append(weights[name])
        return name

    def zeros(name: str, shape: tuple[int, ...]) -> str:
        values = number.quantize(np.zeros(shape or (1,), np.float32), np.ones(1, np.float32), 0)
        return add(name, values.reshape(shape))

    def value_of(name: str) -> NDArray[Any]:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(weights[name])
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, folder)
        found: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return found

    for node in graph.node:
        layer = chosen.get(node.name)
        if layer is None:
            nodes.append(node)
            continue
        for name in (layer.activation, layer.weight):
            if name in rounded:
                continue
            scale, zero, result = f"{name}_scale", f"{name}_zero", f"{name}_dequantized"
            if name == layer.weight:
                values = value_of(name)
                others = tuple(axis for axis in range(values.ndim) if axis != layer.axis)
                per_channel = number.scale(np.abs(values).max(others), values.dtype)
                stored = add(f"{name}_{number.name}", number.quantize(values, per_channel, layer.axis))
                parts = [stored, add(scale, per_channel), zeros(zero, per_channel.shape)]
                nodes.append(onnx.helper.make_node("DequantizeLinear", parts, [result], result, axis=layer.axis))
            else:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(weights[layer.weight].data_type)
                parts = [add(scale, number.scale(ranges[name], dtype)), zeros(zero, ())]
                middle = f"{name}_quantized"
                nodes.append(onnx.helper.make_node("QuantizeLinear", [name, *parts], [middle], middle))
                nodes.append(onnx.helper.make_node("DequantizeLinear", [middle, *parts], [result], result))
            rounded[name] = result
        node.input[0], node.input[1] = rounded[layer.activation], rounded[layer.weight]
        nodes.append(node)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for tensor in kept:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, folder)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)
