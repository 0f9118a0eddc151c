"""A PyTorch module → one ONNX file that was compared with it."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..bundles.bundle import GraphSpec, TensorSpec
from ..errors import ExportError
from .allocator import release_memory

# By the bundle's precision. Opset 23 has Attention as one operator, one kernel on ONNX Runtime's CPU provider,
# with less memory. TensorRT fuses attention from opset 20's plain operators just as well, and TensorRT-RTX fails on an
# Attention node that no kernel of its own fits.
OPSET = {"fp32": 23, "fp16": 20}

# Largest allowed relative L2 difference between a graph in ONNX Runtime and its module in PyTorch, both on CPU. fp32
# is some 20 times what SD 1.5 was seen to need; fp16 is compared with the module in fp32 (its weights rounded to fp16).
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2}
# An fp32 graph that ends in uint8 (pixels, labels): the largest allowed share of values that differ at all. A value
# that lies on the edge between two levels may fall either way.
TOLERANCE_UINT8 = 5e-3

_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.uint8: "uint8",
}


@dataclass
class ExportSpec:
    """What a graph is made from.

    Attributes:
        name: of the graph and its file.
        module: in evaluation mode.
        inputs: example tensors by name, all distinct objects: one tensor given for two inputs makes a silently wrong
            graph. A tuple of tensors is a nested argument whose members are named in `nested`.
        outputs: names of the outputs.
        nested: for each nested argument, the names of its members.
        free: for an input (or member) the dimensions that stay free: {index: name}.

    The graph is made from these inputs and compared on `compared`: a size that the exporter took for granted shows.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor | tuple[Tensor, ...]]
    outputs: Sequence[str]
    nested: Mapping[str, Sequence[str]]
    free: Mapping[str, Mapping[int, str]]

    def flat(self) -> dict[str, Tensor]:
        """The tensors by the name they have in the graph."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.inputs.items():
            if isinstance(value, tuple):
                tensors.update(zip(self.nested[name], value, strict=True))
            else:
                tensors[name] = value
        if len({id(t) for t in tensors.values()}) != len(tensors):
            raise AssertionError(f"{self.name}: two inputs share one tensor")
        return tensors

    def compared(self) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """The inputs with half of each `batch` and of its `tokens`: half the memory, which is SD 1.5's UNet's peak.

        Where rows of the batch say which image they are of, the images are halved too.
        """
        halved = ("batch", "tokens", "images") if "rows" in self.inputs else ("batch", "tokens")

        def half(name: str, tensor: Tensor) -> Tensor:
            for axis, free in self.free.get(name, {}).items():
                if free in halved:
                    tensor = tensor.narrow(axis, 0, tensor.shape[axis] // 2)
            return tensor

        return {
            name: tuple(map(half, self.nested[name], value)) if isinstance(value, tuple) else half(name, value)
            for name, value in self.inputs.items()
        }


def export_graph(source: ExportSpec, folder: Path, precision: str, opset: int) -> GraphSpec:
    """Writes `<name>.onnx` and `<name>.onnx.data` into `folder` and compares them with the module.

    Args:
        precision: of the module's weights and activations, a key of `TOLERANCE`.

    The module is released before ONNX Runtime loads the graph (`source.module` is replaced), so that the weights are
    in memory once. The peak is about the weights and 1.5 GiB for SD 1.5's UNet at 512×512.

    Raises:
        ExportError: the exporter fails, or the graph differs from its module beyond the tolerance.
    """
    tensors, compared = source.flat(), source.compared()
    expected = _reference(source.module, compared)
    file = f"{source.name}.onnx"
    try:
        _write(source, folder / file, opset)
    except OSError:
        raise  # a full disk is no fault of the graph's
    except Exception as e:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(e))  # torch colors its messages
        raise ExportError(f"PyTorch cannot export {source.name}: {' '.join(reason.split())[:400]}") from e
    source.module = nn.Identity()
    release_memory()

    feeds = replace(source, inputs=compared).flat()
    results = run_onnx(folder / file, {name: t.numpy() for name, t in feeds.items()})
    # The first output is the graph's result; a `magnitude` beside it is held to the same tolerance.
    rounded = precision == "fp32" and expected[0].dtype == torch.uint8
    tolerance = TOLERANCE_UINT8 if rounded else TOLERANCE[precision]
    max_abs, worst = 0.0, 0.0
    for name, want, got in zip(source.outputs, expected, results, strict=True):
        difference = compare(want.numpy(), got)
        measured = difference.share if rounded and want.dtype == torch.uint8 else difference.relative_l2
        max_abs, worst = max(max_abs, difference.max_abs), max(worst, measured)
        if not measured <= tolerance:
            raise ExportError(
                f"{source.name} differs from PyTorch in {name}: {measured:.2e}, allowed {tolerance:.0e}; "
                "the graph is wrong: please report it with what `cnpp-trt doctor` prints"
            )
    return GraphSpec(
        file=file,
        inputs=tuple(_spec(name, t, source.free.get(name, {})) for name, t in tensors.items()),
        outputs=tuple(
            _spec(name, torch.from_numpy(got), source.free.get(name, {}))
            for name, got in zip(source.outputs, results, strict=True)
        ),
        max_abs_difference=max_abs,
        difference=worst,
        measure="share of values that differ" if rounded else "relative L2",
        tolerance=tolerance,
    )


class _InFloat32(TorchDispatchMode):
    """Computes in fp32 what is in fp16, every weight widened for as long as one operator reads it.

    PyTorch's fp16 convolutions on CPU take 10 minutes for one step of SD 1.5, and the whole module in fp32 would be
    twice its size.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype == torch.float16:
                return value.float()
            return torch.float32 if value is torch.float16 else value

        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


