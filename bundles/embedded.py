"""Bundles of the embedded model without PyTorch: graphs that the exporter wrote, with weights from the checkpoint.

`miniature/graphs.zip` holds, for each variant of the model, what its export gave beside weights: the manifest, the ONNX
files, the tokenizer, and of each file of weights which tensors of the checkpoint lie where. It is made by
`developer/miniature/graphs.py`. Bundles from it are those of an export, byte for byte; weights with a fused LoRA are
computed here, by NumPy, and may differ from PyTorch's in their last bit.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from safetensors.numpy import load_file

from ..files import remove_folder
from ..miniature import EMBEDDED, GRAPHS, MODEL_FOLDER
from ..places import MANIFEST
from ..schema import SchemaError, read_bounded
from .graph_names import OF_THE_UNET
from .manifest import MAX_BYTES, FormatMismatch, Manifest
from .staging import lock_bundle, write_bundle

logger = logging.getLogger(__name__)


def assemble(model: str, folder: Path) -> None:
    """Writes the fp32 bundle of an embedded model, with all of its conditions, unless it is there.

    One of another version of this package is replaced.

    Args:
        model: a key of `EMBEDDED`.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    with ZipFile(GRAPHS) as archive, lock_bundle(folder):
        if is_outdated(folder):
            remove_folder(folder)
        if (folder / MANIFEST).exists():  # another process was first
            return
        manifest = Manifest.loads(archive.read(f"{model}/{MANIFEST}"))
        manifest.files.clear()  # their digests are taken anew, from what is written
        members = set(archive.namelist())
        layouts = json.loads(archive.read(f"{model}/weights.json"))
        with write_bundle(folder, manifest) as staging:
            for name, layout in layouts.items():
                own = f"{model}/{name}.onnx"
                graph = archive.read(own if own in members else f"graphs/{name}.onnx")
                (staging / f"{name}.onnx").write_bytes(graph)
                lora = EMBEDDED[model].lora if name in OF_THE_UNET else None
                (staging / f"{name}.onnx.data").write_bytes(_weights(layout, lora, archive))
            archive.extractall(staging, [name for name in members if name.startswith("tokenizer/")])
            (staging / "examples").mkdir()
            for record in manifest.conditions.values():
                if image := record.get("image"):
                    shutil.copyfile(MODEL_FOLDER / image, staging / image)
    logger.info(f"{folder}: the embedded model's bundle, {', '.join(manifest.conditions)}")


def is_outdated(folder: Path) -> bool:
    """Whether a bundle is there whose manifest another version of this package wrote; not where it is damaged."""
    try:
        Manifest.loads(read_bounded(folder / MANIFEST, MAX_BYTES))
    except FormatMismatch:
        return True
    except (OSError, SchemaError):
        pass
    return False


def _weights(layout: Mapping[str, Any], lora: Path | None, archive: ZipFile) -> bytes:
    """The content of a graph's file of weights.

    Args:
        layout: `file` of the checkpoint, and what lies one behind the other: `[key, transposed]` of a tensor in it, or
            the name of a member of the archive.
        lora: is added to the tensors.
    """
    tensors = load_file(MODEL_FOLDER / layout["file"]) if layout["file"] else {}
    changes = load_file(lora) if lora else {}
    content = []
    for part in layout["parts"]:
        if isinstance(part, str):
            content.append(archive.read(part))
            continue
        key, transposed = part
        value = tensors[key].astype(np.float32)
        layer = f"unet.{key.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in changes:
            down, up = (changes[f"{layer}.lora_{side}.weight"].astype(np.float32) for side in "AB")
            value += (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(value.shape)
        content.append((value.T if transposed else value).tobytes())
    return b"".join(content)
