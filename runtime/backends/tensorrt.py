"""The backend `tensorrt`: plans of either flavor, all on one stream, recorded as CUDA graphs."""

import hashlib
import logging
import re
import shlex
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...bundles.bundle import Bundle
from ...bundles.graph_names import BESIDE, always_needed
from ...engines.flavor import Flavor, installed_flavors, load_flavor
from ...engines.plan import Plan
from ...engines.store import PlanStore
from ...errors import BackendError, DeviceMemoryError, UserError
from ...files import replace_file
from ...install import install_command
from ..settings.options import CudaGraphs
from .cuda import Cuda
from .cuda_memory import free_with
from .interface import Buffer, Launch, LoadedGraph, aligned
from .tensorrt_launch import Context, TensorRtLaunch

logger = logging.getLogger(__name__)


class TensorRt(Cuda):
    """Plans of TensorRT or TensorRT-RTX, recorded as CUDA graphs.

    Args:
        plans: the plan store's folder; None is the default one.
        budget: device bytes that weights, activations, buffers and recordings may take together.
        device: the index of the GPU.
        cuda_graphs: what is recorded as one CUDA graph.

    Raises:
        BackendError: there is no GPU, no TensorRT, or no plan that runs here, with what helps.
    """

    def __init__(
        self,
        bundle: Bundle,
        plans: Path | str | None = None,
        budget: int | None = None,
        device: int = 0,
        cuda_graphs: CudaGraphs = "step",
    ) -> None:
        super().__init__(budget, device)
        self.cuda_graphs: CudaGraphs = cuda_graphs
        self._bundle = bundle
        self._store = PlanStore(None if plans is None else Path(plans))
        self._graphs: dict[str, _Graph] = {}
        self._engines: dict[Path, _Engine] = {}
        self._weights = 0  # of engines that live, wherever they are held
        # Contexts hold them; True is that of the launches beside the stream.
        self._scratch: dict[bool, weakref.ref[Buffer]] = {}
        self._scratch_bytes = {False: 0, True: 0}
        self._choose()

    def load(self, graph: str) -> LoadedGraph:
        """The plan itself is loaded when it is first bound, because sizes decide which one it is."""
        return self._load(graph)

    def _load(self, graph: str) -> "_Graph":
        if graph not in self._graphs:
            self._graphs[graph] = _Graph(self, graph, self._plans(graph))
        return self._graphs[graph]

    def needed(self, graphs: Sequence[str], nbytes: int) -> dict[str, int]:
        plans = self._newest(graphs)
        weights = sum(plan.weights for plan in plans if plan.folder not in self._engines)
        sizes = {side: self._activations(own) for side, own in self._sides(plans).items()}
        # A larger one is made beside the one that is held.
        activations = sum(size for side, size in sizes.items() if size > self._scratch_held(side))
        return {"weights": weights, "activations": activations, **super().needed(graphs, nbytes)}

    def reserve(self, graphs: Sequence[str], nbytes: int) -> None:
        super().reserve(graphs, nbytes)
        sides = self._sides(self._newest(graphs))
        self._scratch_bytes = {side: self._activations(plans) for side, plans in sides.items()}

    def release(self, graph: str | None = None) -> None:
        self.synchronize()  # nothing that is given back may be in use
        with self.active():
            for plan in self._graphs[graph].plans if graph in self._graphs else ():
                engine = self._engines.pop(plan.folder, None)
                if engine is not None:
                    engine.save_runtime_cache()  # else it would be compiled again
                    engine.forget_contexts()
            for engine in self._engines.values():
                engine.forget_idle_contexts()

    def beside(self, graph: str, buffers: Mapping[str, Buffer]) -> Launch:
        return self._load(graph).bind(buffers, beside=True)

    def record(self, launches: Sequence[Launch]) -> Launch:
        with self.active():
            for engine in self._engines.values():
                engine.save_runtime_cache()
            for launch in launches:
                if isinstance(launch, TensorRtLaunch) and self._flavor.rtx:
                    launch.require_capturable()
            return super().record(launches)

    def held(self) -> dict[str, int]:
        scratch = self._scratch_held(False) + self._scratch_held(True)
        own = {"weights": self._weights, "activations": scratch}
        return own | super().held() | {"buffers": self.allocated - scratch}

    def scratch(self, nbytes: int, beside: bool) -> Buffer:
        """Memory for activations, shared by all contexts of one stream.

        A larger one replaces it for launches that are bound from now on; those that hold the old one keep it.
        """
        scratch = self._scratch[beside]() if beside in self._scratch else None
        if scratch is None or scratch.nbytes < nbytes:
            nbytes = aligned(max(nbytes, self._scratch_bytes[beside]))
            scratch = self.arena(nbytes)((nbytes,), "uint8")
            self._scratch[beside] = weakref.ref(scratch)
            self.took()
        return scratch

    def engine(self, plan: Plan) -> "_Engine":
        if plan.folder not in self._engines:
            with self.active():
                self._engines[plan.folder] = _Engine(self, plan)
        return self._engines[plan.folder]

    def refuse(self, what: str) -> BackendError:
        """An error with what TensorRT said; a DeviceMemoryError where that is that memory ran out."""
        reasons = "; ".join(self._log.errors[-3:])
        full = re.search(r"out ?of ?memory|OutOfMemory|cudaErrorMemoryAllocation", reasons, re.IGNORECASE) is not None
        error = DeviceMemoryError if full else BackendError
        return error(f"{self.name} {self._flavor.version} {what}: {reasons or 'it gave no reason'}")

    def _scratch_held(self, beside: bool) -> int:
        scratch = self._scratch[beside]() if beside in self._scratch else None
        return scratch.nbytes if scratch else 0

    def _sides(self, plans: Sequence[Plan]) -> dict[bool, list[Plan]]:
        """What may run on the stream, and what may run beside it (and does not where no control applies)."""
        return {False: list(plans), True: [plan for plan in plans if plan.key.graph in BESIDE]}

    def _choose(self) -> None:
        """Opens the first flavor that is installed and has plans that run here."""
        installed = installed_flavors()
        if not installed:
            raise BackendError(
                f"TensorRT is not installed: {install_command('gpu')}; "
                f"TensorRT-RTX, for RTX GPUs: {install_command('rtx')}"
            )
        reasons = []
        for name in installed:
            try:
                with self.active():
                    self._open(load_flavor(name))
                return
            except DeviceMemoryError:
                raise
            except BackendError as e:
                reasons.append(str(e))
                self._engines.clear()
        raise BackendError("; ".join(reasons))

    def _open(self, flavor: Flavor) -> None:
        """Starts a flavor's runtime, looks at every plan that all requests need, and loads the smallest.

        Raises:
            BackendError: it does not work here, or a plan is missing or cannot run.
        """
        self._flavor, self.name = flavor, flavor.name
        self._log = flavor.logger()
        self._runtime = flavor.start_runtime(self._log)
        plans = {graph: self._runnable(flavor, graph) for graph in always_needed(self._bundle.manifest.graphs)}
        for graph, runnable in plans.items():
            if not runnable:
                raise BackendError(self._why_not(flavor, graph))
            if reason := flavor.invalidity(self._runtime, runnable[0].header):
                raise BackendError(self._why_invalid(flavor, graph, reason))
        self.engine(plans["update"][0])
        for warning in self._log.warnings[:1]:
            logger.warning(f"{self.name}: {warning}")

    def _newest(self, graphs: Sequence[str]) -> list[Plan]:
        """The newest plan of each graph."""
        return [self._load(graph).plans[0] for graph in dict.fromkeys(graphs)]

    def _plans(self, graph: str) -> list[Plan]:
        return self._runnable(self._flavor, graph)

    def _runnable(self, flavor: Flavor, graph: str) -> list[Plan]:
        return [
            plan for plan in self._store.find(self._bundle, graph, flavor) if flavor.runs(plan.key.target, self.gpu)
        ]

    def _why_not(self, flavor: Flavor, graph: str) -> str:
        """Why there is no plan to run, and the command that makes one."""
        others = [plan for plan in self._store.plans() if plan.key.graph == graph and plan.key.flavor == flavor.name]
        others = [plan for plan in others if plan.model == self._bundle.manifest.model]
        here = f"{flavor.name} {flavor.version} on {self.gpu.name} ({self.gpu.sm})"
        built = ", ".join(sorted({f"{plan.key.version} for {plan.key.target}" for plan in others}))
        what = f"no plan of {graph} for {here}" + (f", only for {built}" if built else "")
        return f"{what}: make them with `{_build(self._bundle)}`"

    def _why_invalid(self, flavor: Flavor, graph: str, reason: str) -> str:
        """Why a plan that is there cannot run, and what to do."""
        here = f"{flavor.name} {flavor.version} cannot run its plan of {graph} on {self.gpu.name} ({self.gpu.sm})"
        if "unsupported" in reason and flavor.rtx:
            capability = self.gpu.sm.removeprefix("sm")
            helps = (
                f"build for it with `{_build(self._bundle)} --flavor tensorrt-rtx --compute-capability {capability}` "
                f"where TensorRT-RTX can, or use TensorRT itself: {install_command('gpu')}"
            )
        else:
            helps = self.gpu.too_old_for(flavor.cuda) or f"build it again with `{_build(self._bundle)}`"
        return f"{here}: {reason}; {helps}"

    def _activations(self, plans: Sequence[Plan]) -> int:
        """The scratch that plans share, which never run together: what each recorded, or its engine says now."""
        engines = [self._engines.get(plan.folder) for plan in plans]
        recorded = max((plan.activations for plan in plans), default=0)
        return aligned(max(recorded, *(engine.activations for engine in engines if engine), 0))


