"""Where a checkpoint's files are: a local folder or file, or a repository of the Hugging Face hub.

What a user writes for any part of a checkpoint (the model, a ControlNet, a VAE, a LoRA, …):

    ./folder, /a/file.safetensors                 a local folder or file
    owner/name                                    a repository of the hub
    owner/name@v1.0                               at a revision: a branch, a tag or a commit
    owner/name/sub/folder, owner/name/file.bin    a folder or file in it

The hub's own environment variables count: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. What was downloaded once is
taken from its cache, also where the hub cannot be reached.
"""

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Protocol

from ..errors import UserError
from ..install import EXPORT_MODULES, found, needs
from ..messages import printable
from .hub import HubTree
from .weight_files import SUFFIXES, Library, choose_weights

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<inside>.+?))?/?")
# Of a folder's entries: a module's folder has a dozen.
_MAX_LISTED = 10_000


class Tree(Protocol):
    """Files below one folder, some of which may still have to be fetched.

    Names are paths from its top, with slashes.
    """

    @property
    def uri(self) -> str:
        """What it is, for people and for a bundle's manifest."""
        ...

    @property
    def partial_listing_note(self) -> str:
        """What a message says where a file is not there, but only a part of the tree could be looked at."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def has_folder(self, folder: str) -> bool:
        """Whether there is a folder of that name."""
        ...

    def files(self, folder: str) -> list[str]:
        """The files in a folder, sorted, without those further down; `folder` is empty for the top."""
        ...

    def fetch(self, names: Iterable[str]) -> list[Path]:
        """These files on this machine.

        Raises:
            UserError: one cannot be had.
        """
        ...


@dataclass(frozen=True)
class LocalTree:
    """A folder of this machine. Only what is asked for is looked at: it may be `/`."""

    folder: Path

    @property
    def uri(self) -> str:
        """The folder's path."""
        return str(self.folder)

    @property
    def partial_listing_note(self) -> str:
        """Empty: a folder is always listed whole."""
        return ""

    def has(self, name: str) -> bool:
        """Whether the folder has this file."""
        return stat.S_ISREG(mode_of(self.folder / name))

    def has_folder(self, folder: str) -> bool:
        """Whether the folder has this folder."""
        return stat.S_ISDIR(mode_of(self.folder / folder))

    def files(self, folder: str) -> list[str]:
        """The names of the files in a folder."""
        try:
            with os.scandir(self.folder / folder) as entries:
                return sorted(e.name for e in islice(entries, _MAX_LISTED) if stat.S_ISREG(mode_of(Path(e.path))))
        except OSError:
            return []

    def fetch(self, names: Iterable[str]) -> list[Path]:
        """The paths of files, which are there already."""
        return [self.folder / name for name in names]


