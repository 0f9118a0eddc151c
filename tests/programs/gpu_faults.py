"""What the backend `tensorrt` does where CUDA or TensorRT fail, on the simulated GPU.

Run by tests/runtime/backends/test_gpu_faults.py: the first argument names the function, the others are its own.
"""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings.driver as driver
import fake_tensorrt
import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import BackendError, DeviceMemoryError

gpu = fake_tensorrt.install()
fake: Any = fake_tensorrt  # whose parts are replaced by failing ones


def opened(bundle: str, plans: str, **options: Any) -> Pipeline:
    fake_tensorrt.make_plans(Bundle.open(bundle), Path(plans))
    return Pipeline.open(bundle, "tensorrt", plans=Path(plans), **options)


def request(pipeline: Pipeline, **fields: Any) -> Request:
    m = pipeline.bundle.manifest
    image = np.random.default_rng(0).integers(0, 256, (m.height, m.width, 3), np.uint8)
    return Request(
        **{"prompt": "a house", "seed": 1, "num_inference_steps": 2, "controls": Control("seg", image), **fields}
    )


def message(call: Any, kind: type[BackendError] = BackendError) -> str:
    try:
        call()
    except kind as e:
        assert "\n" not in str(e)
        return str(e)
    raise AssertionError("nothing was raised")


def factory(bundle: str, plans: str, how: str) -> None:
    """pybind11's factories raise TypeError where they give nullptr; others return None."""

    def runtime(log: Any) -> None:
        if how == "raises":
            raise TypeError("pybind11::init(): factory function returned nullptr")

    module: Any = sys.modules["tensorrt_rtx"]
    module.Runtime = runtime
    print(message(lambda: opened(bundle, plans)))
    pipeline = Pipeline.open(bundle, "auto", plans=Path(plans))
    assert pipeline.backend.name == "onnxruntime-cpu"
    print(pipeline.reason)


def auto_survives_anything(bundle: str, plans: str) -> None:
    """An exception that nobody foresaw is a reason to try the next backend, not the end."""

    def runtime(log: Any) -> None:
        raise ZeroDivisionError("in a vendor's library")

    module: Any = sys.modules["tensorrt_rtx"]
    module.Runtime = runtime
    fake_tensorrt.make_plans(Bundle.open(bundle), Path(plans))
    pipeline = Pipeline.open(bundle, "auto", plans=Path(plans))
    assert pipeline.backend.name == "onnxruntime-cpu"


def invalid_plan(bundle: str, plans: str, diagnostics: str) -> None:
    """As TensorRT-RTX's `get_engine_validity` answers on a GPU that the plan was not built for."""
    asked = []

    def validity(self: Any, header: bytes) -> tuple[int, int]:
        asked.append(len(header))
        return 2, int(diagnostics)

    module: Any = sys.modules["tensorrt_rtx"]
    module.EngineValidity = SimpleNamespace(VALID=0, SUBOPTIMAL=1, INVALID=2)
    module.EngineInvalidityDiagnostics = SimpleNamespace(VERSION_MISMATCH=1, UNSUPPORTED_CC=2, OLD_CUDA_DRIVER=4)
    fake.Runtime.engine_header_size = 64
    fake.Runtime.get_engine_validity = validity
    print(message(lambda: opened(bundle, plans)))
    assert asked and set(asked) <= set(range(1, 65))
    assert fake_tensorrt.loaded == []


def plan_that_does_not_load(bundle: str, plans: str) -> None:
    """The smallest plan shows when opening that this GPU cannot run it; auto goes on."""
    fake.Runtime.deserialize_cuda_engine = lambda self, plan: None
    print(message(lambda: opened(bundle, plans)))
    assert Pipeline.open(bundle, "auto", plans=Path(plans)).backend.name == "onnxruntime-cpu"


def callers_context(bundle: str, plans: str) -> None:
    """Whatever context the caller has current, here none, is so after each call, and after memory was freed."""
    pipeline = opened(bundle, plans)

    def unchanged() -> None:
        status, current = driver.cuCtxGetCurrent()
        assert status == driver.CUresult.CUDA_SUCCESS and int(current) == 0, (status, current)

    unchanged()
    for _ in range(2):  # launched one by one, then recorded
        pipeline(request(pipeline))
        unchanged()
    pipeline.memory_needed(request(pipeline))
    unchanged()
    pipeline.close()
    unchanged()
    del pipeline
    gc.collect()
    unchanged()
    live = gpu.live_objects()
    assert (live["pinned"], gpu.live_bytes()) == (0, 0), live


