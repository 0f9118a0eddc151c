"""The version of this package, and of the packages that are installed beside it."""

from collections.abc import Iterable

__version__ = "0.2.0"

RUNTIME_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
"""What the pixels of an image depend on beside this package."""

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "cuda-core",
    "openvino",
    "polygraphy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "tokenizers",
    "opencv-python-headless",
    "pillow",
)
"""What a report of an error or a measurement names."""


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed, by name."""
    # Not at the top: every command imports this module before it watches for signals, and this takes 60 ms.
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
