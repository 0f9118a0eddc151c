"""What quantizing a group of layers costs by itself: measured on the images that come out."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import ResolvedRequest
from .formats import NumberFormat
from .layers import Layer
from .rewriting import write_quantized

Pictures = list[NDArray[np.uint8]]


class _Replaced(Bundle):
    """A bundle some of whose graphs are other files."""

    def __init__(self, bundle: Bundle, files: Mapping[str, Path]) -> None:
        super().__init__(bundle.folder, bundle.manifest)
        self._files = files

    def graph_file(self, name: str) -> Path:
        return self._files[name] if name in self._files else super().graph_file(name)


def with_files(bundle: Bundle, files: Mapping[str, Path], threads: int | None) -> Pipeline:
    """The bundle with other files for some of its graphs, on ONNX Runtime's CPU provider."""
    replaced = _Replaced(bundle, files)
    return Pipeline(replaced, OnnxRuntimeCpu(replaced, threads))


def draw(pipeline: Pipeline, requests: Sequence[ResolvedRequest]) -> Pictures:
    """The first image of each request."""
    return [pipeline(request).images[0] for request in requests]


def squared_error(expected: Pictures, found: Pictures) -> float:
    """The mean squared difference of all values, in levels of 255."""
    pairs = zip(expected, found, strict=True)
    return float(np.mean([np.mean(np.square(a.astype(np.float64) - b)) for a, b in pairs]))


def measure_effects(
    bundle: Bundle,
    layers: Mapping[str, Mapping[str, Sequence[Layer]]],
    ranges: Mapping[str, Mapping[str, float]],
    number: NumberFormat,
    requests: Mapping[str, Sequence[ResolvedRequest]],
    expected: Mapping[str, Pictures],
    threads: int | None,
    told: Callable[[str], Any],
) -> dict[str, float]:
    """For each group of each graph the images' error where it alone is quantized.

    Args:
        layers: by graph and group.
        ranges: by graph and tensor.
        requests: by condition; a ControlNet's groups are measured on its own condition's.
        expected: their images without quantization.
        told: gets a line for each group.

    Returns:
        Squared errors by `graph.group`.
    """
    found = {}
    for graph, groups in layers.items():
        own = [c for c in requests if graph in ("unet", f"controlnet_{c}")]
        for group, members in groups.items():
            with tempfile.TemporaryDirectory(prefix="cnpp-trt-") as folder:
                file = Path(folder) / f"{graph}.onnx"
                write_quantized(bundle.graph_file(graph), file, members, ranges[graph], number)
                pipeline = with_files(bundle, {graph: file}, threads)
                errors = [squared_error(expected[c], draw(pipeline, requests[c])) for c in own]
                pipeline.close()
            found[f"{graph}.{group}"] = float(np.mean(errors))
            told(f"{graph}.{group}: {len(members)} layers, squared error {found[f'{graph}.{group}']:.3f}")
    return found


def choose_kept(effects: Mapping[str, float], allowed: float) -> list[str]:
    """The groups that are kept so that the others' errors add up to no more than `allowed`; the worst first.

    Errors of different layers are nearly independent, so that their squares add.
    """
    kept = []
    rest = sum(effects.values())
    for name, error in sorted(effects.items(), key=lambda pair: -pair[1]):
        if rest <= allowed:
            break
        kept.append(name)
        rest -= error
    return kept
