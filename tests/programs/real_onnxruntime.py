"""The real onnxruntime-gpu without CUDA's libraries; run by tests/runtime/backends/test_onnxruntime_gpu.py.

The first argument names the function, the others are its own.
"""

import json
import sys
from pathlib import Path

import onnxruntime
from cnpp_trt.runtime.backends.onnxruntime_cuda import cuda_version, missing_libraries, preload


def libraries() -> None:
    """Prints CUDA's version, the providers, and the libraries that cannot be loaded before and after preloading."""
    before = missing_libraries(onnxruntime)
    preload(onnxruntime)  # prints nothing
    after = missing_libraries(onnxruntime)
    print(json.dumps([cuda_version(onnxruntime), onnxruntime.get_available_providers(), before, after]))


def refused(bundle: str) -> None:
    """Prints why the backend does not open."""
    from cnpp_trt.bundles.bundle import Bundle
    from cnpp_trt.errors import BackendError
    from cnpp_trt.runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda
    from simulator import Simulator

    Simulator()
    try:
        OnnxRuntimeCuda(Bundle.open(Path(bundle)))
    except BackendError as e:
        print(e)
        return
    raise AssertionError("it opened")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
