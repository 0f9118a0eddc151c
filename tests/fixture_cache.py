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

import cnpp_trt
from cnpp_trt.files import new_partial_folder, remove_folder
from platformdirs import user_cache_path

_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
_CODE = ("*.py", "bundles/*.py", "export/**/*.py", "miniature/**/*", "developer/random_models/**/*.py")
# What an export does not depend on.
_OTHER_CODE = {
    f"{name}.py" for name in ("__main__", "cli", "doctor", "gpu", "install", "interrupts", "places", "telemetry")
}
_KEPT = 40


def exported(name: str, out: Path, make: Callable[[Path], object]) -> Path:
    """The folder `out`, as `make(out)` writes it; copied from an earlier session where nothing has changed since.

    Args:
        name: says everything of the call that `make` itself does not: one name, one content.
    """
    root = Path(os.environ.get("CNPP_TRT_TEST_CACHE") or user_cache_path("cnpp-trt-tests", appauthor=False))
    entry = root / f"{name}-{_key()}"
    if not entry.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        partial = new_partial_folder(entry)
        try:
            make(partial / "made")
            if not entry.exists():
                (partial / "made").rename(entry)
        finally:
            remove_folder(partial)
        for old in sorted(root.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[_KEPT:]:
            remove_folder(old)
    entry.touch()
    return Path(shutil.copytree(entry, out))


@cache
def _key() -> str:
    digest = hashlib.sha256(platform.python_version().encode())
    for package in _PACKAGES:
        digest.update(f"{package} {version(package)}\n".encode())
    package = Path(cnpp_trt.__file__).parent
    for file in sorted({file for pattern in _CODE for file in package.glob(pattern) if file.is_file()}):
        if file.relative_to(package).as_posix() not in _OTHER_CODE:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:20]
