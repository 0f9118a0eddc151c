"""Graphs that PyTorch's exporter wrote, kept from session to session: most of what an export takes.

The same graphs are in many bundles: the text encoder and the VAE of the tiny checkpoint in nearly all of them. A graph
is found by all that it is made from: the exporter's code (as in `fixture_cache`), the module with its weights and its
attributes, the inputs' sizes and the names. What a module holds that has no known content makes its graph anew.

Only PyTorch's part is left out. Graphs that come from here are compared with their modules like any other, by the
exporter itself, and its files are written, interrupted and refused as ever.
"""

import hashlib
import os
import shutil
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from cnpp_trt.export import exporter
from cnpp_trt.files import new_partial_folder, remove_folder
from filelock import FileLock
from fixture_cache import cache_folder, code_key, forget_old, instructions

_KEPT = 1_000
# Where a configuration was read from and by what, and a list in no order of what it does not say.
_NOT_CONTENT = {"_name_or_path", "_commit_hash", "transformers_version", "_diffusers_version", "_use_default_values"}


def install() -> None:
    """From now on, in this process, exports take graphs that are kept. PyTorch is not imported before there is one."""
    patched: Any = exporter
    export = patched._export
    if export.__module__ == exporter.__name__:

        def kept(*arguments: Any) -> None:
            from cnpp_trt.export import onnx_graph

            if onnx_graph._write.__module__ == onnx_graph.__name__:  # else a test has put its own there
                onnx_graph._write = partial(_write, onnx_graph._write)
            export(*arguments)

        kept.__module__ = __name__
        patched._export = kept


def environment() -> dict[str, str]:
    """For another process whose exports take graphs that are kept."""
    tests = Path(__file__).parent
    paths = [str(tests / "programs" / "kept_graphs"), str(tests), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CNPP_TRT_TEST_CACHE": str(cache_folder().absolute())}


def _write(make: Callable[..., None], source: Any, path: Path, opset: int) -> None:
    """What `make` writes, with `make` called for what is not there yet."""
    try:
        key = _key(source, opset)
    except _UnknownContentError:
        make(source, path, opset)
        return
    root = cache_folder() / ".graphs"
    entry = root / f"{source.name}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{entry.name}.lock"):
        if not entry.is_dir():
            folder = new_partial_folder(entry)
            try:
                make(source, folder / path.name, opset)
                folder.rename(entry)
            finally:
                remove_folder(folder)
    entry.touch()
    for file in entry.iterdir():
        shutil.copyfile(file, path.parent / file.name)
    forget_old(root, _KEPT)


class _UnknownContentError(Exception):
    """Something whose content cannot be told."""


def _key(source: Any, opset: int) -> str:
    # Of the example inputs their sizes alone: their values are random, and are in no graph.
    inputs = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in source.flat().items()]
    digest = hashlib.sha256(f"{code_key('')} {opset} {inputs}\n".encode())
    _Content(digest).add({name: value for name, value in vars(source).items() if name != "inputs"})
    return digest.hexdigest()[:20]


class _Content:
    """Adds to a digest all that an object holds: the same for equal objects of two processes."""

    def __init__(self, digest: Any) -> None:
        self.digest = digest
        self.seen: dict[int, tuple[int, Any]] = {}

    def add(self, value: Any) -> None:
        import torch

        self._say(type(value).__module__, type(value).__qualname__)
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum | torch.dtype):
            self._say(repr(value))
        elif isinstance(value, type):
            self._say(value.__module__, value.__qualname__)
        elif id(value) in self.seen:
            self._say(str(self.seen[id(value)][0]))
        else:
            # Kept with its object, so that no other object gets its id.
            self.seen[id(value)] = len(self.seen), value
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided:
                raise _UnknownContentError
            self._say(str(value.dtype), str(tuple(value.shape)), str(value.requires_grad))
            self.digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            self._add_items(value.items())
        elif isinstance(value, set | frozenset):
            self._say(*sorted(map(repr, value)))
        elif isinstance(value, list | tuple):
            self._say(str(len(value)))
            for member in value:
                self.add(member)
        elif isinstance(value, types.MethodType):
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, types.FunctionType):
            self._say(instructions(value.__code__))
            self.add([cell.cell_contents for cell in value.__closure__ or ()])
            self.add([value.__defaults__, value.__kwdefaults__])
        elif isinstance(value, types.BuiltinFunctionType | torch.device | torch.Size):
            self._say(repr(value))
        elif hasattr(value, "__dict__"):
            self._add_items(vars(value).items())
        else:
            raise _UnknownContentError(type(value))

    def _add_items(self, items: Iterable[tuple[Any, Any]]) -> None:
        kept = [(key, value) for key, value in items if key not in _NOT_CONTENT]
        self._say(str(len(kept)))
        for key, value in kept:
            self.add(key)
            self.add(value)

    def _say(self, *texts: str) -> None:
        for text in texts:
            self.digest.update(f"{len(text)} {text}\n".encode())
