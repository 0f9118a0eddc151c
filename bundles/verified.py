"""Which files of a bundle were read whole and found to be what the manifest says, so that they are hashed once.

A file is known by its size, its inode and its times of change: the system sets the last (ctime) whenever a file is
written, and no program can set it. What was hashed is remembered under `CNPP_TRT_HOME`, not in the bundle, which may be
on a disk that is read only. What cannot be remembered is hashed again.
"""

import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from ..errors import UserError
from ..files import replace_file, sha256_of
from ..places import home
from ..schema import Meta, Record, SchemaError, decode, read_bounded, to_json
from .manifest import FileName, FileRecord, Sha256

_MAX_BYTES = 4 << 20
_KEPT = 500
# File systems tell times to some milliseconds, or to 2 s: a file that changed just now may change again in one tick.
_SETTLED_NS = 2_500_000_000


class _Seen(Record, kw_only=True):
    """A file as it was when its digest was taken."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    sha256: Sha256


class _Memo(Record, kw_only=True):
    """The files of one bundle that were hashed."""

    format: Literal[1] = 1
    files: Annotated[dict[FileName, _Seen], Meta(max_length=5000)]


class Verified:
    """What is known of the files of the bundle at `folder`, in this process and from earlier ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, _Seen] | None = None

    def has(self, name: str, entry: FileRecord) -> bool:
        """Whether the file is the one that `entry` tells of: it is read, unless it was before and is the same since."""
        if self._seen is None:
            self._seen = self._load()
        found = _look(self._folder / name, entry["sha256"])
        if found is None or found.size != entry["size"]:
            return False
        if self._seen.get(name) == found:
            return True
        if sha256_of(self._folder / name) != entry["sha256"] or _look(self._folder / name, entry["sha256"]) != found:
            return False  # another file, or one that changed while it was read
        if abs(time.time_ns() - max(found.mtime_ns, found.ctime_ns)) > _SETTLED_NS:
            self._seen[name] = found
            self._save()
        return True

    @property
    def _memo(self) -> Path:
        place = os.fsencode(os.path.realpath(self._folder))
        return home() / "verified" / f"{hashlib.sha256(place).hexdigest()[:32]}.json"

    def _load(self) -> dict[str, _Seen]:
        try:
            return decode(read_bounded(self._memo, _MAX_BYTES), _Memo).files
        except (OSError, SchemaError, UserError):
            return {}

    def _save(self) -> None:
        """Adds what another process remembered meanwhile. The oldest memos of many bundles go."""
        with suppress(OSError, UserError):
            memo = self._memo
            memo.parent.mkdir(parents=True, exist_ok=True)
            replace_file(memo, to_json(_Memo(files={**self._load(), **(self._seen or {})}), None))
            for old in sorted(memo.parent.iterdir(), key=_modified, reverse=True)[_KEPT:]:
                old.unlink(missing_ok=True)


def _look(path: Path, sha256: str) -> _Seen | None:
    """What can be known of a regular file without reading it; None for anything else."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return _Seen(
        size=status.st_size,
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        sha256=sha256,
    )


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
