"""Wheels that tests read and do not install, unpacked in the folder of fixture_cache.py; each is downloaded once.

    PYTHONPATH=tests python tests/wheels.py onnxruntime-gpu==1.31.1

downloads one that is too large for a test to download unasked.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from cnpp_trt.files import new_partial_folder, remove_folder
from filelock import FileLock
from fixture_cache import cache_folder


class Unavailable(Exception):
    """A wheel cannot be had here, and why."""


def fetch(requirement: str, *, download: bool = True) -> Path:
    """The folder of an unpacked wheel.

    Args:
        requirement: as in `name==1.0`.
        download: where it is not there yet.

    Raises:
        Unavailable: it is not there, or cannot be downloaded.
    """
    root = cache_folder() / ".wheels"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{requirement.replace('==', '-')}-cp{sys.version_info.major}{sys.version_info.minor}"
    with FileLock(root / f".{folder.name}.lock"):
        if not folder.is_dir():
            if not download:
                raise Unavailable(f"needs a download: `PYTHONPATH=tests python tests/wheels.py {requirement}`")
            partial = new_partial_folder(folder)
            try:
                _download(requirement, partial)
                partial.rename(folder)
            finally:
                remove_folder(partial)
    return folder


def _download(requirement: str, folder: Path) -> None:
    line = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--timeout", "20"]
    line += ["--retries", "1", "--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        ended = subprocess.run(line, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{requirement} was not downloaded in 300 s") from None
    if ended.returncode:
        last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
        raise Unavailable(f"{requirement} cannot be downloaded: {' '.join(last)}")
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    wheel.unlink()


if __name__ == "__main__":
    print(fetch(sys.argv[1]))
