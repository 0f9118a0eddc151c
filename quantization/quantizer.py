"""bundle → quantized bundle."""

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import MANIFEST, Bundle, GraphSpec, bundle_folder, lock_bundle, write_bundle
from ..bundles.manifest import QuantizationRecord
from ..errors import CnppError, ExportError, UserError
from ..files import require_writable
from ..install import cannot_import
from ..runtime.settings.request import ResolvedRequest
from ..versions import __version__, installed
from .calibration import largest_magnitudes
from .calibration_data import CalibrationData
from .effects import choose_kept, draw, measure_effects, squared_error, with_files
from .formats import FORMATS, NumberFormat
from .layers import KEPT, Layer, Network, with_kept
from .recording import Recording, digest_of, record_inputs
from .rewriting import open_network, write_quantized

logger = logging.getLogger(__name__)

# Relative L2 of a quantized graph's outputs to those of the graph that it was made from, on recorded inputs. A wrong
# scale or axis makes it 0.5 or more; the miniature's UNet has 0.03.
TOLERANCE = 0.25
_GRAPHS = ("unet", "controlnet_")


@dataclass(frozen=True)
class QuantizationSettings:
    """How a bundle is quantized.

    Attributes:
        number_format: `int8` or `fp8`.
        data: a folder of prompts and control images, as `cnpp-trt consistency --data` takes it; None for the model's
            own scenes, or random blocks.
        requests: of each condition, that ranges are taken from.
        launches: of a graph that are kept of each of them.
        measured: requests of each condition that each group's effect is measured on; 0 measures none and keeps the
            default groups alone.
        min_psnr: in dB, of the images to those of the bundle: groups are kept, the worst first, until it is expected.
        threads: of ONNX Runtime; None for every physical core.
        steps: of every request; None for the model's own number.
    """

    number_format: str = "int8"
    data: Path | None = None
    requests: int = 4
    launches: int = 5
    measured: int = 1
    min_psnr: float = 40.0
    threads: int | None = None
    steps: int | None = None


