"""The bundle: one folder with the ONNX graphs of a model at one size and precision, its tokenizer and its manifest.

    NAME/
      manifest.json            what is here: graphs with their signatures, conditions, scheduler, digests
      unet.onnx, unet.onnx.data, …
      tokenizer/               as `transformers` saves it
      examples/seg.png, …      an example control image for each condition, where the model ships one

`manifest.json` is the truth: a file that it does not list is no part of the bundle and is never read, and a file is
compared with its digest before it is used (`verified`). It is written last and replaced atomically, so an interrupted
export leaves either the old bundle or none (`staging`). `library` knows where bundles are and what they are called.
"""

import os
import shlex
import stat
from functools import cached_property
from pathlib import Path

from ..conditions import CONDITIONS
from ..errors import BundleError, UserError
from ..files import sha256_of
from ..messages import one_line, printable, some
from ..places import MANIFEST
from ..schema import SchemaError, read_bounded
from .graph_names import OF_THE_UNET
from .library import bundle_folder, export_command, find_bundle, model_name
from .manifest import FORMAT, MAX_BYTES, FileRecord, FormatMismatch, GraphSpec, Manifest, TensorSpec
from .staging import lock_bundle, write_bundle
from .verified import Verified

TOKENIZER = "tokenizer"
# Of what `transformers` saves, what the runtime reads.
_TOKENIZER_FILES = (f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/tokenizer_config.json")
_AGAIN = "export the bundle again"


class Bundle:
    """A bundle that was opened: its manifest is read and every file it lists is there at its size.

    Use `Bundle.open`. What is read of it afterwards is compared with its digest then; `verify` reads every byte.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verified = Verified(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Reads the manifest and checks that every file is there at its size; reads no weights.

        Raises:
            BundleError: the folder is no bundle, or a file is missing; the message says what to do.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError(f"no bundle at {printable(folder)}: make one with {_export(folder)}")
        manifest = _read_manifest(folder)
        root = Path(os.path.realpath(folder))
        for name, entry in manifest.files.items():
            try:
                status = (root / name).stat()
                inside = Path(os.path.realpath(root / name)).is_relative_to(root)
            except OSError:
                raise BundleError(f"{folder} is incomplete: {name} is missing; {_AGAIN}") from None
            if not inside:
                raise BundleError(f"{folder} cannot be used: {name} is a link that leads outside of it; {_AGAIN}")
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{folder} is damaged: {name} is no file; {_AGAIN}")
            if status.st_size != entry["size"]:
                raise BundleError(
                    f"{folder} is damaged: {name} has {status.st_size} bytes instead of {entry['size']}; {_AGAIN}"
                )
        return cls(folder, manifest)

    @classmethod
    def find(cls, model: str, precision: str | None = None, size: tuple[int, int] | None = None) -> "Bundle":
        """Opens the bundle that `cnpp-trt export` or `build` made of a model.

        Args:
            model: as it was given to the export: `miniature`, `sd15`, a folder or a name on the hub.
            precision: `fp32`, `fp16`, `int8` or `fp8`; by default fp32 where there are several.
            size: (width, height) in pixels; by default the only one that there is.

        Raises:
            UserError: there is no such bundle, with the command that makes it, or several fit.
        """
        return cls.open(find_bundle(model, precision, size, ("fp32", "fp16")))

    def verify(self) -> int:
        """Reads every file, whether it was read before or not, and compares its SHA-256 with the manifest's.

        Returns:
            The number of bytes read.

        Raises:
            BundleError: files differ; the message names them.
        """
        damaged = [
            name for name, entry in self.manifest.files.items() if sha256_of(self.folder / name) != entry["sha256"]
        ]
        if damaged:
            raise BundleError(f"{self.folder} is damaged: {some(damaged, 5)} changed since the export; {_AGAIN}")
        return sum(entry["size"] for entry in self.manifest.files.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that the manifest says and so over every file: bundles that share it hold the same."""
        return self.manifest.digest

    @property
    def guidance_width(self) -> int | None:
        """The width of `timestep_cond`, in which a distilled UNet reads its guidance scale; None for any other UNet."""
        inputs = [t for name in OF_THE_UNET if name in self.manifest.graphs for t in self.manifest.graphs[name].inputs]
        return next((int(t.shape[1]) for t in inputs if t.name == "timestep_cond"), None)

    def graph(self, name: str) -> GraphSpec:
        """The record of a graph.

        Raises:
            BundleError: the bundle has no such graph.
        """
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(f"{self.folder} has no graph {name!r}: {_AGAIN}") from None

    def graph_files(self, name: str) -> dict[str, FileRecord]:
        """Size and digest of the graph's files by name: its ONNX file and, where it has weights, those beside it.

        Raises:
            BundleError: the bundle has no such graph.
        """
        file, files = self.graph(name).file, self.manifest.files
        return {name: files[name] for name in (file, f"{file}.data") if name in files}

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists, after its content was found to be what it says.

        The file is read whole for that, once: what was found is remembered (bundles/verified.py).

        Raises:
            BundleError: it is not listed or is another.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"the manifest of {self.folder} does not list {printable(name)}: {_AGAIN}")
        if not self._verified.has(name, entry):
            raise BundleError(f"{self.folder} is damaged: {name} changed since the export; {_AGAIN}")
        return self.folder / name

    def graph_file(self, name: str) -> Path:
        """The path of the graph's ONNX file, after it and the weights beside it were found to be what they should be.

        Raises:
            BundleError: the bundle has no such graph, or one of its files is another or not listed.
        """
        file = self.graph(name).file
        weights = f"{file}.data"
        if weights not in self.manifest.files and os.path.lexists(self.folder / weights):
            raise BundleError(f"the manifest of {self.folder} does not list {weights}: {_AGAIN}")
        for part in self.graph_files(name):
            self.file(part)
        return self.folder / file

    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer, after the files that are read of it were found to be what they should be.

        Raises:
            BundleError: a file is another, or the manifest does not list it.
        """
        for name in _TOKENIZER_FILES:
            self.file(name)
        return self.folder / TOKENIZER

    def require_condition(self, condition: str) -> None:
        """Checks that the bundle has a condition.

        Raises:
            UserError: `condition` is unknown or not in this bundle.
        """
        if condition not in CONDITIONS:
            raise UserError(f"unknown condition {condition!r}: choose from {', '.join(CONDITIONS)}")
        if condition not in self.manifest.conditions:
            add = export_command(self.manifest.recipe, "--cond", condition, "--out", str(self.folder))
            raise UserError(
                f"the bundle {self.folder} has no condition {condition!r}, only {', '.join(self.manifest.conditions)}: "
                f"add it with `{add}`"
            )


def _export(folder: Path) -> str:
    return f"`cnpp-trt export --cond seg --out {printable(shlex.quote(str(folder)), 1000)}`"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return Manifest.loads(read_bounded(path, MAX_BYTES))
    except FileNotFoundError:
        raise BundleError(
            f"{printable(folder)} is no bundle: it has no {MANIFEST}; make one with {_export(folder)}"
        ) from None
    except FormatMismatch as e:
        raise BundleError(
            f"{folder} has manifest format {one_line(e, 20)}, this version reads {FORMAT}: {_AGAIN}"
        ) from None
    except (SchemaError, OSError) as e:
        raise BundleError(f"{path} cannot be read ({one_line(e)}): {_AGAIN}") from None


__all__ = [
    "FORMAT",
    "MANIFEST",
    "Bundle",
    "FileRecord",
    "GraphSpec",
    "Manifest",
    "TensorSpec",
    "bundle_folder",
    "find_bundle",
    "lock_bundle",
    "model_name",
    "write_bundle",
]
