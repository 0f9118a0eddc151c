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
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ..errors import UserError

Report = Callable[[str], None]

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<inside>.+?))?/?")
# The endings of files of weights, the safe format first.
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pth", ".pt")
# What diffusers and transformers call a module's weights.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class Tree(Protocol):
    """Files below one folder, some of which may still have to be fetched."""

    @property
    def origin(self) -> str:
        """What it is, for people and for a bundle's manifest."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Every file, by its path from the top, with slashes."""
        ...

    @property
    def caveat(self) -> str:
        """What a message says where a file is not there, but only a part of the tree could be looked at."""
        ...

    def fetch(self, names: Iterable[str]) -> list[Path]:
        """These files on this machine.

        Raises: UserError where one cannot be had.
        """
        ...


@dataclass(frozen=True)
class LocalTree:
    folder: Path

    @property
    def origin(self) -> str:
        return str(self.folder)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    @property
    def caveat(self) -> str:
        return ""

    def fetch(self, names: Iterable[str]) -> list[Path]:
        return [self.folder / name for name in names]


@dataclass(frozen=True)
class HubTree:
    """A repository at a revision. Its list of files comes from the hub, or else from what its cache holds."""

    repo: str
    revision: str
    report: Report = field(compare=False)

    @property
    def origin(self) -> str:
        return f"{self.repo}@{self._listing.commit}"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._listing.sizes)

    @property
    def caveat(self) -> str:
        return "" if self._listing.complete else " (in the hub's cache; the hub itself was not asked, or not reached)"

    def fetch(self, names: Iterable[str]) -> list[Path]:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        wanted, listing = list(names), self._listing
        absent = [
            n for n in wanted if not isinstance(try_to_load_from_cache(self.repo, n, revision=listing.commit), str)
        ]
        size = sum(listing.sizes[name] or 0 for name in absent)
        if size > 1 << 20:
            self.report(f"downloading {amount(size)} of {self.repo} into {HF_HUB_CACHE}")
            require_space(Path(HF_HUB_CACHE), size, "set HF_HOME to a larger disk")
        with self._errors():
            paths = [Path(hf_hub_download(self.repo, name, revision=listing.commit)) for name in wanted]
            ref = _cache_of(self.repo) / "refs" / self.revision
            if absent and self.revision != listing.commit:
                # A download by commit leaves no trace of the branch or tag, which is looked for without a network.
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(listing.commit)
        return paths

    @cached_property
    def _listing(self) -> "_Listing":
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        with self._errors():
            try:
                info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
            except (RepositoryNotFoundError, RevisionNotFoundError):  # the hub has spoken
                raise
            except (HfHubHTTPError, OSError, ValueError, _transport_error()):
                # It cannot be reached, or must not be: what it gave before still serves.
                if (cached := self._cached()) is None:
                    raise
                return cached
        return _Listing(info.sha or self.revision, {f.rfilename: f.size for f in info.siblings or ()})

    def _cached(self) -> "_Listing | None":
        root = _cache_of(self.repo)
        ref = root / "refs" / self.revision
        commit = ref.read_text("utf-8").strip() if ref.is_file() else self.revision
        snapshot = root / "snapshots" / commit
        if not snapshot.is_dir():
            return None
        files = {p.relative_to(snapshot).as_posix(): None for p in snapshot.rglob("*") if p.is_file()}
        return _Listing(commit, files, complete=False)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub import errors

        repo, at = self.repo, f"the hub's {self.repo}"
        try:
            yield
        except errors.GatedRepoError:
            raise UserError(
                f"{at} is gated: accept its terms on https://huggingface.co/{repo}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        except errors.RepositoryNotFoundError:
            raise UserError(
                f"there is no {repo}: no such folder or file here, and no such repository on the hub "
                "(for a private one log in with `hf auth login` or set HF_TOKEN)"
            ) from None
        except errors.RevisionNotFoundError:
            raise UserError(f"{at} has no revision {self.revision!r}: check its branches and tags") from None
        except errors.OfflineModeIsEnabled:
            raise UserError(
                f"{repo} is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it: unset it, or give a "
                "local folder"
            ) from None
        except errors.HfHubHTTPError as e:
            status = e.response.status_code if e.response is not None else "an error"
            if status in (401, 403):
                raise UserError(
                    f"{at} is refused to you ({status}): log in again with `hf auth login`, or set HF_TOKEN to a token "
                    "that is valid"
                ) from None
            raise UserError(f"the hub answered {status} for {repo}: try again later, or give a local folder") from None
        except (OSError, _transport_error()) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"no space left to download {repo}: set HF_HOME to a larger disk") from None
            raise UserError(
                f"{repo} is no local folder or file, is not in the hub's cache, and the hub cannot be reached "
                f"({_line(e)}): check the network, or give a local folder"
            ) from None
        except errors.HFValidationError:
            raise UserError(f"there is no {repo}: no such folder or file here, and no name of a repository") from None
        except ValueError:  # a page where JSON should be
            raise UserError(
                f"what answered for {repo} is not the hub: log in to the network first, or check HF_ENDPOINT"
            ) from None


