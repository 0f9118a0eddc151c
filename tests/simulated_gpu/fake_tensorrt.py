"""A stand-in for `tensorrt_rtx` on the simulated GPU: a "plan" is the path of an ONNX file, which ONNX Runtime runs.

Everything a launch touches, the scratch memory and its weights included, is checked by the simulated driver whenever it
runs, at once or in a replay; and the scratch is filled with rubbish, so that nobody can keep anything there.
"""

import sys
import types
import weakref
from collections.abc import Mapping
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
from cnpp_trt.runtime.backends.onnxruntime_attention import fuse_attention
from simulator import Simulator, memory

VERSION = "1.7.1.116"
launches: list[str] = []
poison: dict[str, Any] = {}  # graph name → a function of its outputs, to make one go bad
uncapturable: set[str] = set()
compiled: list[bytes] = []  # what each runtime cache was given
loaded: list[str] = []  # the graph of every engine that was made
WEIGHTS = 1 << 20  # device bytes that each engine takes
SCRATCH = 4000  # and each context: no multiple of what addresses are aligned to


class Logger:
    def __init__(self) -> None: ...


class Severity:
    ERROR = 1
    WARNING = 2


Logger.Severity = Severity  # type: ignore[attr-defined]


class Cache:
    def deserialize(self, data: bytes) -> bool:
        compiled.append(data)
        return True

    def serialize(self) -> bytes:
        return b"compiled"


class Config:
    cuda_graph_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        return True


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.name not in uncapturable

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH
        self.scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        return self.engine._enqueue(stream, dict(self.shapes), dict(self.addresses), self.scratch)


class Engine:
    num_optimization_profiles = 1

    def __init__(self, plan: bytes) -> None:
        import cuda.bindings.driver as driver
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        path = plan.decode()
        self.name = path.rpartition("/")[2].removesuffix(".onnx")
        # The CPU backend's own kernels: the images must be its to the byte.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent))
        content = fuse_attention(Path(path).read_bytes())
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        status, address = driver.cuMemAlloc(WEIGHTS)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MemoryError("no room for an engine that was asked to load")
        self.weights = (int(address), WEIGHTS)
        weakref.finalize(self, driver.cuMemFree, address).atexit = False
        loaded.append(self.name)

    def create_runtime_config(self) -> Config:
        return Config()

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH

    def create_execution_context(self, config: Config) -> Context:
        return Context(self)

    def _enqueue(
        self,
        stream: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> bool:
        free = dict(_free_dimensions(self.session, shapes))
        tensors = {}
        for tensor in (*self.session.get_inputs(), *self.session.get_outputs()):
            shape = tuple(free.get(d, d) for d in tensor.shape)
            dtype = {"float": "f4", "float16": "f2", "int64": "i8", "uint8": "u1"}[tensor.type[7:-1]]
            tensors[tensor.name] = (addresses[tensor.name], shape, np.dtype(dtype))

        def view(name: str) -> np.ndarray:
            address, shape, dtype = tensors[name]
            return np.frombuffer(memory(address, int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

        session, graph = self.session, self.name  # the simulator keeps kernels for good, and must not keep the engine

        def kernel() -> None:
            launches.append(graph)
            np.frombuffer(memory(*scratch), np.uint8)[:] = 0xCC
            found = session.run(None, {i.name: view(i.name).copy() for i in session.get_inputs()})
            for output, value in zip(session.get_outputs(), found, strict=True):
                view(output.name)[...] = poison.get(graph, lambda name, v: v)(output.name, value)

        ranges = [(a, int(np.prod(shape)) * dtype.itemsize) for a, shape, dtype in tensors.values()]
        return SIMULATOR.launch(stream, kernel, [*ranges, scratch, self.weights]) == 0


class Runtime:
    def __init__(self, logger: Logger) -> None: ...

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine(plan)


def _free_dimensions(session: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    for tensor in session.get_inputs():
        for size, dimension in zip(shapes[tensor.name], tensor.shape, strict=True):
            if isinstance(dimension, str):
                yield dimension, size


SIMULATOR: Simulator


def install() -> Simulator:
    """Puts the stand-in where `tensorrt_rtx` is imported from."""
    global SIMULATOR
    SIMULATOR = Simulator()
    module = types.ModuleType("tensorrt_rtx")
    module.__spec__ = ModuleSpec("tensorrt_rtx", None)
    module.__version__ = VERSION  # type: ignore[attr-defined]
    module.ILogger = Logger  # type: ignore[attr-defined]
    module.Runtime = Runtime  # type: ignore[attr-defined]
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED=2)  # type: ignore[attr-defined]
    module.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER=1)  # type: ignore[attr-defined]
    module.CudaGraphStrategy = types.SimpleNamespace(DISABLED=0)  # type: ignore[attr-defined]
    sys.modules["tensorrt_rtx"] = module
    return SIMULATOR


def make_plans(bundle: Any, root: Any, images: tuple[int, ...] = (1, 2), name: str = "tensorrt-rtx") -> None:
    """Puts a "plan" of every graph of the bundle into a plan store, of the flavor of this name."""
    from cnpp_trt.engines.build import Sizes
    from cnpp_trt.engines.flavor import load_flavor
    from cnpp_trt.engines.fusion import FusionReport
    from cnpp_trt.engines.plan import BuilderSettings, BuildResult, PlanKey
    from cnpp_trt.engines.store import PlanStore

    store, flavor = PlanStore(root), load_flavor(name)
    for graph, spec in bundle.manifest.graphs.items():
        profiles = Sizes(images, (True, False), chunks=(1, 2)).profiles(spec)
        key = PlanKey.of(bundle, graph, flavor, profiles, BuilderSettings())
        plan = str(bundle.folder / spec.file).encode()
        fusion = FusionReport(1, 0, 0, 0, 0, 0, 0, ())
        build = partial(BuildResult, plan, fusion, 0.0, WEIGHTS, SCRATCH, None, 0)
        store.get_or_build(key, bundle.manifest.model, build)
