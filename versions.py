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


_OF_PARTS = ("tensorrt", "tensorrt-rtx")

CUDA_MAJORS = range(12, 20)
"""The versions of CUDA that parts of TensorRT may be named after, as in `tensorrt-cu12-bindings`."""


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed, by name.

    TensorRT's are those of its bindings, which say the same when they are imported: `pip install tensorrt-cu12`
    installs no package `tensorrt`.
    """
    # Not at the top: every command imports this module before it watches for signals, and this takes 60 ms.
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        parts = [f"{package}-cu{major}-bindings" for major in CUDA_MAJORS] if package in _OF_PARTS else []
        for name in (*parts, package):
            try:
                found[package] = version(name)
            except PackageNotFoundError:
                continue
            break
    return found
