"""Files and folders on disk: digests, whole replacements, locks."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError
from .messages import one_line, printable


class Busy(Exception):
    """Another process holds a lock."""


PARTIAL = ".partial-"
"""Between a file's or folder's name and a random ending: what is still being written beside it."""
PROGRESS = ".progress.json"
"""In a partial folder: which files of it are whole, for the next process that goes on with it."""

# What this process is writing and has not finished.
_unfinished: set[Path] = set()


def remove_unfinished() -> None:
    """Deletes the partial files, partial folders and lock files of this process, which is about to end at once.

    A partial folder with a record of its progress stays: its next writer goes on with what is whole.
    """
    for path in list(_unfinished):
        if path.is_dir():
            if not (path / PROGRESS).exists():
                remove_folder(path)
        else:
            with suppress(OSError):
                path.unlink()


def hidden(name: str, ending: str) -> str:
    """The name of a hidden file or folder beside the one called `name`, which may be as long as names can be."""
    encoded = os.fsencode(name)
    if len(encoded) > 150:
        # Two names that begin alike must not share what is hidden.
        name = f"{encoded[:120].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"
    return f".{name}{ending}"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; empty where it cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return ""


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file whole or leaves it as it was: into a new file beside it that then takes its name.

    The new file's name cannot be guessed, its mode follows the process's umask. The folder must be there.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as f:
        f.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """As `replace_file`, for what is written in parts: the new file takes its name when the block ends well.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(hidden(path.name, f"{PARTIAL}{secrets.token_hex(8)}"))
    _unfinished.add(partial)
    try:
        with partial.open("xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        _unfinished.discard(partial)


def require_writable(folder: Path, option: str = "--out") -> None:
    """Finds out whether files can be made in `folder`, which need not exist, before the work whose results go there.

    A file is made and removed in the nearest folder that exists; nothing else changes.

    Args:
        option: what chooses another folder, for the message.

    Raises:
        UserError: `folder` or what it would be made in is no folder, or nothing can be written there.
    """
    try:
        there = _nearest(folder.absolute())
        reason = "" if there.is_dir() else f"{printable(there)} is no folder"
        if not reason:
            probe = there / f"{PARTIAL}{secrets.token_hex(8)}"
            with probe.open("xb"):
                pass
            probe.unlink()
    except (OSError, ValueError) as e:
        reason = _why(e)
    if reason:
        raise UserError(f"cannot write to {printable(folder)} ({reason}): choose another {option}")


def require_writable_file(file: Path, option: str = "--out") -> None:
    """As `require_writable`, for a file that will be written or replaced.

    Raises:
        UserError: the file is something else (a folder, a device), or cannot be written.
    """
    require_writable(file.parent, option)
    try:
        reason = "" if _nearest(file.absolute()) != file.absolute() or file.is_file() else "it is no file"
    except (OSError, ValueError) as e:
        reason = _why(e)
    if reason:
        raise UserError(f"cannot write {printable(file)} ({reason}): choose another {option}")


def _nearest(path: Path) -> Path:
    """The longest beginning of an absolute path that exists.

    Raises:
        OSError, ValueError: the path cannot be looked at.
    """
    while True:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path


def _why(error: OSError | ValueError) -> str:
    """ValueError is what Python makes of a NUL character and of half of a surrogate pair in a path."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def new_partial_folder(folder: Path) -> Path:
    """A new empty folder beside `folder`, hidden, with a name that cannot be guessed and the mode that the umask gives.

    Raises:
        OSError: the folder cannot be made.
    """
    partial = folder.with_name(hidden(folder.name, f"{PARTIAL}{secrets.token_hex(8)}"))
    _unfinished.add(partial)
    partial.mkdir()
    return partial


def partial_folders(folder: Path) -> list[Path]:
    """What `new_partial_folder` made for `folder` and a killed process left, whatever characters its name has."""
    start = hidden(folder.name, PARTIAL)
    try:
        return [p for p in folder.parent.iterdir() if p.name.startswith(start) and p.is_dir() and not p.is_symlink()]
    except OSError:
        return []


def remove_folder(folder: Path) -> None:
    """Deletes a folder; what cannot be deleted stays."""
    shutil.rmtree(folder, ignore_errors=True)
    _unfinished.discard(folder)


@contextmanager
def exclusive(lock: Path, folder: Path, wait: bool = True, option: str = "--out") -> Iterator[None]:
    """Whoever holds the lock file is alone in writing `folder`: others wait. The lock file goes with its last holder.

    Raises:
        UserError: the disk is full or cannot be written.
        Busy: another holds it and `wait` is False.
    """
    from filelock import FileLock, Timeout

    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=-1 if wait else 0):
            _unfinished.add(lock)
            try:
                yield
            finally:
                # While it is held: whoever waits for the file that is gone notices, and makes a new one.
                lock.unlink(missing_ok=True)
                _unfinished.discard(lock)
    except Timeout:
        raise Busy(f"another process writes {folder}") from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left for {folder}: free some, or choose another {option}") from e
        raise UserError(f"cannot write {e.filename or folder} ({e.strerror or e}): choose another {option}") from e
