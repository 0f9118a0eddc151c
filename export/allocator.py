"""What glibc's allocator keeps of freed memory, which matters where one process holds gigabytes of weights in turn."""

import ctypes
import gc
import sys
from typing import Any


def return_large_blocks() -> None:
    """Has glibc return freed blocks of 1 MiB and more to the system at once, for the rest of the process's life.

    glibc raises that limit up to 32 MiB as blocks are freed, and where modules were loaded and ONNX Runtime widens the
    weights of an fp16 graph one by one, over 1 GiB of gaps is left for SD 1.5's UNet. It cannot be undone, so only a
    process that was started to export calls it.
    """
    if set_option := _of_glibc("mallopt"):
        m_mmap_threshold = -3  # malloc.h
        set_option(m_mmap_threshold, 1 << 20)


def release_memory() -> None:
    """Frees what has no owner left, and returns the allocator's free pages to the system where it can be asked to."""
    gc.collect()
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of glibc's own; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
