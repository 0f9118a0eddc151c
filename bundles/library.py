"""The bundles under `CNPP_TRT_HOME`: what they are called, and how the one that is meant is found.

A name is for people, and short: `sd15-lcm-fp32-512x512`. Whatever a short name cannot say (where a file is, who owns a
repository, which ControlNet was put in) is in a few digits of a digest at its end. No name decides which bundle is
used: the manifest's recipe does.
"""

import hashlib
import json
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..messages import printable
from ..miniature import EMBEDDED, SIZE
from ..places import MANIFEST, bundles
from ..schema import SchemaError, convert, decode, read_bounded
from .manifest import FORMAT, MAX_BYTES, QuantizationRecord, RecipeRecord

_WEIGHTS = re.compile(r"\.(safetensors|ckpt|bin|pth?)(?=$|:)")
QUANTIZED = ("int8", "fp8")
"""Precisions that `cnpp-trt quantize` makes of another bundle."""
# Of a name in bytes: `-fp32-2048x2048` and what is hidden beside a bundle while it is written come on top.
_MAX_NAME = 150
_FOLDER = re.compile(
    r"(?P<name>.+)-(?P<precision>(?:int8|fp8)(?:-fp16)?|fp32|fp16)-(?P<width>\d{2,4})x(?P<height>\d{2,4})", re.DOTALL
)


def bundle_folder(model: str, precision: str, width: int, height: int) -> Path:
    """The default place of a bundle: `<home>/bundles/<name>-<precision>-<width>x<height>`.

    Args:
        model: the name of a bundle, or any text, which is made one.
    """
    return bundles() / f"{model_name(model)}-{precision}-{width}x{height}"


def model_name(model: str) -> str:
    """A name for a model: itself, or what is left of a path or hub id in a name, with digits that say the rest."""
    name = short_name(model)
    return fitting(name, "" if name == unicodedata.normalize("NFC", model) else source_identity(model))


def short_name(source: str | Path) -> str:
    """What people call a source: the last part of a path or hub id without a weight file's ending.

    Letters of every script stay (in Unicode's composed form, NFC); anything else than letters, digits and `._-` is
    replaced. Several sources may have one short name.
    """
    text = os.path.realpath(source) if str(source).strip("./\\") == "" else str(source)
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", text).rstrip("/\\"))[-1]
    kept = "".join(c if _in_names(c) else " " for c in _WEIGHTS.sub("", last))
    return "-".join(kept.split()).strip("-.") or "model"


def fitting(name: str, digest: str) -> str:
    """The name with eight digits of `digest`, where there is one, cut to what a folder's name may have."""
    encoded = name.encode(errors="replace")
    if len(encoded) > _MAX_NAME:
        digest = digest or hashlib.sha256(encoded).hexdigest()
        name = encoded[: _MAX_NAME - 9].decode(errors="ignore").rstrip("-.")
    return f"{name}-{digest[:8]}" if digest else name


def local_path(source: str | Path) -> Path | None:
    """The local file or folder that a source names, with links resolved; None where there is none."""
    if not str(source):
        return None
    try:
        path = Path(source).expanduser()
        if not path.exists():
            return None
        real = Path(os.path.realpath(path))
        # Where a file system takes composed and decomposed letters for the same, they are one path.
        composed = Path(unicodedata.normalize("NFC", str(real)))
        same = composed != real and composed.exists() and composed.samefile(real)
    except (OSError, ValueError, RuntimeError):
        return None
    return composed if same else real


def source_identity(source: str | Path) -> str:
    """SHA-256 of which source it is: of its path for a local file or folder, else of its text."""
    path = local_path(source)
    return text_identity(str(source)) if path is None else hashlib.sha256(b"local " + os.fsencode(path)).hexdigest()


def text_identity(text: str) -> str:
    """SHA-256 of a name that means the same everywhere: a named model, or the hub's."""
    normal = unicodedata.normalize("NFC", text).rstrip("/")
    return hashlib.sha256(b"name " + normal.encode(errors="surrogatepass")).hexdigest()