def _reference(module: nn.Module, inputs: Mapping[str, Tensor | tuple[Tensor, ...]]) -> list[Tensor]:
    """The module's outputs in fp32."""
    with torch.inference_mode(), _InFloat32():
        # Copies that are made in this mode: of a tensor from outside PyTorch makes no view whose type is another.
        copies = tree_map(torch.clone, dict(inputs))
        outputs = module(**copies)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@dataclass(frozen=True)
class Difference:
    """max |found - expected|, their relative L2 difference, and the share of values that differ at all."""

    max_abs: float
    relative_l2: float
    share: float


def compare(expected: NDArray[Any], found: NDArray[Any]) -> Difference:
    """All infinite where shapes differ or `found` is not finite."""
    infinite = float("inf")
    if expected.shape != found.shape:
        return Difference(infinite, infinite, infinite)
    want, got = expected.astype(np.float64), found.astype(np.float64)
    error = float(np.linalg.norm(got - want))
    if not np.isfinite(error):
        return Difference(infinite, infinite, infinite)
    max_abs = float(np.max(np.abs(got - want), initial=0.0))
    return Difference(max_abs, error / (float(np.linalg.norm(want)) or 1.0), float(np.mean(got != want)))


def run_onnx(file: Path, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Runs a graph once on ONNX Runtime's CPU provider, without a copy of its weights: they stay mapped."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Optimizing folds the casts of an fp16 graph, whose weights would be there in fp16 and fp32.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Its pool grows by doubling: SD 1.5's UNet at 512x512 takes 0.4 GiB less without, and half as long again.
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    # Every output of the graphs is a tensor; the stubs allow maps and sparse tensors too.
    return cast("list[NDArray[Any]]", session.run(None, dict(feeds)))


def _write(source: ExportSpec, path: Path, opset: int) -> None:
    def dims(name: str) -> dict[int, Any]:
        return {axis: torch.export.Dim.DYNAMIC for axis in source.free.get(name, {})}

    dynamic = {
        name: tuple(dims(member) for member in source.nested[name]) if isinstance(value, tuple) else dims(name)
        for name, value in source.inputs.items()
    }
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            source.module,
            (),
            kwargs=dict(source.inputs),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic,
            input_names=list(source.flat()),
            output_names=list(source.outputs),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("the exporter returned nothing")
    weights = list(program.model.graph.initializers.values())
    program.optimize()
    _name_free_dimensions(program.model, source)
    _clear_metadata(program.model)
    program.save(str(path), external_data=True)
    # The exporter's caches keep these alive, before and after optimizing; the module's weights shall not be with them.
    for value in (*weights, *program.model.graph.initializers.values()):
        value.const_value = None


def _name_free_dimensions(model: Any, source: ExportSpec) -> None:
    """Gives the free dimensions of inputs and outputs the names of `source.free`, not the exporter's `s77`."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    values = [*model.graph.inputs, *model.graph.outputs]
    for value in values:
        for axis, name in source.free.get(value.name, {}).items():
            if value.shape is not None and not isinstance(value.shape[axis], int):
                names[str(value.shape[axis].value)] = name
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d.value), d.value) for d in value.shape])


def _clear_metadata(model: Any) -> None:
    """Removes the exporter's record of where each node came from: paths of this machine, and most of the bytes."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    for value in (
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(o for n in model.graph for o in n.outputs),
    ):
        value.metadata_props.clear()


def _spec(name: str, tensor: Tensor, free: Mapping[int, str]) -> TensorSpec:
    shape = tuple(free.get(axis, size) for axis, size in enumerate(tensor.shape))
    return TensorSpec(name, _DTYPES[tensor.dtype], shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and log, which tell its inner workings at length; errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
