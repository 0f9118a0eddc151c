"""How close the extractors' graphs are to the libraries that they come from, with random weights.

    python -m cnpp_trt.developer.extractor_parity [--full] [--cond seg …]

Prints a Markdown table. References are transformers' own processors, networks and postprocessing, and controlnet_aux'
detectors (pip install --no-deps controlnet-aux einops).
"""

import importlib
import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from ..errors import CnppError
from ..export.graphs import extractor_graph
from ..export.onnx_graph import OPSET, export_graph, run_onnx
from ..export.sources import Finder
from .random_models.extractors import REPOSITORIES, make_extractor, photo

Map = NDArray[np.uint8]
# photo uint8 [H,W,3] → map uint8 [H,W]
Reference = Callable[[Map], Map]

_DETECTORS = {"hed": "HEDdetector", "lineart": "LineartDetector"}


def reference(condition: str, path: Path) -> Reference:
    """The official demo's own steps from a photo, whose sides are multiples of 64, to its map.

    Args:
        path: as `random_models.extractors.make_extractor` returns it.

    Raises:
        CnppError: controlnet_aux is not installed.
    """
    if condition in _DETECTORS:
        return _detector(condition, path)
    return _labels(path) if condition == "seg" else _depth(path)


def _labels(folder: Path) -> Reference:
    from transformers import AutoImageProcessor, UperNetForSemanticSegmentation

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = UperNetForSemanticSegmentation.from_pretrained(folder).eval()

    def labels(image: Map) -> Map:
        outputs = network(processor(Image.fromarray(image), return_tensors="pt").pixel_values)
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])
        return np.asarray(found[0], np.uint8)

    return torch.inference_mode()(labels)


def _depth(folder: Path) -> Reference:
    from transformers import AutoImageProcessor, DPTForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = DPTForDepthEstimation.from_pretrained(folder).eval()

    def depth(image: Map) -> Map:
        outputs = network(processor(Image.fromarray(image), return_tensors="pt").pixel_values)
        found = processor.post_process_depth_estimation(outputs, target_sizes=[image.shape[:2]])
        # What interpolation brings below 0 would wrap around in the next line, which is how transformers 4.38's
        # pipeline ends.
        output = found[0]["predicted_depth"].numpy().clip(0)
        return np.asarray(output * 255 / np.max(output)).astype(np.uint8)

    return torch.inference_mode()(depth)


def _detector(condition: str, file: Path) -> Reference:
    spec = importlib.util.find_spec("controlnet_aux")
    if spec is None:
        raise CnppError("controlnet_aux is not installed: pip install --no-deps controlnet-aux einops")
    # The package's own code is never run: it imports every detector, with dependencies that are not here.
    sys.modules.setdefault("controlnet_aux", importlib.util.module_from_spec(spec))
    module = importlib.import_module(f"controlnet_aux.{condition}")
    detector = getattr(module, _DETECTORS[condition]).from_pretrained(file.parent)

    def draw(image: Map) -> Map:
        side = min(image.shape[:2])
        drawn = detector(image, detect_resolution=side, image_resolution=side, output_type="np")
        return np.asarray(drawn[:, :, 0], np.uint8)

    return draw


def measure(condition: str, path: Path, width: int, height: int) -> str:
    """One row of the table. Peak memory is this process's, up to the export's end."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    graph = extractor_graph(condition, Finder().find(path), width, height)
    weights = sum(p.numel() for p in graph.module.parameters())
    with tempfile.TemporaryDirectory() as folder:
        spec = export_graph(graph, Path(folder), "fp32", OPSET["fp32"])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        image = photo(height, width, seed=1)
        start = time.perf_counter()
        (found,) = run_onnx(Path(folder) / spec.file, {"image": image[None]})
        run = time.perf_counter() - start
    expected = reference(condition, path)(image)
    differ = found[0] != expected
    largest = "–" if condition == "seg" else np.abs(found[0].astype(int) - expected).max()
    library = "controlnet_aux" if condition in _DETECTORS else "transformers"
    cells = (
        condition,
        f"{weights / 1e6:.1f} M",
        f"{width}×{height}",
        library,
        largest,
        f"{differ.mean():.4%}",
        len(np.unique(expected)),
        f"{seconds:.0f} s",
        f"{peak:.1f} GiB",
        f"{run:.1f} s",
    )
    return _row(cells)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


_COLUMNS = (
    "extractor",
    "weights",
    "photo",
    "reference",
    "largest difference",
    "values that differ",
    "different values",
    "export",
    "peak memory",
    "load and run",
)


def _main(
    full: Annotated[bool, typer.Option("--full", help="The published sizes (minutes) instead of tiny ones.")] = False,
    cond: Annotated[list[str] | None, typer.Option(help="Conditions to measure. Default: all.")] = None,
) -> None:
    width, height = (512, 512) if full else (192, 128)
    print(_row(_COLUMNS), _row(["---"] * len(_COLUMNS)), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for condition in cond or REPOSITORIES:
            # Every network has processes of its own: one's memory is not another's.
            with _process() as process:
                path = process.submit(make_extractor, condition, Path(folder) / condition, tiny=not full).result()
            with _process() as process:
                print(process.submit(measure, condition, path, width, height).result(), flush=True)


def _process() -> Any:
    return ProcessPoolExecutor(1, get_context("spawn"))


if __name__ == "__main__":
    typer.run(_main)
