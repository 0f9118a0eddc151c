"""Imported by Python itself when it starts, where this folder is on the path: a stage's process meets a simulated GPU.

TensorRT-RTX is the stand-in that ONNX Runtime computes for, and CONTACT_FAULT names what is broken.
"""

import os
import sys
import time
from typing import Any

if "cnpp_trt.benchmarks.first_contact.child" in sys.orig_argv:
    import cnpp_trt.engines.builder as builder
    import cuda.bindings.driver as driver
    import fake_tensorrt
    import numpy as np
    from cnpp_trt.engines.fusion import FusionReport
    from cnpp_trt.engines.plan import BuildResult
    from cnpp_trt.errors import BackendError
    from cnpp_trt.runtime.backends.cuda import Cuda
    from cnpp_trt.runtime.pipeline import Pipeline

    fault = os.environ.get("CONTACT_FAULT", "")
    stage = sys.orig_argv[sys.orig_argv.index("cnpp_trt.benchmarks.first_contact.child") + 1]
    if stage == "full size":
        import graph_cache

        graph_cache.install()
    fake_tensorrt.install()
    module: Any = sys.modules["tensorrt_rtx"]
    module.Builder = lambda log: object()

    def build_plan(flavor: Any, onnx: Any, *_: Any, **__: Any) -> BuildResult:
        if fault == "build" and onnx.stem == "unet":
            raise BackendError("tensorrt-rtx 1.7.1.116 cannot build unet.onnx: no tactic")
        fusion = FusionReport(1, 0, 0, 0, 0, 0, 0, ())
        return BuildResult(str(onnx).encode(), fusion, 0.0, fake_tensorrt.WEIGHTS, fake_tensorrt.SCRATCH, None, 0)

    builder.build_plan = build_plan
    import cnpp_trt.benchmarks.first_contact.full_size_stage as full_size_stage  # which takes the builder's function

    full_size_stage._MODEL = (*full_size_stage._MODEL, "--tiny")
    record = Cuda.record

    def refuse(*_: Any) -> Any:
        raise BackendError("CUDA failed in end_building: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def empty(self: Any, launches: Any) -> Any:
        record(self, launches)
        return lambda: None

    def nothing(log: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    call = Pipeline.__call__

    def leaking(self: Any, *arguments: Any, **fields: Any) -> Any:
        with self.backend.active():
            driver.cuMemAlloc(1 << 20)
        return call(self, *arguments, **fields)

    if fault == "capture":
        Cuda.record = refuse  # type: ignore
    elif fault == "replay":
        Cuda.record = empty  # type: ignore[method-assign]
    elif fault == "copy":
        Cuda.copy = lambda self, source, target: None  # type: ignore[method-assign]
    elif fault == "runtime":
        module.Runtime = nothing
    elif fault == "load":
        fake_tensorrt.Runtime.deserialize_cuda_engine = lambda self, plan: None
    elif fault == "kernel":
        fake_tensorrt.poison["unet"] = lambda name, value: value + np.float16(1)
    elif fault == "leak":
        Pipeline.__call__ = leaking  # type: ignore[method-assign]
    elif fault == "crash":
        os.abort()
    elif fault == "hang":
        time.sleep(600)
