"""Writes `miniature/graphs.zip`: what bundles of the embedded model need beside its weights (bundles/embedded.py).

    python -m cnpp_trt.developer.miniature.graphs

To be run again whenever the exporter or the embedded model changes; tests/bundles/test_embedded.py says when.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import onnx
from safetensors.numpy import load_file

from ...bundles.bundle import MANIFEST, Bundle
from ...bundles.graph_names import OF_THE_UNET, condition_of
from ...conditions import CONDITIONS
from ...export.allocator import return_large_blocks
from ...export.checkpoint import Checkpoint
from ...export.exporter import export_bundle
from ...files import replace_file
from ...miniature import EMBEDDED, GRAPHS, MODEL_FOLDER


def main() -> int:
    """Exports every variant, which takes minutes."""
    return_large_blocks()
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for model, variant in EMBEDDED.items():
            conditions = [c for c in CONDITIONS if (MODEL_FOLDER / variant.controlnets / c).is_dir()]
            bundles[model] = export_bundle(Checkpoint(model), conditions, Path(folder) / model)
        members = members_of(bundles)
        made = Path(folder) / "graphs.zip"
        with ZipFile(made, "w") as archive:
            for name in sorted(members):
                # A date of its own, so that the same content gives the same file.
                archive.writestr(ZipInfo(name), members[name], ZIP_DEFLATED, 9)
        replace_file(GRAPHS, made.read_bytes())
    print(f"{GRAPHS}: {GRAPHS.stat().st_size} bytes, {len(members)} files")
    return 0


def members_of(bundles: dict[str, Bundle]) -> dict[str, bytes]:
    """The content of the archive, by name, from a bundle of each variant.

    Raises:
        ValueError: the variants differ in what there is one of for all.
    """
    members: dict[str, bytes] = {}

    def add(name: str, content: bytes) -> None:
        if members.setdefault(name, content) != content:
            raise ValueError(f"{name} is not the same for every variant")

    for model, bundle in bundles.items():
        layouts = {}
        for name, spec in bundle.manifest.graphs.items():
            content = (bundle.folder / spec.file).read_bytes()
            # Small weights stand in the graph itself.
            if members.setdefault(f"graphs/{name}.onnx", content) != content:
                members[f"{model}/{name}.onnx"] = content
            # A fused LoRA is added when a bundle is assembled: the layout is that of the weights without it.
            plain = bundles["miniature"] if name in OF_THE_UNET else bundle
            layouts[name], literals = layout_of(plain.folder / spec.file, weights_of(name, model))
            for literal, content in literals.items():
                add(literal, content)
        for file in (bundle.folder / "tokenizer").iterdir():
            add(f"tokenizer/{file.name}", file.read_bytes())
        members[f"{model}/{MANIFEST}"] = (bundle.folder / MANIFEST).read_bytes()
        members[f"{model}/weights.json"] = json.dumps(layouts).encode()
    return members


def weights_of(graph: str, model: str) -> str:
    """The file of the checkpoint with the graph's weights, relative to it; empty where it has none."""
    condition = condition_of(graph)
    if condition:
        controlnets = EMBEDDED[model].controlnets
        folder = f"extractors/{condition}" if graph.startswith("extractor_") else f"{controlnets}/{condition}"
    elif graph in OF_THE_UNET:
        folder = "unet"
    else:
        folder = graph if graph == "text_encoder" else graph.partition("_")[0]
    files = [path.relative_to(MODEL_FOLDER).as_posix() for path in (MODEL_FOLDER / folder).glob("*.safetensors")]
    return files[0] if files else ""


def layout_of(graph: Path, file: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Which tensors of a file lie one behind the other in the weights of a graph, found by their content.

    Returns:
        The layout as bundles/embedded.py reads it, and what stands in no file, by its name in the archive.

    Raises:
        ValueError: the weights overlap or leave gaps.
    """
    tensors: dict[bytes, tuple[str, bool]] = {}
    for key, value in (load_file(MODEL_FOLDER / file) if file else {}).items():
        wide = value.astype(np.float32)
        tensors.setdefault(wide.T.tobytes(), (key, True))
        tensors[wide.tobytes()] = (key, False)
    content = Path(f"{graph}.data").read_bytes()
    places = []
    for initializer in onnx.load(graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in initializer.external_data}
        if place:
            places.append((int(place["offset"]), int(place["length"])))
    parts: list[str | tuple[str, bool]] = []
    literals = {}
    end = 0
    for offset, length in sorted(places):
        if offset != end:
            raise ValueError(f"{graph} has weights at {offset}, and not at {end}")
        part = content[offset : (end := offset + length)]
        if part in tensors:
            parts.append(tensors[part])
        else:
            name = f"values/{graph.stem}-{offset}"
            parts.append(name)
            literals[name] = part
    if end != len(content):
        raise ValueError(f"{graph} has weights of {len(content)} bytes, and not {end}")
    return {"file": file, "parts": parts}, literals


if __name__ == "__main__":
    sys.exit(main())