@dataclass(frozen=True)
class Source:
    """A folder of a tree, or one file in it.

    Attributes:
        folder: its path from the tree's top, empty for the top.
        file: a file's name in the folder, where one file is meant.
    """

    tree: Tree
    folder: str = ""
    file: str | None = None

    @property
    def uri(self) -> str:
        """The tree's URI with folder and file."""
        return "/".join(part for part in (self.tree.uri, self.folder, self.file) if part)

    @property
    def location(self) -> str:
        """`uri`, for messages of what is not there."""
        return f"{self.uri}{self.tree.partial_listing_note}"

    @property
    def beside(self) -> "Source":
        """The folder that a file is in; a folder itself."""
        return Source(self.tree, self.folder)

    def sub(self, folder: str) -> "Source":
        """The source of a folder in this one."""
        return Source(self.tree, f"{self.folder}/{folder}" if self.folder else folder)

    def has(self, name: str) -> bool:
        """Whether this source has the file."""
        return self.tree.has(self._full(name))

    def files(self) -> list[str]:
        """The names of the files in the folder."""
        return self.tree.files(self.folder)

    def get(self, *names: str) -> list[Path]:
        """These files of the folder, on this machine.

        Raises:
            UserError: there is none of that name, or it cannot be fetched.
        """
        for name in names:
            if not self.has(name):
                raise UserError(f"there is no {printable(name)} in {printable(self.location)}")
        return self.tree.fetch([self._full(name) for name in names])

    def local(self, needed: Iterable[str]) -> Path:
        """The folder on this machine with at least these of its files, where it has them."""
        names = [name for name in needed if self.has(name)]
        return self.get(*names)[0].parent if names else Path(self.uri)

    def has_variant(self, variant: str, library: Library = "diffusers") -> bool:
        """Whether the folder has weights of this variant, whole or not."""
        try:
            return choose_weights(self.files(), variant, library) is not None
        except UserError:
            return True

    def weights(self, variant: str | None = None, library: Library = "diffusers") -> tuple[Path, ...]:
        """The files of the module's weights: one, or its shards, safetensors before pickles.

        Args:
            variant: as diffusers takes it: `fp16` for `….fp16.safetensors`.
            library: whose module it is.

        Raises:
            UserError: there are none, one is missing, or there are two sets.
        """
        if self.file:
            return tuple(self.get(self.file))
        own = self.files()
        try:
            chosen = choose_weights(own, variant, library)
        except UserError as e:
            raise UserError(f"{printable(self.location)}: {e}") from None
        if chosen is not None:
            names = chosen.files(lambda name: self.get(name)[0], printable(self.location))
            return tuple(self.get(*names))
        there = [name for name in own if name.endswith(SUFFIXES)]
        what = f"weights of variant {variant!r}" if variant else "weights"
        listed = ", ".join(printable(name, 80) for name in there[:8]) + (", …" if len(there) > 8 else "")
        instead = f", only {listed}: choose with --variant" if there else ": check that it is whole"
        raise UserError(f"there are no {what} in {printable(self.location)}{instead}")

    def _full(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


class Finder:
    """Finds sources. The list of files of a repository is fetched once."""

    def __init__(self) -> None:
        self._hub: dict[tuple[str, str], HubTree] = {}

    def find(self, text: str | Path) -> Source:
        """What a user's text names; nothing but a list of files is asked of the hub.

        Raises:
            UserError: there is no such thing, or the hub cannot tell.
        """
        shown = printable(repr(str(text)), 120)
        try:
            path = Path(text).expanduser()
        except RuntimeError:  # a user that is not there
            raise UserError(f"there is no home folder for {shown}: write the folder's whole path") from None
        kind = _kind(path, shown) if str(text) else 0
        if stat.S_ISREG(kind):
            return Source(LocalTree(path.parent), "", path.name)
        if stat.S_ISDIR(kind):
            return Source(LocalTree(path))
        if kind:
            raise UserError(f"{shown} is neither a folder nor a regular file: give one")
        match = _HUB.fullmatch(str(text))
        if match is None and str(text).startswith(("http://", "https://")):
            raise UserError(
                f"{shown} is a web address: write owner/name, or owner/name@revision/path for what is in it"
            )
        if match is None:
            raise UserError(f"there is no {shown}: give a local folder or file, or a hub repository (owner/name)")
        tree = self._tree(match["repo"], match["revision"] or "main")
        inside = str(PurePosixPath(match["inside"])) if match["inside"] else ""
        if not inside:
            return Source(tree)
        if tree.has(inside):
            folder, _, file = inside.rpartition("/")
            return Source(tree, folder, file)
        if not tree.has_folder(inside):
            at = f"the hub's {tree.repo}"
            raise UserError(
                f"{at} has no file or folder {inside!r}{tree.partial_listing_note}: look at its list of files"
            )
        return Source(tree, inside)

    def _tree(self, repo: str, revision: str) -> HubTree:
        if not found("huggingface_hub"):
            raise UserError(
                needs(f"there is no {printable(repo)!r} here, and the hub", "huggingface_hub", *EXPORT_MODULES)
            )
        return self._hub.setdefault((repo, revision), HubTree(repo, revision))


def mode_of(path: Path) -> int:
    """The mode of what is at a path, links followed; 0 where there is nothing, or it cannot be looked at."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _kind(path: Path, shown: str) -> int:
    """The mode of what is at a path; 0 where there is nothing.

    Raises:
        UserError: it cannot be looked at.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a character that no path has
        return 0
    except OSError as e:
        # A name of the hub may be too long for a file.
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL):
            return 0
        raise UserError(f"cannot look at {shown}: {e.strerror or e}") from None
