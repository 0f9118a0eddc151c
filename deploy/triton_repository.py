"""`cnpp-trt package`: a bundle as a model repository of Triton.

DIR/NAME/config.pbtxt          the model around `Pipeline.batch`: tensors, batching, instances, warm-up
DIR/NAME/warmup/condition      the condition of the warm-up's requests
DIR/NAME/1/model.py            imports this package, which must be installed where Triton's Python models run
DIR/NAME/1/bundle/             the bundle, copied
DIR/NAME_unet/1/…              with graphs: each graph of the bundle as a model of its own
"""

import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundles.bundle import Bundle
from ..engines.plan import Plan
from ..engines.store import PlanStore
from ..errors import UserError
from ..files import exclusive, new_partial_folder, partial_folders, remove_folder
from ..messages import printable
from ..places import MANIFEST
from .triton_config import ModelSettings, graph_config, model_config
from .triton_model import BUNDLE
from .triton_tensors import CONDITION

CONFIG = "config.pbtxt"
GRAPHS = ("onnx", "tensorrt")
_MODEL = '"""Made by `cnpp-trt package`."""\n\nfrom cnpp_trt.deploy.triton_model import TritonPythonModel\n'
_TENSORRT = "tensorrt"  # Triton's backend of this name loads no plans of TensorRT-RTX


@dataclass(frozen=True)
class Packaged:
    """What was written.

    Attributes:
        folder: of the model around `Pipeline.batch`.
        graphs: the folders of single graphs.
        size: bytes of all files.
    """

    folder: Path
    graphs: tuple[Path, ...]
    size: int


def package(
    bundle: Bundle,
    repository: Path,
    name: str,
    settings: ModelSettings,
    *,
    version: int = 1,
    graphs: str | None = None,
) -> Packaged:
    """Writes a version of a bundle's model into a model repository.

    Args:
        bundle: whose files are verified.
        repository: a folder, which is made where it is missing.
        name: of the model; single graphs are called NAME_GRAPH.
        settings: of the model.
        version: of the model.
        graphs: `onnx` or `tensorrt` for single graphs too, or None.

    Raises:
        UserError: the version is there, the model there has another configuration, plans are missing, or the folder
            cannot be written.
        BundleError: the bundle is damaged.
    """
    models = {name: _whole_model(bundle, name, settings)}
    for graph in bundle.manifest.graphs if graphs else ():
        make = _onnx_model if graphs == "onnx" else _tensorrt_model
        models[f"{name}_{graph}"] = make(bundle, f"{name}_{graph}", graph, settings)
    with exclusive(repository / ".cnpp-trt.lock", repository, option="--triton"):
        for model, files in models.items():
            _require_room(repository / model, files, version)
        bundle.verify()
        size = sum(_write(repository / model, files, version) for model, files in models.items())
    folders = [repository / model for model in models]
    return Packaged(folders[0], tuple(folders[1:]), size)


Files = Mapping[str, bytes | str | Path]
"""By their path in the model's folder, where `*` stands for the version: the content, or the file to copy."""


def _whole_model(bundle: Bundle, name: str, settings: ModelSettings) -> dict[str, Any]:
    files: dict[str, Any] = {CONFIG: model_config(name, bundle.manifest, settings), "*/model.py": _MODEL}
    for condition in list(bundle.manifest.conditions)[:1]:
        word = condition.encode()
        files[f"warmup/{CONDITION}"] = struct.pack("<I", len(word)) + word  # as Triton serializes texts
    return files | {f"*/{BUNDLE}/{file}": bundle.folder / file for file in (MANIFEST, *bundle.manifest.files)}


def _onnx_model(bundle: Bundle, name: str, graph: str, settings: ModelSettings) -> dict[str, Any]:
    spec = bundle.graph(graph)
    # The file keeps its name, by which it finds its weights.
    platform = {"platform": "onnxruntime_onnx", "default_model_filename": spec.file}
    files: dict[str, Any] = {CONFIG: graph_config(name, spec, platform)}
    return files | {f"*/{file}": bundle.folder / file for file in bundle.graph_files(graph)}


def _tensorrt_model(bundle: Bundle, name: str, graph: str, settings: ModelSettings) -> dict[str, Any]:
    plans = _plans(bundle, graph, PlanStore(Path(settings.plans) if settings.plans else None))
    files = {capability: f"sm{capability.replace('.', '')}.plan" for capability in plans}
    platform: dict[str, Any] = {"platform": "tensorrt_plan", "default_model_filename": next(iter(files.values()))}
    platform["cc_model_filenames"] = [{"key": capability, "value": file} for capability, file in files.items()]
    content: dict[str, Any] = {CONFIG: graph_config(name, bundle.graph(graph), platform)}
    return content | {f"*/{files[capability]}": plan.engine for capability, plan in plans.items()}


def _plans(bundle: Bundle, graph: str, store: PlanStore) -> dict[str, Plan]:
    """A plan of the graph for each compute capability that the store has one for, as `9.0`."""
    found: dict[str, Plan] = {}
    for plan in store.of(bundle, graph, _TENSORRT):
        digits = plan.key.target.partition("-")[0].removeprefix("sm")
        if digits.isdecimal():
            found.setdefault(f"{digits[:-1]}.{digits[-1]}", plan)
    if not found:
        raise UserError(
            f"{store.root} has no TensorRT plan of {graph} that Triton could load: make the plans with "
            "`cnpp-trt build --cond all --flavor tensorrt`, or choose --graphs onnx"
        )
    if error := next((e for plan in found.values() if (e := plan.integrity_error())), None):
        raise UserError(f"{error}: run `cnpp-trt build` again")
    return found


def _require_room(folder: Path, files: Files, version: int) -> None:
    """Raises UserError where something that is there would be overwritten or contradicted."""
    if os.path.lexists(folder / str(version)):
        others = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
        raise UserError(f"{printable(folder)} has a version {version}: add --version {max(others) + 1}")
    for name, content in files.items():
        path = folder / name
        if "*" in name or not os.path.lexists(path):
            continue
        wanted = content.encode() if isinstance(content, str) else content
        if not path.is_file() or path.read_bytes() != wanted:
            raise UserError(
                f"{printable(path)} says something else than this version needs: choose another --name, or the options "
                "of the version that is there"
            )


def _write(folder: Path, files: Files, version: int) -> int:
    """Writes a model's files, its version's folder at last and at once. Returns their bytes."""
    target = folder / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    for left in partial_folders(target):
        remove_folder(left)
    partial = new_partial_folder(target)
    try:
        size = 0
        for name, content in files.items():
            path = partial / name[2:] if name.startswith("*/") else folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)  # no hard link: onnx refuses weights that have several
            elif not path.exists():
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            size += path.stat().st_size
        partial.rename(target)
    finally:
        remove_folder(partial)
    return size