def recipe_identity(parts: Mapping[str, Any]) -> str:
    """SHA-256 of a whole recipe, from the identities of its parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def export_command(recipe: RecipeRecord, *options: str) -> str:
    """The command that exports a recipe, to be copied; a local source stands there by the last part of its path."""
    words = ["cnpp-trt", "export", "--model", recipe.get("model", "MODEL")]
    for option, key in (("--controlnet", "controlnets"), ("--extractor", "extractors")):
        for condition, source in convert(recipe.get(key, {}), dict[str, str]).items():
            words += [option, f"{condition}={source}"]
    for option, key in (("--lora", "loras"), ("--embedding", "embeddings")):
        for source in convert(recipe.get(key, []), list[str]):
            words += [option, source]
    for key in ("vae", "variant", "config"):
        if recipe.get(key):
            words += [f"--{key}", str(recipe.get(key))]
    return printable(shlex.join([*words, *options]), 1000)


def find_bundle(
    model: str,
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    preferred: Sequence[str] = (),
) -> Path:
    """The bundle of `model` under `places.bundles()`.

    Where there is none of an embedded model, or that of another version, its fp32 bundle is written (embedded.py): that
    takes no PyTorch. A bundle
    is the model's where its recipe names it, or where it is called so (`sd15-lcm`). One with another VAE,
    LoRAs or embeddings is another model's; one with other ControlNets, extractors or another variant serves where there
    is none without.

    Args:
        precision: `fp32`, `fp16`, `int8` or `fp8`; None takes the only one there is, or the first of `preferred`. Of
            several in int8 it takes the one whose other graphs are in the first of `preferred`.
        size: (width, height) in pixels; None takes the only one there is.

    Raises:
        UserError: none or several fit, with the command that helps.
    """
    root = bundles()
    there = [
        b for b in _bundles(root) if precision in (None, b.precision) and (size is None or size == (b.width, b.height))
    ]
    found = _of_model(model, there)
    if model in EMBEDDED and precision in (None, "fp32") and size in (None, SIZE):
        from .embedded import assemble, is_outdated

        folder = bundle_folder(model, "fp32", *SIZE)
        if not found or is_outdated(folder):
            assemble(model, folder)
            return folder
    if not found:
        raise _none(model, precision, size, root)
    for attribute in ("precision", "base"):
        for first in preferred:
            if len(found) > 1 and (best := [b for b in found if getattr(b, attribute) == first]):
                found = best
    if len(found) > 1:
        raise UserError(
            f"several bundles of {printable(repr(model))}: {', '.join(b.folder.name for b in found)}; "
            "choose with --size, --precision or --bundle"
        )
    return found[0].folder


@dataclass(frozen=True)
class _Head:
    """What a manifest says of whose bundle it is."""

    format: int
    model: str
    precision: str
    width: int
    height: int
    recipe: RecipeRecord
    identity: str = ""
    quantization: QuantizationRecord | None = None


@dataclass(frozen=True)
class _Found:
    """A folder that may be a bundle.

    Attributes:
        head: None where the manifest cannot be read: then `Bundle.open` says why.
        precision: what the large networks compute in.
        base: what everything else computes in.
    """

    folder: Path
    head: _Head | None
    precision: str
    base: str
    width: int
    height: int


def _bundles(root: Path) -> list[_Found]:
    """Every bundle of a folder, by name."""
    found = []
    try:
        folders = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    for folder in folders:
        head = _head(folder)
        if head is not None:
            precision = head.quantization["format"] if head.quantization else head.precision
            found.append(_Found(folder, head, precision, head.precision, head.width, head.height))
        elif named := _FOLDER.fullmatch(unicodedata.normalize("NFC", folder.name)):
            size = int(named["width"]), int(named["height"])
            precision, _, base = named["precision"].partition("-")
            found.append(_Found(folder, None, precision, base, *size))
    return found


def _head(folder: Path) -> _Head | None:
    try:
        head = convert(decode(read_bounded(folder / MANIFEST, MAX_BYTES), dict[str, Any]), _Head)
    except (OSError, SchemaError):
        return None
    return head if head.format == FORMAT else None


def _of_model(model: str, bundles: Sequence[_Found]) -> list[_Found]:
    """Those that fit best: of exactly this recipe, else with other ControlNets and the like."""
    normal = unicodedata.normalize("NFC", model)
    path, name = local_path(model), text_identity(model)
    # A folder beside where the command runs may have a model's name by chance; an export looks at the names it knows
    # first, and then at the disk.
    word = re.search(r"[/\\]", model) is None
    local = path is not None and (not word or path.is_file() or (path / "model_index.json").is_file())
    identities = [name, source_identity(model)] if word else [source_identity(model)]
    for identity in identities:
        mine = [b for b in bundles if b.head and b.head.identity == identity and not _put_in(b.head)]
        for group in ([b for b in mine if b.head and b.head.recipe.keys() == {"model"}], mine):
            if group:
                return group
    if local:
        called = {fitting(short_name(model), recipe_identity({"model": source_identity(model)}))}
    else:
        called = {normal, model_name(model)}
        if own := [b for b in bundles if b.head and b.head.model == normal]:
            return own
    unreadable = [b for b in bundles if b.head is None]
    return [b for b in unreadable if _name_of(b.folder) in called]


def _put_in(head: _Head) -> bool:
    """Whether its pictures are of another base model than the one that its recipe names."""
    return any(head.recipe.get(key) for key in ("vae", "loras", "embeddings"))


def _name_of(folder: Path) -> str:
    named = _FOLDER.fullmatch(unicodedata.normalize("NFC", folder.name))
    return named["name"] if named else ""


def _none(model: str, precision: str | None, size: tuple[int, int] | None, root: Path) -> UserError:
    if precision in QUANTIZED:
        words = ["cnpp-trt", "quantize", "--model", model, "--precision", str(precision)]
        return UserError(
            f"no bundle of {printable(repr(model))} in {precision} under {root}: "
            f"make one with `{printable(shlex.join(words), 500)}`"
        )
    words = ["cnpp-trt", "export", "--model", model]
    words += ["--precision", precision] if precision else []
    words += ["--size", f"{size[0]}x{size[1]}"] if size else []
    # Bundles are called after their model and what was put into it, which is no model to export.
    put_in = " (sd15-lcm is made with `--model sd15 --lora lcm`)" if model.startswith("sd15-") else ""
    command = printable(shlex.join(words), 500)
    return UserError(
        f"no bundle of {printable(repr(model))} under {root}: make one with `{command} --cond seg`{put_in}"
    )


def _in_names(character: str) -> bool:
    """A letter, a digit or a mark that belongs to a letter, of any script, or one of `._-`."""
    return character in "._-" or character.isalnum() or unicodedata.category(character).startswith("M")