def _build(bundle: Bundle) -> str:
    """The command that builds plans of every condition of a bundle."""
    conditions = "".join(f" --cond {condition}" for condition in bundle.manifest.conditions)
    return f"cnpp-trt build --bundle {shlex.quote(str(bundle.folder))}{conditions}"


class _Graph:
    def __init__(self, backend: TensorRt, name: str, plans: Sequence[Plan]) -> None:
        self._backend = backend
        self._name = name
        self.plans = plans
        if not plans:
            raise BackendError(backend._why_not(backend._flavor, name))

    def bind(self, buffers: Mapping[str, Buffer], beside: bool = False) -> TensorRtLaunch:
        bundle = self._backend._bundle
        shapes = {t.name: buffers[t.name].shape for t in bundle.graph(self._name).inputs}
        for plan in self.plans:
            profile = plan.profile_for(shapes)
            if profile is not None:
                context = self._backend.engine(plan).context(profile, shapes, beside)
                return TensorRtLaunch(self._backend, self._name, context, buffers)
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if shape)
        raise BackendError(
            f"no plan of {self._name} takes {sizes[:200]}: build one that does, as in "
            f"`{_build(bundle)} --num-images 1-4 --both --prompt-chunks 1-3`"
        )


class _Engine:
    """A deserialized plan with its execution contexts, one for each combination of sizes."""

    def __init__(self, backend: TensorRt, plan: Plan) -> None:
        self.plan = plan
        self._backend = backend
        backend.require(plan.weights, f"{plan.key.graph}'s weights")
        content = plan.read()  # its digest is checked before anything in it is looked at
        self._held = [backend._runtime.deserialize_cuda_engine(content)]
        free_with(self, backend, self._held)
        if self._engine is None:
            raise backend.refuse(f"cannot load {plan.engine} on {backend.gpu.name} ({backend.gpu.sm})")
        self.activations = int(getattr(self._engine, "device_memory_size_v2", 0))
        weakref.finalize(self, _forget_weights, weakref.ref(backend), plan.weights).atexit = False
        backend._weights += plan.weights
        backend.took()
        self._contexts: dict[tuple[Any, ...], Context] = {}
        self._cache: Any = None
        self._cached = b""

    @property
    def _engine(self) -> Any:
        return self._held[0]

    def context(self, profile: int, shapes: Mapping[str, tuple[int, ...]], beside: bool = False) -> Context:
        key = (profile, beside, *sorted(shapes.items()))
        if key not in self._contexts:
            with self._backend.active():
                self._contexts[key] = self._new_context(profile, shapes, beside)
        return self._contexts[key]

    def forget_contexts(self) -> None:
        """They hold the engine as it holds them: it lives as long as launches hold one, no longer."""
        self._contexts.clear()

    def forget_idle_contexts(self) -> None:
        """Those of no launch: they hold the scratch that they were made with."""
        self._contexts = {key: context for key, context in self._contexts.items() if context.launches}

    def save_runtime_cache(self) -> None:
        """What TensorRT-RTX compiled for this GPU, for the next process; a read-only plan store goes without."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize() or b"")
        if content == self._cached:
            return
        with suppress(OSError, UserError):
            replace_file(self._cache_file, hashlib.sha256(content).digest() + content)
        self._cached = content

    def _read_runtime_cache(self) -> bytes:
        """What an earlier process saved; empty where there is nothing, or it is not what was written.

        Like a plan, it holds code that runs on the GPU.
        """
        try:
            saved = self._cache_file.read_bytes()
        except OSError:
            return b""
        digest, content = saved[:32], saved[32:]
        return content if hashlib.sha256(content).digest() == digest else b""

    @property
    def _cache_file(self) -> Path:
        gpu = self._backend.gpu
        return self.plan.folder / f"runtime-{gpu.sm}-cuda{gpu.cuda}.cache"

    def _new_context(self, profile: int, shapes: Mapping[str, tuple[int, ...]], beside: bool) -> Context:
        backend, trt = self._backend, self._backend._flavor.trt
        config = self._engine.create_runtime_config()
        if config is None:
            raise backend.refuse(f"cannot configure {self.plan.key.graph}")
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if backend._flavor.rtx:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # steps are captured, not single engines
            # Compiled when first run, not later by a thread of its own: a recording would keep the slow kernels.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                cached = self._read_runtime_cache()
                if cached and self._cache is not None and self._cache.deserialize(cached):
                    self._cached = cached  # else it is of another driver: what is compiled again replaces it
            if self._cache is None or not config.set_runtime_cache(self._cache):
                raise backend.refuse(f"takes no runtime cache for {self.plan.key.graph}")
        context = self._engine.create_execution_context(config)
        if context is None:
            raise backend.refuse(f"cannot run {self.plan.key.graph} on {backend.gpu.name} ({backend.gpu.sm})")
        if self._engine.num_optimization_profiles > 1 and not context.set_optimization_profile_async(
            profile, backend.stream
        ):
            raise backend.refuse(f"cannot use profile {profile} of {self.plan.key.graph}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise backend.refuse(f"refuses {name} {list(shape)} of {self.plan.key.graph}")
        nbytes = max(
            context.update_device_memory_size_for_shapes(),
            self._engine.get_device_memory_size_for_profile_v2(profile),
        )
        return Context(context, backend.scratch(nbytes, beside), self, beside)


def _forget_weights(backend: "weakref.ref[TensorRt]", nbytes: int) -> None:
    alive = backend()
    if alive is not None:
        alive._weights -= nbytes
