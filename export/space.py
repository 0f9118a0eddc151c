"""Room on a disk, and how amounts of it are written."""

import shutil
from pathlib import Path

from ..errors import UserError


def require_space(folder: Path, nbytes: int, advice: str) -> int:
    """The bytes that are free on the disk of a folder, which need not be there yet.

    Raises:
        UserError: fewer than `nbytes` are.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(f"{amount(nbytes)} do not fit on the disk of {folder}, {amount(free)} are free: {advice}")
    return free


def amount(nbytes: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"