@dataclass(frozen=True)
class _Listing:
    """A commit with its files; sizes in bytes where they are known.

    Attributes:
        complete: it is the hub's; else that of a cache, which may hold a part.
    """

    commit: str
    sizes: Mapping[str, int | None]
    complete: bool = True


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
    def origin(self) -> str:
        return "/".join(part for part in (self.tree.origin, self.folder, self.file) if part)

    @property
    def where(self) -> str:
        """`origin`, for messages of what is not there."""
        return f"{self.origin}{self.tree.caveat}"

    def sub(self, folder: str) -> "Source":
        return Source(self.tree, f"{self.folder}/{folder}" if self.folder else folder)

    def has(self, name: str) -> bool:
        return self._full(name) in self.tree.names

    def get(self, *names: str) -> list[Path]:
        """These files of the folder, on this machine.

        Raises: UserError where there is none of that name, or it cannot be fetched.
        """
        for name in names:
            if not self.has(name):
                raise UserError(f"there is no {name} in {self.where}")
        return self.tree.fetch([self._full(name) for name in names])

    def local(self, needed: Iterable[str]) -> Path:
        """The folder on this machine with at least these of its files, where it has them."""
        names = [name for name in needed if self.has(name)]
        return self.get(*names)[0].parent if names else Path(self.origin)

    def weights(self, variant: str | None = None) -> tuple[Path, ...]:
        """The files of the module's weights: one, or its shards, safetensors before pickles.

        Args:
            variant: as diffusers takes it: `fp16` for `….fp16.safetensors`.
        Raises: UserError where there are none; it says which there are.
        """
        if self.file:
            return tuple(self.get(self.file))
        own = sorted(name.removeprefix(self._full("")) for name in self.tree.names if name.startswith(self._full("")))
        own = [name for name in own if "/" not in name]
        tag = re.escape(f".{variant}") if variant else ""
        for suffix in SUFFIXES[:2]:
            for stem in _STEMS:
                shard = re.compile(rf"{stem}(?:{tag})?(?:-\d{{5}}-of-\d{{5}})?(?:{tag})?{re.escape(suffix)}")
                found = [name for name in own if shard.fullmatch(name) and (not variant or f".{variant}" in name)]
                if found:
                    return tuple(self.get(*found))
        there = [name for name in own if name.endswith(SUFFIXES)]
        what = f"weights of variant {variant!r}" if variant else "weights"
        instead = f", only {', '.join(there)}: choose with --variant" if there else ": check that it is whole"
        raise UserError(f"there are no {what} in {self.where}{instead}")

    def _full(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


class Finder:
    """Finds sources. A repository is asked once for its list of files.

    Args:
        report: is told what is downloaded.
    """

    def __init__(self, report: Report = lambda line: None) -> None:
        self._report = report
        self._hub: dict[tuple[str, str], HubTree] = {}

    def find(self, text: str | Path) -> Source:
        """What a user's text names; nothing but a list of files is asked of the hub.

        Raises: UserError where there is no such thing, or the hub cannot tell.
        """
        path = Path(text).expanduser()
        if path.is_file():
            return Source(LocalTree(path.parent), "", path.name)
        if path.is_dir() and str(text):
            return Source(LocalTree(path))
        match = _HUB.fullmatch(str(text))
        if match is None and str(text).startswith(("http://", "https://")):
            raise UserError(f"{text} is a web address: write owner/name, or owner/name@revision/path for what is in it")
        if match is None:
            raise UserError(f"there is no {str(text)!r}: give a local folder or file, or a hub repository (owner/name)")
        tree = self._tree(match["repo"], match["revision"] or "main")
        inside = str(PurePosixPath(match["inside"])) if match["inside"] else ""
        if not inside:
            return Source(tree)
        if inside in tree.names:
            folder, _, file = inside.rpartition("/")
            return Source(tree, folder, file)
        if not any(name.startswith(f"{inside}/") for name in tree.names):
            at = f"the hub's {tree.repo}"
            raise UserError(f"{at} has no file or folder {inside!r}{tree.caveat}: look at its list of files")
        return Source(tree, inside)

    def _tree(self, repo: str, revision: str) -> HubTree:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise UserError(
                f"there is no {repo!r} here, and the hub needs huggingface_hub: pip install 'cnpp-trt[export,cpu]'"
            )
        return self._hub.setdefault((repo, revision), HubTree(repo, revision, self._report))


def require_space(folder: Path, nbytes: int, advice: str) -> int:
    """The bytes that are free on the disk of a folder, which need not be there yet.

    Raises: UserError where fewer than `nbytes` are.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(f"{amount(nbytes)} do not fit on the disk of {folder}, {amount(free)} are free: {advice}")
    return free


def amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def _cache_of(repo: str) -> Path:
    """Where the hub's cache keeps a repository: `refs/<branch>` names a commit, `snapshots/<commit>` has its files."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _transport_error() -> Any:
    """The base class of everything that huggingface_hub's HTTP client raises where there is no answer."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
