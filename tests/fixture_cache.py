"""Bundles that fixtures export, kept from session to session: the slowest thing that tests do, and the same each time.

The cache is outside the checkout (`CNPP_TRT_TEST_CACHE`, by default in the user's cache folder) and safe to delete. An
entry is found by everything that an export depends on: the code, the embedded model's weights, the packages' versions.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType

import cnpp_trt
from cnpp_trt.files import new_partial_folder, partial_folders, remove_folder
from filelock import FileLock
from platformdirs import user_cache_path

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
_CODE = ("*.py", "bundles/*.py", "export/**/*.py", "miniature/**/*", "developer/random_models/**/*.py")
# What an export does not depend on.
_OTHER_CODE = {
    f"{name}.py" for name in ("__main__", "cli", "doctor", "gpu", "install", "interrupts", "places", "telemetry")
}
_KEPT = 60


def cache_folder() -> Path:
    """Where exports are kept, and what tests download."""
    return Path(os.environ.get("CNPP_TRT_TEST_CACHE") or user_cache_path("cnpp-trt-tests", appauthor=False))


def exported(name: str, out: Path, make: Callable[[Path], object]) -> Path:
    """The folder `out`, as `make(out)` writes it; copied from an earlier session where nothing has changed since.

    Processes that need the same entry at the same time make it once: the others wait for the first.

    Args:
        name: says everything that `make` takes from outside itself: one name, one content.
        out: must not exist.
        make: its own instructions are part of the key.
    """
    root = cache_folder()
    entry = root / f"{name}-{code_key(instructions(make.__code__))}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if not entry.is_dir():
            for left in partial_folders(entry):
                remove_folder(left)
            partial = new_partial_folder(entry)
            try:
                make(partial / "made")
                (partial / "made").rename(entry)
            finally:
                remove_folder(partial)
        entry.touch()
    forget_old(root, _KEPT)
    return Path(shutil.copytree(entry, out))


def forget_old(root: Path, kept: int) -> None:
    """Deletes the entries of a folder but for those that were used last."""
    entries = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(entries, key=lambda p: p.stat().st_mtime, reverse=True)[kept:]:
        remove_folder(old)


def instructions(code: CodeType) -> str:
    """What a function does, without where it is written: the same in every file and session."""
    constants = [instructions(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


@cache
def code_key(instructions: str) -> str:
    """What an export of these instructions depends on besides its checkpoint: code and packages."""
    digest = hashlib.sha256(f"{platform.python_version()}\n{instructions}\n".encode())
    for package in _PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    root = Path(cnpp_trt.__file__).parent
    for file in sorted({file for pattern in _CODE for file in root.glob(pattern) if file.is_file()}):
        # What Python compiled is another file in each checkout, and there only after the first run.
        if file.relative_to(root).as_posix() not in _OTHER_CODE and file.parent.name != "__pycache__":
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:20]
