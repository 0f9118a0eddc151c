"""Pages of mapped files that a process has read and needs no more."""

import ctypes
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

_MADV_DONTNEED = 4
_SECONDS_BETWEEN = 0.05

_Range = tuple[int, int]


@contextmanager
def dropping_pages(arrays: Sequence[NDArray[Any]]) -> Iterator[None]:
    """While this lasts, what is read of the mapped files that hold these arrays leaves the memory soon after.

    Of shared mappings that only read (madvise(2), MADV_DONTNEED): who reads such a page later gets it again from the
    file, or from the system's cache of it. Arrays that are elsewhere do not count. On Linux alone; on other systems
    nothing happens.

    Args:
        arrays: keep their mappings alive, so that no address can become another thing's meanwhile.
    """
    ranges = _mappings([array.ctypes.data for array in arrays]) if sys.platform == "linux" else []
    if not ranges:
        yield
        return
    ended = threading.Event()

    def drop() -> None:
        while not ended.wait(_SECONDS_BETWEEN):
            _drop(ranges)

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _drop(ranges)


def _mappings(addresses: Sequence[int]) -> list[_Range]:
    """The shared mappings of files that only read and have one of these addresses."""
    lines: list[str] = []
    with suppress(OSError):  # no /proc
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    found = []
    for line in lines:
        # proc(5): address perms offset dev inode pathname
        where, permissions, _, _, inode = line.split(maxsplit=5)[:5]
        start, end = (int(part, 16) for part in where.split("-"))
        reads_alone = permissions.startswith("r-") and permissions.endswith("s") and inode != "0"
        if reads_alone and any(start <= address < end for address in addresses):
            found.append((start, end))
    return found


def _drop(ranges: Sequence[_Range]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in ranges:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
