"""What a shared library of Linux is linked against, read from its file: loading it to find out has effects."""

import mmap
import struct
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_END, _NEEDED, _NAMES = 0, 1, 5  # kinds of entries of the dynamic segment


def linked_libraries(path: Path) -> list[str]:
    """The names that the dynamic linker looks for, as in `libcublas.so.13`.

    Returns:
        Nothing where the file cannot be read, or is no library of a 64-bit little-endian machine.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _linked(content)
    except (OSError, OverflowError, ValueError, struct.error):  # ValueError: an empty file
        return []


def _linked(content: mmap.mmap) -> list[str]:
    if content[:6] != b"\x7fELF\x02\x01":
        return []
    [table] = struct.unpack_from("<Q", content, 32)
    width, count = struct.unpack_from("<HH", content, 54)
    # Of each: its kind, where it is in the file and, when loaded, in memory, and its size in the file.
    segments = [struct.unpack_from("<I4xQQ8xQ", content, table + i * width) for i in range(count)]
    entries: list[tuple[int, int]] = []
    for kind, offset, _, size in segments:
        if kind == _DYNAMIC:
            entries += struct.iter_unpack("<qQ", content[offset : offset + size // 16 * 16])
    ends = [i for i, (kind, _) in enumerate(entries) if kind == _END]
    entries = entries[: ends[0]] if ends else entries
    # Names are given by their place among all names, which are given by their address.
    addresses = [value for kind, value in entries if kind == _NAMES]
    starts = [
        address - memory + offset
        for address in addresses
        for kind, offset, memory, size in segments
        if kind == _LOAD and memory <= address < memory + size
    ]
    if not starts:
        return []
    names = [starts[0] + value for kind, value in entries if kind == _NEEDED]
    return [content[name : content.find(b"\0", name)].decode("utf-8", "replace") for name in names]