def quantize_bundle(bundle: Bundle, out: Path | None, settings: QuantizationSettings) -> Bundle:
    """Writes a bundle whose UNet and ControlNets compute in int8 or fp8; everything else is the bundle's own.

    Args:
        bundle: fp32 for the backends on a CPU, fp16 for TensorRT.
        out: None for the default place, beside the bundle's.
        settings: how.

    Raises:
        UserError: the bundle or a setting cannot be used, or the disk is full.
        ExportError: a quantized graph differs from the one that it was made from.
        CnppError: the package onnx is missing.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as e:
        raise CnppError(cannot_import("quantize", e, "onnx", "onnxruntime")) from None
    m = bundle.manifest
    if m.quantization is not None:
        raise UserError(f"{bundle.folder} is {m.number_format} already: give the bundle that it was made from")
    if settings.number_format not in FORMATS:
        raise UserError(f"unknown number format {settings.number_format!r}: choose from {', '.join(FORMATS)}")
    name = settings.number_format + ("-fp16" if m.precision == "fp16" else "")
    out = out or bundle_folder(m.model, name, m.width, m.height)
    require_writable(out.absolute().parent)
    with lock_bundle(out):
        if (out / MANIFEST).exists() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise UserError(f"{out} exists: choose another --out, or delete it first")
        return _Quantization(bundle, settings).write(out)


class _Quantization:
    """The steps from a bundle to its quantized one."""

    def __init__(self, bundle: Bundle, settings: QuantizationSettings) -> None:
        self._bundle = bundle
        self._settings = settings
        self._number: NumberFormat = FORMATS[settings.number_format]
        self._conditions = list(bundle.manifest.conditions)
        self._graphs = [name for name in bundle.manifest.graphs if name.startswith(_GRAPHS)]

    def write(self, out: Path) -> Bundle:
        start = time.perf_counter()
        networks = {graph: open_network(self._bundle.graph_file(graph)) for graph in self._graphs}
        recording, requests, expected, title = self._record()
        ranges = self._ranges(networks, recording)
        kept, effects = self._kept(networks, ranges, requests, expected)
        manifest = replace(self._bundle.manifest, files={}, graphs=dict(self._bundle.manifest.graphs))
        manifest.quantization = QuantizationRecord(
            format=self._number.name,
            method="largest magnitude of each activation and output channel, symmetric",
            data=title,
            data_sha256=digest_of(recording),
            kept=kept,
            effects=effects,
        )
        manifest.exported_with = {
            **manifest.exported_with,
            **{f"quantized: {name}": version for name, version in self._versions().items()},
        }
        files: dict[str, Path] = {}
        with write_bundle(out, manifest) as staging:
            for graph, network in networks.items():
                files[graph] = staging / manifest.graphs[graph].file
                layers = with_kept(network.groups(), kept[graph])
                write_quantized(self._bundle.graph_file(graph), files[graph], layers, ranges[graph], self._number)
                manifest.graphs[graph] = self._compared(graph, files[graph], recording[graph][:2])
                logger.info(f"{graph}: {len(layers)} of {len(network.layers)} layers, {_size(files[graph]):.0f} MiB")
            self._report(requests, expected, files)
            self._copy_others(staging)
        logger.info(f"bundle {out}: {self._number.name} in {time.perf_counter() - start:.1f} s")
        return Bundle.open(out)

    def _record(
        self,
    ) -> tuple[Recording, dict[str, list[ResolvedRequest]], dict[str, list[NDArray[np.uint8]]], str]:
        """Inputs of the networks; requests that effects are measured on, with their images; what they are."""
        s, pipeline = self._settings, with_files(self._bundle, {}, self._settings.threads)
        data = CalibrationData(pipeline, s.data, self._conditions, s.steps)
        if not data.meaningful:
            logger.warning(
                f"{self._bundle.manifest.model} is calibrated on random blocks: give prompts and control images of "
                "your own with --data FOLDER"
            )
        recording: Recording = {graph: [] for graph in self._graphs}
        requests, expected = {}, {}
        for condition in self._conditions:
            logger.info(f"{condition}: recording {s.requests} requests")
            for graph, inputs in record_inputs(
                pipeline, data.requests(condition, s.requests), self._graphs, s.launches
            ).items():
                recording[graph] += inputs
            requests[condition] = list(data.requests(condition, s.measured, skip=s.requests))
            expected[condition] = draw(pipeline, requests[condition])
        title = f"{s.requests} requests of each of {', '.join(self._conditions)}: {data.title}"
        pipeline.close()
        return recording, requests, expected, title

    def _ranges(self, networks: Mapping[str, Network], recording: Recording) -> dict[str, dict[str, float]]:
        found = {}
        for graph, network in networks.items():
            tensors = list(dict.fromkeys(layer.activation for layer in network.layers))
            logger.info(f"{graph}: ranges of {len(tensors)} activations on {len(recording[graph])} inputs")
            found[graph] = largest_magnitudes(self._bundle.graph_file(graph), tensors, recording[graph])
            if not all(map(math.isfinite, found[graph].values())):
                raise ExportError(f"{graph} has activations that are not finite: the bundle cannot be calibrated")
        return found

    def _kept(
        self,
        networks: Mapping[str, Network],
        ranges: Mapping[str, Mapping[str, float]],
        requests: Mapping[str, Sequence[ResolvedRequest]],
        expected: Mapping[str, list[NDArray[np.uint8]]],
    ) -> tuple[dict[str, list[str]], dict[str, float]]:
        """The groups of each graph that are not quantized, and the measured effects."""
        kept = {graph: [g for g in network.groups() if g in KEPT] for graph, network in networks.items()}
        if not self._settings.measured:
            return kept, {}
        open_groups: dict[str, dict[str, list[Layer]]] = {
            graph: {group: own for group, own in network.groups().items() if group not in KEPT}
            for graph, network in networks.items()
        }
        effects = measure_effects(
            self._bundle, open_groups, ranges, self._number, requests, expected, self._settings.threads, logger.info
        )
        allowed = 255**2 / 10 ** (self._settings.min_psnr / 10)
        # A request launches the UNet and one ControlNet: each ControlNet is judged beside the UNet alone.
        unet = {name: error for name, error in effects.items() if name.startswith("unet.")}
        for graph in self._graphs:
            own = {name: error for name, error in effects.items() if name.startswith(f"{graph}.")}
            share = allowed if graph == "unet" else max(allowed - sum(unet.values()), allowed / 4)
            for name in choose_kept(own, share):
                kept[graph].append(name.partition(".")[2])
                logger.info(f"{name} stays {self._bundle.manifest.precision}: squared error {effects[name]:.3f}")
        return kept, effects

    def _compared(self, graph: str, file: Path, inputs: Sequence[Mapping[str, NDArray[Any]]]) -> GraphSpec:
        """The graph's record, after it was compared with the one that it was made from.

        Raises:
            ExportError: they differ.
        """
        import onnxruntime as ort

        spec = self._bundle.graph(graph)
        names = [tensor.name for tensor in spec.outputs]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        outputs = []
        for path in (self._bundle.graph_file(graph), file):
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            outputs.append([session.run(names, dict(feeds)) for feeds in inputs])
            del session
        pairs = [
            (np.asarray(a, np.float64), np.asarray(b, np.float64))
            for runs in zip(*outputs, strict=True)
            for a, b in zip(*runs, strict=True)
        ]
        length = math.sqrt(sum(float(np.square(a).sum()) for a, _ in pairs)) or 1.0
        difference = math.sqrt(sum(float(np.square(a - b).sum()) for a, b in pairs)) / length
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{graph} in {self._number.name} differs from the bundle's by {difference:.2e}, allowed {TOLERANCE:g}: "
                "take more or other calibration data with --requests or --data"
            )
        largest = max(float(np.abs(a - b).max()) for a, b in pairs)
        return replace(
            spec,
            max_abs_difference=largest,
            difference=difference,
            measure=f"relative L2 to {self._bundle.manifest.precision}",
            tolerance=TOLERANCE,
        )

    def _report(
        self,
        requests: Mapping[str, Sequence[ResolvedRequest]],
        expected: Mapping[str, list[NDArray[np.uint8]]],
        files: Mapping[str, Path],
    ) -> None:
        """Logs how far the images of the whole are from the bundle's."""
        if not self._settings.measured:
            return
        pipeline = with_files(self._bundle, files, self._settings.threads)
        for condition, own in requests.items():
            error = squared_error(expected[condition], draw(pipeline, own))
            shown = f"PSNR {10 * math.log10(255**2 / error):.1f} dB" if error else "the same image"
            logger.info(f"{condition}: {shown} to {self._bundle.manifest.precision}, {len(own)} images")
        pipeline.close()

    def _copy_others(self, staging: Path) -> None:
        """Every file of the bundle that is no quantized graph's."""
        quantized = {name for graph in self._graphs for name in self._bundle.graph_files(graph)}
        for name in self._bundle.manifest.files:
            if name not in quantized:
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._bundle.file(name), target)

    def _versions(self) -> dict[str, str]:
        return {"cnpp-trt": __version__, **installed(("onnx", "onnxruntime"))}


def _size(file: Path) -> float:
    return file.with_name(f"{file.name}.data").stat().st_size / 2**20