def after_a_sticky_error(bundle: str, plans: str) -> None:
    """After an illegal access nothing works any more in the process: that is said, once and for all."""
    pipeline = opened(bundle, plans)
    pipeline(request(pipeline))
    backend: Any = pipeline.backend
    with backend.active():
        assert gpu.launch(backend.stream, lambda: None, [(1 << 60, 64)]) != 0
    first = message(lambda: pipeline(request(pipeline, seed=2)))
    gpu.clear()
    second = message(lambda: pipeline(request(pipeline, seed=3)))
    print(first, second, sep="\n")
    assert gpu.trace() == []  # the driver is asked nothing more
    gpu.clear_error()


def after_a_fork(bundle: str, plans: str) -> None:
    pipeline = opened(bundle, plans)
    pipeline(request(pipeline))
    child = os.fork()
    if not child:
        try:
            print(message(lambda: pipeline(request(pipeline))), flush=True)
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def runtime_cache(bundle: str, plans: str, kind: str) -> None:
    """What was compiled is code: a file that is not what was written is not loaded, one of another driver replaced."""
    opened(bundle, plans, warm=True).close()
    caches = sorted(Path(plans).glob("*/runtime-*.cache"))
    good = {cache: cache.read_bytes() for cache in caches}
    assert caches
    if kind == "flipped":
        for cache, content in good.items():
            cache.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif kind == "cut":
        for cache in caches:
            cache.write_bytes(b"x")
    else:
        fake.Cache.deserialize = lambda self, data: False
    fake_tensorrt.compiled.clear()
    opened(bundle, plans, warm=True).close()
    assert fake_tensorrt.compiled == []
    assert {cache: cache.read_bytes() for cache in caches} == good


def memory_runs_out(bundle: str, plans: str, where: str) -> None:
    """TensorRT says so in its log: then something else may be evicted, which another error does not do."""
    pipeline = opened(bundle, plans)
    backend: Any = pipeline.backend

    def refuse(*arguments: Any) -> None:
        backend._log.log(1, "[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime (out of memory)")

    if where == "engine":
        fake.Runtime.deserialize_cuda_engine = refuse
    else:
        fake.Engine.create_execution_context = refuse
    assert "out of memory" in message(lambda: pipeline(request(pipeline)), DeviceMemoryError)


def nothing_made(bundle: str, plans: str, what: str) -> None:
    """Where TensorRT makes no runtime configuration or cache, it gives None as it does elsewhere."""
    pipeline = opened(bundle, plans)
    owner, _, method = what.partition(".")
    setattr(getattr(fake, owner), method, lambda self: None)
    print(message(lambda: pipeline(request(pipeline))))


def scratch_of_any_size(bundle: str, plans: str) -> None:
    """A context may want more than its plan's record says, and no multiple of what addresses are aligned to."""
    fake.Context.update_device_memory_size_for_shapes = lambda self: 5001
    pipeline = opened(bundle, plans)
    pipeline(request(pipeline))
    assert pipeline.backend.memory()["activations"] == 5120


def no_runtime_cache_to_save(bundle: str, plans: str) -> None:
    """It draws all the same."""
    fake.Cache.serialize = lambda self: None
    pipeline = opened(bundle, plans, warm=True)
    pipeline(request(pipeline))
    pipeline.close()
    assert list(Path(plans).glob("*/runtime-*.cache")) == []


def noise_of_an_odd_size(bundle: str, plans: str) -> None:
    """Every address that TensorRT is given is aligned (fake_tensorrt asserts it), whatever a latent's size."""
    pipeline = opened(bundle, plans)
    m = pipeline.bundle.manifest
    assert m.width // 8 * (m.height // 8) * 4 * 4 % 256  # a size that shows it
    cpu = Pipeline.open(bundle, "onnxruntime-cpu", threads=1)
    wanted = request(pipeline, scheduler="lcm", guidance_scale=1.0, num_inference_steps=4)
    for _ in range(2):
        assert np.array_equal(pipeline(wanted).latents, cpu(wanted).latents)


def plans_of_another_gpu(bundle: str, plans: str) -> None:
    """A plan of TensorRT for the same compute capability is still another GPU's."""
    fake_tensorrt.make_plans(Bundle.open(bundle), Path(plans))
    [plan] = [p for p in PlanStore(Path(plans)).plans() if p.key.graph == "update"]
    from cnpp_trt.engines.flavor import Flavor
    from cnpp_trt.gpu import find_gpu

    found = find_gpu().gpu
    assert found is not None and plan.key.target == "portable"
    tensorrt = Flavor("tensorrt", None, "11.4.0")
    assert tensorrt.runs(found.kind, found)
    assert not tensorrt.runs(f"{found.sm}-128-nvidia-geforce-rtx-5090", found)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
