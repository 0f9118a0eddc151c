"""Writing a bundle: alone, whole or not at all, and going on where an interrupted export ended.

What is being written is a hidden folder beside the bundle, which takes its name when it is whole. Graphs take minutes
each: the finished ones of an interrupted export stay there with a small record of them, and the next export of the same
thing takes them over. Whatever else was left is cleared by the next export into the same place.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from ..files import (
    PROGRESS,
    exclusive,
    hidden,
    new_partial_folder,
    partial_folders,
    remove_folder,
    replace_file,
    sha256_of,
)
from ..places import MANIFEST
from ..schema import Meta, Record, SchemaError, decode, read_bounded, to_json
from .manifest import FileName, FileRecord, GraphName, GraphSpec, Manifest, Sha256

_MAX_BYTES = 16 << 20


class _Graph(Record, kw_only=True):
    """A graph that is finished: what it was made of, and its files."""

    made_of: Sha256
    spec: GraphSpec
    files: dict[FileName, FileRecord]


class _Record(Record, kw_only=True):
    """The graphs of a staging folder that are finished."""

    format: Literal[1] = 1
    graphs: Annotated[dict[GraphName, _Graph], Meta(max_length=1000)]


class Progress:
    """The finished graphs of an export, on disk as soon as each is: what an interrupted export leaves to the next."""

    def __init__(self) -> None:
        self._staging: Path | None = None
        self._graphs: dict[str, _Graph] = {}

    @property
    def graphs(self) -> int:
        """How many graphs are finished."""
        return len(self._graphs)

    def keep(self, wanted: Mapping[str, str]) -> dict[str, GraphSpec]:
        """The graphs that an interrupted export left, of those that are wanted. What else it left is deleted.

        Args:
            wanted: by name, SHA-256 over everything that each graph depends on.
        """
        self._graphs = {name: graph for name, graph in self._graphs.items() if wanted.get(name) == graph.made_of}
        self._tidy()
        return {name: graph.spec for name, graph in self._graphs.items()}

    def add(self, name: str, made_of: str, spec: GraphSpec) -> None:
        """Records a graph whose files are whole.

        Args:
            made_of: as in `keep`.
        """
        assert self._staging is not None
        files = {
            file: _on_disk(self._staging / file)
            for file in (spec.file, f"{spec.file}.data")
            if (self._staging / file).is_file()
        }
        self._graphs[name] = _Graph(made_of=made_of, spec=spec, files=files)
        self._write()

    def _write(self) -> None:
        assert self._staging is not None
        replace_file(self._staging / PROGRESS, to_json(_Record(graphs=self._graphs)))

    def _take_over(self, leftovers: list[Path]) -> Path | None:
        """The folder of `leftovers` with the most graphs that are whole, without anything else in it."""
        found = [(graphs, folder) for folder in leftovers if (graphs := _whole(folder))]
        if found:
            self._graphs, self._staging = max(found, key=lambda pair: len(pair[0]))
        return self._staging

    def _tidy(self) -> None:
        """Deletes what is not of a finished graph."""
        assert self._staging is not None
        whole = self._files()
        for path in self._staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            elif path.name not in whole:
                path.unlink(missing_ok=True)
        self._write()

    def _begin(self, staging: Path) -> None:
        self._staging = staging

    def _files(self) -> dict[str, FileRecord]:
        return {file: record for graph in self._graphs.values() for file, record in graph.files.items()}


@contextmanager
def write_bundle(folder: Path, manifest: Manifest, progress: Progress | None = None) -> Iterator[Path]:
    """Yields a staging folder; when the block ends, its files and `manifest` become the bundle at `folder`.

    Where `folder` is a bundle already, the staged files are added to it (a file it has is kept as it is, so stage only
    new ones) and its manifest is replaced; `manifest.files` must hold the old entries then. Nothing that could pass
    for a bundle is left behind when the block raises or the process is killed. Leftovers of a killed export are
    cleared by the next one. Call it within `lock_bundle`.

    Args:
        progress: with it, the graphs that were added stay in the staging folder when the block is interrupted (not when
            it fails), and those of an interrupted export are there when it begins.
    """
    folder = Path(folder).absolute()
    leftovers = partial_folders(folder)
    staging = progress._take_over(leftovers) if progress else None
    for leftover in leftovers:
        if leftover != staging:
            remove_folder(leftover)
    staging = staging or new_partial_folder(folder)
    if progress:
        progress._begin(staging)
    interrupted = False
    try:
        yield staging
        _finish(staging, folder, manifest, progress._files() if progress else {})
    except BaseException as e:
        interrupted = not isinstance(e, Exception)
        raise
    finally:
        if progress and progress.graphs and interrupted and staging.is_dir():
            with suppress(OSError):
                progress._tidy()
        else:
            remove_folder(staging)


@contextmanager
def lock_bundle(folder: Path) -> Iterator[None]:
    """Whoever writes the bundle at `folder` is alone: others wait, and then see what it wrote.

    What a writer needs to know of the bundle that is there already, it must read within the lock.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    folder = Path(folder).absolute()
    with exclusive(folder.parent / hidden(folder.name, ".lock"), folder):
        yield


def _whole(folder: Path) -> dict[str, _Graph]:
    """The finished graphs of a staging folder whose files are all as they were recorded."""
    try:
        graphs = decode(read_bounded(folder / PROGRESS, _MAX_BYTES), _Record).graphs
    except (OSError, SchemaError):
        return {}
    return {
        name: graph
        for name, graph in graphs.items()
        if graph.spec.file in graph.files
        and all(
            not (folder / file).is_symlink() and sha256_of(folder / file) == record["sha256"]
            for file, record in graph.files.items()
        )
    }


def _on_disk(path: Path) -> FileRecord:
    """A file's size and digest, after it was written to the disk itself."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _finish(staging: Path, folder: Path, manifest: Manifest, known: dict[str, FileRecord]) -> None:
    """Moves the staged files to their place and writes the manifest.

    Args:
        known: files whose digest was just taken.
    """
    (staging / PROGRESS).unlink(missing_ok=True)
    staged = sorted(p for p in staging.rglob("*") if p.is_file())
    for path in staged:
        name = path.relative_to(staging).as_posix()
        manifest.files[name] = known.get(name) or _on_disk(path)
    (staging / MANIFEST).write_text(manifest.dumps(), "utf-8")
    if not folder.exists():
        staging.rename(folder)
        return
    for path in staged:
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    (staging / MANIFEST).replace(folder / MANIFEST)
