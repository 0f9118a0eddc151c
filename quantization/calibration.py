"""The ranges of a network's activations on inputs that the runtime itself gave it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends.onnxruntime_attention import fuse_attention

Inputs = Mapping[str, NDArray[Any]]


def largest_magnitudes(file: Path, tensors: Sequence[str], inputs: Iterable[Inputs]) -> dict[str, float]:
    """The largest magnitude of each tensor of an ONNX file over all inputs.

    All time steps count alike, and nothing is clipped: an activation that is large at one step only is large there.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    names = {tensor: f"cnpp_trt_largest_{i}" for i, tensor in enumerate(tensors)}
    for tensor, name in names.items():
        graph.node.append(onnx.helper.make_node("Abs", [tensor], [f"{name}_of"]))
        graph.node.append(onnx.helper.make_node("ReduceMax", [f"{name}_of"], [name], keepdims=0))
        graph.output.append(onnx.ValueInfoProto(name=name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    content = fuse_attention(model.SerializeToString())
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = np.zeros(len(names))
    for feeds in inputs:
        values: Any = session.run(list(names.values()), dict(feeds))  # of each one number
        found = np.maximum(found, [float(value) for value in values])
    return dict(zip(names, found.tolist(), strict=True))
