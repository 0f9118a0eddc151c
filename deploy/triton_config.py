"""`config.pbtxt`: what Triton is told of a model, in protobuf's text format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..bundles.manifest import GraphSpec, Manifest, TensorSpec
from .triton_tensors import CONDITION, CONTROL_IMAGE, INPUTS, Tensor, outputs

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}
_ON_CPU = ("onnxruntime-cpu", "openvino")


class Enum(str):
    """A word that stands without quotation marks."""


@dataclass(frozen=True)
class ModelSettings:
    """How Triton runs the model of a bundle.

    Attributes:
        max_batch: images that are drawn together, 1 to 16; with 1 there is no dynamic batching.
        batch_window: seconds that a request waits at most for others.
        queue: requests that wait at most.
        backend, threads, plans: as in `RuntimeOptions`.
    """

    max_batch: int = 4
    batch_window: float = 0.02
    queue: int = 64
    backend: str = "auto"
    threads: int | None = None
    plans: str | None = None


def model_config(name: str, manifest: Manifest, settings: ModelSettings) -> str:
    """The configuration of the model around `Pipeline.batch`."""
    on_cpu = settings.backend in _ON_CPU
    given = {
        "backend": settings.backend,
        "threads": "" if settings.threads is None else str(settings.threads),
        "plans": settings.plans or "",
    }
    config: dict[str, Any] = {
        "name": name,
        "backend": "python",
        "max_batch_size": settings.max_batch,
        "input": [_tensor(t) for t in INPUTS],
        "output": [_tensor(t) for t in outputs(manifest.width, manifest.height)],
        # KIND_GPU makes an instance on each GPU; KIND_AUTO the same where there is one, else one on the CPU.
        "instance_group": {"kind": Enum("KIND_CPU" if on_cpu else "KIND_AUTO"), "count": 1},
        "version_policy": {"latest": {"num_versions": 1}},
        "parameters": [{"key": k, "value": {"string_value": v}} for k, v in given.items()],
        "model_warmup": [_warmup(manifest, size) for size in sorted({1, settings.max_batch})],
    }
    if settings.max_batch > 1:
        config["dynamic_batching"] = {
            "max_queue_delay_microseconds": round(settings.batch_window * 1e6),
            "default_queue_policy": {"max_queue_size": settings.queue},
        }
    return text_format(config)


def graph_config(name: str, graph: GraphSpec, platform: Mapping[str, Any]) -> str:
    """The configuration of a single graph.

    Args:
        name: of the model.
        graph: its signature.
        platform: the fields that say what runs it, and the names of its files.
    """
    config = {
        "name": name,
        **platform,
        "max_batch_size": 0,  # its free dimensions differ from tensor to tensor
        "input": [_graph_tensor(t) for t in graph.inputs],
        "output": [_graph_tensor(t) for t in graph.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
    }
    return text_format(config)


def text_format(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format; a list is a repeated field, and so are numbers in a tuple."""
    lines = []
    for name, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{name} {{\n{text_format(one, f'{indent}  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(one)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[ {', '.join(map(_scalar, value))} ]"
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    # JSON escapes characters beyond ASCII as UTF-16, which protobuf reads as something else.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _tensor(tensor: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"name": tensor.name, "data_type": Enum(tensor.type), "dims": tensor.dims}
    if tensor in INPUTS:
        if tensor.optional:
            found["optional"] = True
        if -1 in tensor.dims:  # else requests with other numbers of controls would not wait for each other
            found["allow_ragged_batch"] = True
    return found


def _graph_tensor(tensor: TensorSpec) -> dict[str, Any]:
    dims = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    return {"name": tensor.name, "data_type": Enum(_TYPES[tensor.dtype]), "dims": dims}


def _warmup(manifest: Manifest, size: int) -> dict[str, Any]:
    """Requests with the first condition that come together, twice: a GPU records what it launches when it comes again.

    Args:
        manifest: of the bundle.
        size: how many.
    """
    image = (1, manifest.height, manifest.width, 3)
    inputs: dict[str, dict[str, Any]] = {
        "prompt": {"data_type": Enum("TYPE_STRING"), "dims": (1,), "zero_data": True},
        CONDITION: {"data_type": Enum("TYPE_STRING"), "dims": (1,), "input_data_file": CONDITION},
        CONTROL_IMAGE: {"data_type": Enum("TYPE_UINT8"), "dims": image, "zero_data": True},
    }
    names = inputs if manifest.conditions else ("prompt",)
    entries = [{"key": name, "value": inputs[name]} for name in names]
    return {"name": f"batch of {size}", "batch_size": size, "count": 2, "inputs": entries}
