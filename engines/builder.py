"""One ONNX graph → one serialized plan, in three steps: network, config, plan."""

import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError
from .flavor import Flavor
from .fusion import Fusible, fusion_report, parse_layers
from .plan import BuilderSettings, BuildResult, Profile

# Told the phase, and the share of it that is done, 0 to 1.
Progress = Callable[[str, float], None]


def build_plan(
    flavor: Flavor,
    onnx: Path,
    profiles: Sequence[Profile],
    settings: BuilderSettings,
    *,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Builds a plan for the target of `flavor`. The precision is the graph's own (strong typing).

    Args:
        profiles: one or several; a single one with fixed sizes makes a static network.

    Raises:
        BackendError: TensorRT cannot build the plan; the message has its errors with the nodes' names.
    """
    start = time.perf_counter()
    trt = flavor.trt
    log = flavor.logger()
    builder = flavor.create("start its builder", trt.Builder, log, log=log)
    network, _parser = _network(flavor, onnx, builder, log)
    config = _config(flavor, builder, settings, timing_cache, log)
    _shape(flavor, builder, network, config, profiles, log)
    fusible = _fusible(trt, network)
    plan = flavor.create(f"build {onnx}", lambda: _serialize(trt, builder, network, config, progress), log=log)
    text = "\n".join(log.details)
    cache = config.get_timing_cache() if timing_cache is not None else None
    timings = cache.serialize() if cache is not None else None
    return BuildResult(
        plan=plan,
        fusion=fusion_report(parse_layers(text), fusible, len(profiles)),
        seconds=time.perf_counter() - start,
        weights=_bytes(text, "Total Weights Memory"),
        activations=_bytes(text, "Total Activation Memory"),
        timing_cache=bytes(timings) if timings is not None else None,
        peak=_peak(),
    )


def _network(flavor: Flavor, onnx: Path, builder: Any, log: Any) -> tuple[Any, Any]:
    """The network of a graph, and the parser, which holds its weights until the plan is built."""
    trt = flavor.trt
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flags = 0 if typed is None else 1 << int(typed)
    network = flavor.create("make a network", builder.create_network, flags, log=log)
    parser = flavor.create("start its ONNX parser", trt.OnnxParser, network, log, log=log)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(
            f"{e.node_operator()} {e.node_name()!r}: {' '.join(e.desc().split())}" for e in errors
        ) or "; ".join(log.errors[-3:])
        raise BackendError(
            f"{flavor.name} {flavor.version} cannot parse {onnx}: {reasons}; "
            f"what it can: `cnpp-trt engines capability {shlex.quote(str(onnx))} --flavor {flavor.name}`"
        )
    return network, parser


def _config(flavor: Flavor, builder: Any, settings: BuilderSettings, timing_cache: bytes | None, log: Any) -> Any:
    trt = flavor.trt
    config = flavor.create("configure a build", builder.create_builder_config, log=log)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the layer list, which the fusion report reads
    config.clear_flag(trt.BuilderFlag.TF32)  # what is fp32 in a graph is there because it must be exact
    # So that TensorRT-RTX's plan can be captured; where it cannot, the build fails, and not a capture.
    if (user_allocation := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(user_allocation)
    if flavor.compute_capabilities:
        config.num_compute_capabilities = len(flavor.compute_capabilities)
        for i, capability in enumerate(flavor.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), i)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.aux_streams is not None:
        config.max_aux_streams = settings.aux_streams
    if settings.tiling_level is not None:
        levels = trt.TilingOptimizationLevel
        config.tiling_optimization_level = (levels.NONE, levels.FAST, levels.MODERATE, levels.FULL)[
            settings.tiling_level
        ]
    if settings.timing_iterations is not None:
        config.avg_timing_iterations = settings.timing_iterations
    if timing_cache is not None:
        cache = flavor.create("make a timing cache", config.create_timing_cache, timing_cache, log=log)
        config.set_timing_cache(cache, ignore_mismatch=False)
    return config


def _shape(flavor: Flavor, builder: Any, network: Any, config: Any, profiles: Sequence[Profile], log: Any) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if len(profiles) == 1 and all(r.min == r.max for r in profiles[0].values()):
        # Better than a profile of one size: shape arithmetic folds away before anything is fused.
        for tensor in inputs:
            tensor.shape = profiles[0][tensor.name].opt
        return
    for ranges in profiles:
        profile = flavor.create("make a profile", builder.create_optimization_profile, log=log)
        for tensor in inputs:
            r = ranges[tensor.name]
            profile.set_shape(tensor.name, r.min, r.opt, r.max)
        config.add_optimization_profile(profile)


def _fusible(trt: Any, network: Any) -> Fusible:
    kinds: dict[Any, list[str]] = {trt.LayerType.SOFTMAX: [], trt.LayerType.NORMALIZATION: [], trt.LayerType.CAST: []}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type in kinds:
            kinds[layer.type].append(layer.name)
    softmaxes, norms, casts = (tuple(names) for names in kinds.values())
    return Fusible(softmaxes, norms, casts)


def _serialize(trt: Any, builder: Any, network: Any, config: Any, progress: Progress | None) -> Any:
    """None, or what is raised, where TensorRT fails."""
    stop = threading.Event()
    config.progress_monitor = _monitor(trt, stop, progress or (lambda phase, share: None))
    result: list[Any] = []
    raised: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as e:  # else it is printed, and the reason lost
            raised.append(e)
        finally:
            done.set()

    # TensorRT cannot be interrupted in its own thread: the main one stays free for Ctrl-C and asks it to stop.
    threading.Thread(target=work, name="tensorrt-build").start()
    try:
        # Not Thread.join: when that is interrupted, Python 3.11 and 3.12 take the thread for ended.
        while not done.wait(0.1):
            pass
    except BaseException:
        stop.set()
        done.wait()
        raise
    if raised:
        raise raised[0]
    return result[0]


def _monitor(trt: Any, stop: threading.Event, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(num_steps, 1)
            progress(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, min((step + 1) / self.steps.get(phase_name, 1), 1.0))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            progress(phase_name, 1.0)

    return Monitor()


def _bytes(log: str, title: str) -> int:
    """The largest: a plan of several profiles prints one line for each."""
    return max(map(int, re.findall(rf"{title}: (\d+) bytes", log)), default=0)


def _peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
