"""Model configs, weights and adapters: what an export reads before it begins."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from cnpp_trt.export.checkpoint import Checkpoint
from hypothesis import strategies as st

from .kind import Kind, Place, difference, put
from .mutations import damaged, documents, encode

_COMPONENTS = {"unet": "unet", "vae": "vae", "text_encoder": "text_encoder", "controlnet_seg": "controlnet"}


def _look(folder: Path, component: str | None = None, **parts: Any) -> None:
    """Everything that `export` looks at before it loads weights."""
    checkpoint = Checkpoint(str(folder), **parts)
    checkpoint.size(None)
    checkpoint.check_controlnet("seg")
    checkpoint.examples()
    checkpoint.embeddings()
    checkpoint.match_loras()
    if component is None:
        checkpoint.tokenizer()
        checkpoint.config("scheduler")
    else:
        checkpoint.check_weights((component,))


def config(place: Place) -> Kind:
    """Every JSON file of a checkpoint."""
    folder = Path(shutil.copytree(place.checkpoint, place.folder / "checkpoint"))
    valid = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*.json"))
        if not file.name.endswith(("vocab.json", "tokenizer.json"))
    }

    def attempt(example: tuple[str, bytes]) -> None:
        name, content = example
        put(folder / name, content)
        try:
            _look(folder, next((c for c, part in _COMPONENTS.items() if name.startswith(part)), None))
        finally:
            put(folder / name, valid[name])

    _look(folder, "unet")  # what is valid is accepted; and what is slow to import is no input's fault
    inputs = [st.tuples(st.just(name), documents(json.loads(content))) for name, content in valid.items()]
    return Kind(st.one_of(inputs), attempt, lambda e: f"{e[0]} {difference(encode(json.loads(valid[e[0]])))(e)}")


def weights(place: Place) -> Kind:
    """Safetensors files: their header as JSON, and any byte."""
    folder = Path(shutil.copytree(place.checkpoint, place.folder / "checkpoint"))
    files = {component: next((folder / part).rglob("*.safetensors")) for component, part in _parts(folder).items()}
    valid = {component: file.read_bytes() for component, file in files.items()}

    def attempt(example: tuple[str, bytes]) -> None:
        component, content = example
        put(files[component], content)
        try:
            _look(folder, component)
        finally:
            put(files[component], valid[component])

    for component in valid:
        _look(folder, component)
    inputs = [st.tuples(st.just(component), _safetensors(content)) for component, content in valid.items()]
    return Kind(st.one_of(inputs), attempt, lambda e: f"{e[0]} {difference(valid[e[0]])(e)}")


def _parts(folder: Path) -> dict[str, str]:
    """The folder of each component; a tiny checkpoint has its ControlNets in folders of their own."""
    found = {}
    for component, part in _COMPONENTS.items():
        candidates = [p for p in (folder / part, folder / part / "seg", folder / "controlnet_seg") if p.is_dir()]
        if candidates:
            found[component] = str(candidates[0].relative_to(folder))
    return found


def _safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with its header changed (its length told rightly), or with any of its first bytes damaged, or any byte."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    rebuilt = documents(header).map(lambda text: struct.pack("<Q", len(text)) + text + data)
    beginning = damaged(content[: 8 + length]).map(lambda start: start + data)
    return st.one_of(rebuilt, rebuilt, beginning, damaged(content))


def adapter(place: Place) -> Kind:
    """LoRAs of each published layout and embeddings, as `export --lora` and `--embedding` read them."""
    import torch
    from cnpp_trt.developer.random_models.lora import make_lora
    from safetensors.torch import save_file

    checkpoint = Checkpoint(str(place.checkpoint))
    unet, text_encoder = checkpoint.empty("unet"), checkpoint.empty("text_encoder")
    valid = {}
    for layout in ("kohya", "diffusers", "old"):
        file = make_lora(place.folder / f"{layout}.safetensors", unet, text_encoder, layout=layout, rank=2)
        valid[f"lora {layout}"] = file.read_bytes()
    save_file({"emb_params": torch.zeros(2, 32)}, place.folder / "word.safetensors")
    valid["embedding"] = (place.folder / "word.safetensors").read_bytes()
    torch.save({"<word>": torch.zeros(32)}, place.folder / "word.bin")
    valid["pickle"] = (place.folder / "word.bin").read_bytes()
    fields = {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {},
        "alpha_pattern": {"to_q": 2},
        "target_modules": ["to_q"],
        "use_rslora": False,
    }

    def attempt(example: tuple[str, bytes, bytes]) -> None:
        name, content, settings = example
        file = put(place.folder / ("tried.bin" if name == "pickle" else "tried.safetensors"), content)
        put(place.folder / "adapter_config.json", settings)
        if name.startswith("lora"):
            _look(place.checkpoint, loras=[str(file)])
        else:
            _look(place.checkpoint, embeddings=[str(file)])

    settings = st.one_of(st.just(encode(fields)), documents(fields))
    inputs = [
        st.tuples(st.just(name), damaged(content) if name == "pickle" else _safetensors(content), settings)
        for name, content in valid.items()
    ]
    return Kind(st.one_of(inputs), attempt, lambda e: f"{e[0]} {difference(valid[e[0]])(e[1])} with {e[2][:300]!r}")
