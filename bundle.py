"""The bundle: one folder with the ONNX graphs of a model at one size and precision, its tokenizer and its manifest.

    NAME/
      manifest.json            what is here: graphs with their signatures, conditions, scheduler, digests
      unet.onnx, unet.onnx.data, …
      tokenizer/               as `transformers` saves it
      examples/seg.png, …      an example control image for each condition, where the model ships one

`manifest.json` is the truth: a file that it does not list is no part of the bundle. It is written last and replaced
atomically, so an interrupted export leaves either the old bundle or none.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .conditions import CONDITIONS
from .errors import BundleError, UserError
from .files import exclusive, new_partial_folder, partial_folders, remove_folder, sha256_of
from .messages import one_line
from .places import bundles

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output.

    Attributes:
        name: its name in the ONNX graph.
        dtype: NumPy's name (`float32`, `uint8`, …).
        shape: sizes; a string names a dimension that is free (`batch`, `images`, `guidance`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file of a bundle and how closely it was found to match its PyTorch module.

    Attributes:
        file: path inside the bundle; its weights lie beside it in `<file>.data`.
        max_abs_difference: largest difference to the PyTorch module over all outputs, on random inputs.
        difference: the largest difference by `measure` over all outputs.
        measure: `relative L2`, or for pixels and labels `share of values that differ`.
        tolerance: what `difference` was allowed to be.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_abs_difference: float
    difference: float
    measure: str
    tolerance: float


@dataclass
class Manifest:
    """What `manifest.json` holds.

    Attributes:
        model: the name the bundle was exported under.
        base: SHA-256 over the weights that all conditions share, what was fused into them included.
        precision: `fp32` or `fp16`, of weights and activations.
        width, height: of the images, in pixels; multiples of 8.
        vae_scale_factor: pixels per latent in each direction.
        text_encoder_layers: of which `clip_skip` may leave out all but one.
        vocabulary: rows of the text encoder's table, which every token's id is below; 0 if that is not known.
        scheduler_config: the checkpoint's `scheduler_config.json`.
        defaults: the model's own `guidance_scale`, `num_inference_steps` and `scheduler`, where it has them.
        graphs: by name.
        recipe: what the export was asked for: the arguments of `Checkpoint`, as they were typed.
        sources: where each component came from (`unet`, `vae`, …): a path, or a hub repository with its commit.
        loras: what was fused: `source`, `sha256`, `weight`, the number of layers `fused`, and the keys `unmatched`.
        embeddings: textual inversions: the number of vectors of each token.
        conditions: by name, each with the digest of its `controlnet`, its `palette` where that is not ADE20K's, and,
            where the model has an example, its `image`, `prompt` and `seed`.
        files: size in bytes and SHA-256 of every file.
        exported_with: versions of the packages that made it.
    """

    model: str
    base: str
    precision: str
    width: int
    height: int
    latent_channels: int
    vae_scale_factor: int
    text_encoder_layers: int
    scheduler_config: dict[str, Any]
    vocabulary: int = 0
    defaults: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    loras: list[dict[str, Any]] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)
    graphs: dict[str, GraphSpec] = field(default_factory=dict)
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    exported_with: dict[str, str] = field(default_factory=dict)

    def dumps(self) -> str:
        # Unsorted: conditions stay in the order in which they were exported, and the first is the default of `run`.
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> "Manifest":
        """Raises: ValueError, KeyError or TypeError where the text is not a manifest of this format."""
        fields = json.loads(text)
        found = fields.pop("format")
        if found != FORMAT:
            raise FormatMismatch(found)

        def tensors(rows: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)

        fields["graphs"] = {
            name: GraphSpec(**{**g, "inputs": tensors(g["inputs"]), "outputs": tensors(g["outputs"])})
            for name, g in fields["graphs"].items()
        }
        manifest = cls(**fields)
        for file, entry in manifest.files.items():
            inside = PurePosixPath(file)
            if inside.is_absolute() or ".." in inside.parts:
                raise ValueError(f"file outside the bundle: {file}")
            if not (isinstance(entry["size"], int) and isinstance(entry["sha256"], str)):
                raise ValueError(f"no size and digest of {file}")
        # What the manifest points at must be listed too: nothing outside the bundle is ever read.
        examples = {c["image"] for c in manifest.conditions.values() if "image" in c}
        missing = ({g.file for g in manifest.graphs.values()} | examples) - manifest.files.keys()
        if missing:
            raise ValueError(f"not listed in files: {', '.join(sorted(missing))}")
        return manifest


class FormatMismatch(ValueError):
    """The manifest is of another format version."""


class Bundle:
    """A bundle that was opened: its manifest is read and every file it lists is there at its size.

    Use `Bundle.open`. `verify` also reads every byte.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Reads the manifest and checks that every file is there at its size; reads no weights.

        Raises: BundleError, with one line that says what is wrong and what to do.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(f"no bundle at {folder}: make one with `cnpp-trt export`")
        try:
            manifest = Manifest.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise BundleError(
                f"{folder} is no bundle: it has no {MANIFEST}; make one with `cnpp-trt export --out {folder}`"
            ) from None
        except FormatMismatch as e:
            raise BundleError(
                f"{folder} has manifest format {e}, this version reads {FORMAT}: export the bundle again"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
            raise BundleError(f"{path} cannot be read ({one_line(e)}): export the bundle again") from None
        for name, entry in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                raise BundleError(f"{folder} is incomplete: {name} is missing; export the bundle again") from None
            if size != entry["size"]:
                raise BundleError(
                    f"{folder} is damaged: {name} has {size} bytes instead of {entry['size']}; export the bundle again"
                )
        return cls(folder, manifest)

    def verify(self) -> int:
        """Reads every file and compares its SHA-256 with the manifest's.

        Returns: the number of bytes read.
        Raises: BundleError naming every file that differs.
        """
        damaged = [
            name for name, entry in self.manifest.files.items() if sha256_of(self.folder / name) != entry["sha256"]
        ]
        if damaged:
            raise BundleError(
                f"{self.folder} is damaged: {', '.join(damaged)} changed since the export; export the bundle again"
            )
        return sum(int(entry["size"]) for entry in self.manifest.files.values())

    @property
    def digest(self) -> str:
        """SHA-256 over names and digests of all files: two bundles that share it hold the same bytes."""
        lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(self.manifest.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def guidance_width(self) -> int | None:
        """The width of `timestep_cond`, in which a distilled UNet reads its guidance scale; None for any other UNet."""
        unet = self.manifest.graphs.get("unet")
        return next((int(t.shape[1]) for t in unet.inputs if t.name == "timestep_cond"), None) if unet else None

    def graph(self, name: str) -> GraphSpec:
        """Raises: BundleError where the bundle has no such graph."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(f"{self.folder} has no graph {name!r}: export the bundle again") from None

    def graph_files(self, name: str) -> dict[str, dict[str, Any]]:
        """Size and digest of the graph's files by name: its ONNX file and, where it has weights, those beside it.

        Raises: BundleError where the bundle has no such graph.
        """
        file, files = self.graph(name).file, self.manifest.files
        return {name: files[name] for name in (file, f"{file}.data") if name in files}

    def require_condition(self, condition: str) -> None:
        """Raises: UserError where `condition` is unknown or not in this bundle."""
        if condition not in CONDITIONS:
            raise UserError(f"unknown condition {condition!r}: choose from {', '.join(CONDITIONS)}")
        if condition not in self.manifest.conditions:
            raise UserError(
                f"the bundle {self.folder} has no condition {condition!r}, only {', '.join(self.manifest.conditions)}: "
                f"add it with `cnpp-trt export --model {self.manifest.model} --cond {condition} --out {self.folder}`"
            )


@contextmanager
def write_bundle(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yields a staging folder; when the block ends, its files and `manifest` become the bundle at `folder`.

    Where `folder` is a bundle already, the staged files are added to it (a file it has is kept as it is, so stage only
    new ones) and its manifest is replaced; `manifest.files` must hold the old entries then. Nothing that could pass
    for a bundle is left behind when the block raises or the process is killed. Leftovers of a killed export are
    cleared by the next one. Call it within `lock_bundle`.
    """
    folder = Path(folder).absolute()
    for leftover in partial_folders(folder):
        remove_folder(leftover)
    staging = new_partial_folder(folder)
    try:
        yield staging
        _finish(staging, folder, manifest)
    finally:
        remove_folder(staging)


@contextmanager
def lock_bundle(folder: Path) -> Iterator[None]:
    """Whoever writes the bundle at `folder` is alone: others wait, and then see what it wrote.

    What a writer needs to know of the bundle that is there already, it must read within the lock.

    Raises: UserError when the disk is full or cannot be written.
    """
    folder = Path(folder).absolute()
    with exclusive(folder.parent / f".{folder.name}.lock", folder):
        yield


def _finish(staging: Path, folder: Path, manifest: Manifest) -> None:
    staged = sorted(p for p in staging.rglob("*") if p.is_file())
    for path in staged:
        name = path.relative_to(staging).as_posix()
        manifest.files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        with path.open("rb") as f:
            os.fsync(f.fileno())
    (staging / MANIFEST).write_text(manifest.dumps(), "utf-8")
    if not folder.exists():
        staging.rename(folder)
        return
    for path in staged:
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    (staging / MANIFEST).replace(folder / MANIFEST)


def bundle_folder(model: str, precision: str, width: int, height: int) -> Path:
    """The default place of a bundle: `<home>/bundles/<model>-<precision>-<width>x<height>`."""
    return bundles() / f"{model_name(model)}-{precision}-{width}x{height}"


def model_name(model: str) -> str:
    """A short name for a model: itself, or the last part of a path or hub id without a weight file's ending."""
    last = re.sub(r"\.(safetensors|ckpt|bin|pth?)(?=$|:)", "", Path(model).name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"


def find_bundle(
    model: str,
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    preferred: Sequence[str] = (),
) -> Path:
    """The bundle of `model` under `places.bundles()`.

    Args:
        precision: `fp32` or `fp16`; None takes the only one there is, or the first of `preferred`.
        size: (width, height) in pixels; None takes the only one there is.
    Raises: UserError where none or several fit, with the command that helps.
    """
    name = re.escape(model_name(model))
    pattern = re.compile(
        f"{name}-{precision or '(fp32|fp16)'}-" + (f"{size[0]}x{size[1]}" if size else r"\d+x\d+") + r"\Z"
    )
    root = bundles()
    found = sorted(p for p in root.iterdir() if pattern.match(p.name)) if root.is_dir() else []
    if not found:
        wanted = "".join(
            [f" --precision {precision}" if precision else "", f" --size {size[0]}x{size[1]}" if size else ""]
        )
        # Bundles are called after their model and what was put into it, which is no model to export.
        put_in = " (sd15-lcm is made with `--model sd15 --lora lcm`)" if model.startswith("sd15-") else ""
        command = f"`cnpp-trt export --model {model}{wanted} --cond …`"
        raise UserError(f"no bundle of {model!r} under {root}: make one with {command}{put_in}")
    for first in preferred:
        if len(found) > 1 and (best := [p for p in found if f"-{first}-" in p.name.removeprefix(model_name(model))]):
            found = best
    if len(found) > 1:
        raise UserError(
            f"several bundles of {model!r}: {', '.join(p.name for p in found)}; "
            "choose with --size, --precision or --bundle"
        )
    return found[0]
