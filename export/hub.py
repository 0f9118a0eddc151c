"""A repository of the Hugging Face hub at a revision, and what is told where it cannot be had."""

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..messages import one_line
from .space import amount, require_space

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubTree:
    """A repository at a revision. Its list of files comes from the hub, or else from what its cache holds."""

    repo: str
    revision: str

    @property
    def uri(self) -> str:
        """The repository with its commit."""
        return f"{self.repo}@{self._listing.commit}"

    def has(self, name: str) -> bool:
        """Whether the repository has this file."""
        return name in self._listing.sizes

    def has_folder(self, folder: str) -> bool:
        """Whether the repository has this folder."""
        return any(name.startswith(f"{folder}/") for name in self._listing.sizes)

    def files(self, folder: str) -> list[str]:
        """The names of the files in a folder."""
        top = f"{folder}/" if folder else ""
        own = [name.removeprefix(top) for name in self._listing.sizes if name.startswith(top)]
        return sorted(name for name in own if "/" not in name)

    @property
    def partial_listing_note(self) -> str:
        """A note where the listing is only what the cache has; else empty."""
        return "" if self._listing.complete else " (in the hub's cache; the hub itself was not asked, or not reached)"

    def fetch(self, names: Iterable[str]) -> list[Path]:
        """Downloads what the cache lacks and returns the paths of all."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        wanted, listing = list(names), self._listing
        absent = [
            n for n in wanted if not isinstance(try_to_load_from_cache(self.repo, n, revision=listing.commit), str)
        ]
        size = sum(listing.sizes[name] or 0 for name in absent)
        if size > 1 << 20:
            logger.info(f"downloading {amount(size)} of {self.repo} into {HF_HUB_CACHE}")
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
            except (
                RepositoryNotFoundError,
                RevisionNotFoundError,
            ):  # a definitive answer: no fall back to the cache
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
                f"({one_line(e, 120)}): check the network, or give a local folder"
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


def _cache_of(repo: str) -> Path:
    """Where the hub's cache keeps a repository: `refs/<branch>` names a commit, `snapshots/<commit>` has its files."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _transport_error() -> Any:
    """The base class of everything that huggingface_hub's HTTP client raises where there is no answer."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]
