"""The exported modules themselves as a backend: the runtime's loop on PyTorch in fp32, with the graphs' signatures.

What it is for: a reference that can be looked into. It runs the same launches over the same buffers as any backend, so
every graph's inputs and outputs can be taken from it, and given to another.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...bundles.bundle import Bundle, GraphSpec, TensorSpec
from ...bundles.graph_names import condition_of
from ...export.checkpoint import Checkpoint
from ...export.graphs import GraphDims, base_graphs, condition_graphs
from ...export.onnx_graph import ExportSpec
from ...runtime.backends.host_memory import HostMemory, view
from ...runtime.backends.interface import Buffer
from ...runtime.pipeline import Pipeline


def reference_bundle(bundle: Bundle) -> Bundle:
    """The bundle as it would be in fp32: its signatures, and no twins in fp32. Its ONNX files are not used."""

    def wide(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, dtype="float32") if t.dtype == "float16" else t for t in tensors)

    def exact(spec: GraphSpec) -> GraphSpec:
        return replace(spec, inputs=wide(spec.inputs), outputs=wide(spec.outputs))

    graphs = {name: exact(spec) for name, spec in bundle.manifest.graphs.items() if not name.endswith("_fp32")}
    return Bundle(bundle.folder, replace(bundle.manifest, precision="fp32", graphs=graphs))


class TorchModules(HostMemory):
    """Every graph is the module that it was exported from.

    Modules are loaded when a program first needs them. Those of a condition go with the last program that holds them,
    so that going through the conditions takes the memory of one.

    Args:
        bundle: for its sizes; any precision.
        checkpoint: that it was exported from.
        device: of PyTorch, for weights and computation; buffers stay in the host's memory.
    """

    name = "pytorch"

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.bundle = reference_bundle(bundle)
        self._device = torch.device(device)
        self._checkpoint = checkpoint
        self._geometry = GraphDims.of(checkpoint, self.bundle.manifest)
        self._sources: dict[str, Callable[[], ExportSpec]] = dict(base_graphs(checkpoint, self._geometry))
        self._shared: dict[str, _Module] = {}
        self._loaded: WeakValueDictionary[str, _Module] = WeakValueDictionary()

    def pipeline(self) -> Pipeline:
        """The runtime on this backend. Its programs keep their conditions' modules loaded."""
        return Pipeline(self.bundle, self, "the reference")

    def load(self, graph: str) -> "_Module":
        """Loads the module of a graph; a second call returns the same one while a program holds it."""
        module = self._loaded.get(graph)
        if module is None:
            if graph in self._sources:
                module = self._shared[graph] = _Module(self._sources[graph](), self._device)
            else:
                own = dict(condition_graphs(self._checkpoint, condition_of(graph), self._geometry))
                module = _Module(own[graph](), self._device)
            self._loaded[graph] = module
        return module


class _Module:
    """Keeps of a graph's source its module and what its arguments are called, not the example tensors."""

    def __init__(self, source: ExportSpec, device: torch.device) -> None:
        self.module = source.module.to(device)
        self.device = device
        self.arguments = {name: source.nested.get(name) for name in source.inputs}
        self.outputs = tuple(source.outputs)

    def bind(self, buffers: Mapping[str, Buffer]) -> "_Launch":
        return _Launch(self, buffers)


class _Launch:
    def __init__(self, graph: _Module, buffers: Mapping[str, Buffer]) -> None:
        self._graph = graph
        self._buffers = dict(buffers)

    def __call__(self) -> None:
        graph = self._graph
        given: dict[str, Any] = {
            name: self._tensor(name) if members is None else tuple(map(self._tensor, members))
            for name, members in graph.arguments.items()
        }
        with torch.inference_mode():
            found = graph.module(**given)
        outputs = (found,) if isinstance(found, Tensor) else found
        for name, tensor in zip(graph.outputs, outputs, strict=True):
            view(self._buffers[name])[...] = tensor.cpu().numpy()

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(view(self._buffers[name])).to(self._graph.device)
