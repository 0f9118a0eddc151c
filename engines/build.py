"""bundle → plans: which graphs, at which sizes, and the report of what came out."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from ..bundles.bundle import Bundle, GraphSpec
from ..bundles.defaults import SamplingDefaults
from ..bundles.graph_names import STEPS_AT_ONCE, condition_of
from ..errors import UserError
from .builder import Progress, build_plan
from .flavor import Flavor
from .plan import BuilderSettings, BuildResult, Plan, PlanKey, Profile, Range, Shape
from .store import PlanStore

logger = logging.getLogger(__name__)

MAX_IMAGES = 16


@dataclass(frozen=True)
class Sizes:
    """Which requests a set of plans serves.

    Attributes:
        images: numbers of images per prompt.
        guided: with classifier-free guidance (True), without (False), or both.
        dynamic: one profile for the whole range instead of one for each size. Slower: a fixed size is the default.
        chunks: how many times 77 tokens a prompt has.
    """

    images: tuple[int, ...] = (1,)
    guided: tuple[bool, ...] = (True,)
    dynamic: bool = False
    chunks: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        bad = [b for b in self.images if not 1 <= b <= MAX_IMAGES]
        if bad or not self.images:
            raise UserError(f"plans are for 1 to {MAX_IMAGES} images, not {bad[0] if bad else 'none'}")
        if not self.chunks or min(self.chunks) < 1:
            raise UserError("plans are for prompts of 1 chunk or more")

    def profiles(self, graph: GraphSpec) -> list[Profile]:
        """The profiles of a graph: equal ones are one."""
        profiles: list[dict[str, Shape]] = []
        # Extractors and the encoder look at one image at a time.
        counts = (1,) if graph.file.startswith(("extractor_", "vae_encoder")) else self.images
        for guided, chunks, images in product(self.guided, self.chunks, counts):
            n = 2 if guided else 1
            free = {"batch": n * images, "images": images}
            free |= {"tokens": 77 * chunks, "prompts": n * images * chunks, "steps": STEPS_AT_ONCE}
            # With both there are steps that use the guidance of an earlier one again: its two sides and their own.
            for sides in (n, 3) if guided and False in self.guided else (n,):
                free["guidance"] = sides
                shapes = {t.name: tuple(free[d] if isinstance(d, str) else d for d in t.shape) for t in graph.inputs}
                if shapes not in profiles:
                    profiles.append(shapes)
        if not self.dynamic:
            return [{name: Range(s, s, s) for name, s in shapes.items()} for shapes in profiles]
        ranges = {}
        for name in profiles[0]:
            sizes = list(zip(*(shapes[name] for shapes in profiles), strict=True))
            low, high = tuple(map(min, sizes)), tuple(map(max, sizes))
            ranges[name] = Range(low, profiles[0][name], high)
        return [ranges]


@dataclass(frozen=True)
class BuildRequest:
    """Which plans to build from a bundle, and how.

    Attributes:
        conditions: the conditions to serve; empty for every condition of the bundle.
        images: as in `Sizes`.
        guided: as in `Sizes`; empty for what the model's own guidance scale needs.
        dynamic: as in `Sizes`.
        chunks: as in `Sizes`.
        settings: TensorRT's builder settings.

    Raises:
        UserError: there are no such sizes.
    """

    conditions: tuple[str, ...] = ()
    images: tuple[int, ...] = (1,)
    guided: tuple[bool, ...] = ()
    dynamic: bool = False
    chunks: tuple[int, ...] = (1,)
    settings: BuilderSettings = field(default_factory=BuilderSettings)

    def __post_init__(self) -> None:
        Sizes(self.images, self.guided or (True,), self.dynamic, self.chunks)

    def sizes(self, bundle: Bundle) -> Sizes:
        """The sizes to build for, with the defaults of the bundle's model."""
        return Sizes(self.images, self.guided or (guided_by_default(bundle),), self.dynamic, self.chunks)


@dataclass(frozen=True)
class Engines:
    """The plans of one bundle.

    Attributes:
        bundle: what they were built from.
        conditions: the conditions that they serve.
        sizes: the sizes that they serve.
        plans: one for each graph, in the order in which they were built.
        built: names of the graphs whose plans were not in the store.
        seconds: time for everything.
    """

    bundle: Bundle
    conditions: tuple[str, ...]
    sizes: Sizes
    plans: tuple[Plan, ...]
    built: tuple[str, ...]
    seconds: float


def build_all(
    bundles: Iterable[Bundle],
    request: BuildRequest,
    flavor: Flavor,
    store: PlanStore,
    progress: Progress | None = None,
) -> list[Engines]:
    """Builds the plans of several bundles, as `build_engines` does those of one."""
    return [
        build_engines(
            bundle,
            request.conditions or tuple(bundle.manifest.conditions),
            flavor,
            store,
            request.sizes(bundle),
            request.settings,
            progress,
        )
        for bundle in bundles
    ]


def build_engines(
    bundle: Bundle,
    conditions: Sequence[str],
    flavor: Flavor,
    store: PlanStore,
    sizes: Sizes,
    settings: BuilderSettings,
    progress: Progress | None = None,
) -> Engines:
    """Builds the plans that the runtime needs for these conditions; plans in the store are taken as they are.

    Args:
        bundle: an fp16 bundle.
        conditions: conditions of the bundle.
        flavor: the TensorRT that builds.
        store: where the plans go.
        sizes: the sizes that the plans serve.
        settings: TensorRT's builder settings.
        progress: called with the graph and TensorRT's phase, and the share of the phase that is done.

    Raises:
        UserError: the bundle is not fp16 or lacks a condition, or the disk is full.
        BundleError: one of its files is damaged.
        BackendError: TensorRT cannot build here or refuses a graph.
    """
    if bundle.manifest.precision != "fp16":
        raise UserError(
            f"{bundle.folder} is {bundle.manifest.precision}, whose graphs are written for ONNX Runtime: "
            "build plans from a bundle that was exported with --precision fp16"
        )
    start = time.perf_counter()
    plans: list[Plan] = []
    built: list[str] = []
    cache = store.timing_cache(flavor) if not flavor.rtx else None  # TensorRT-RTX times nothing when it builds
    for graph in required_graphs(bundle, conditions):
        profiles = sizes.profiles(bundle.graph(graph))
        key = PlanKey.of(bundle, graph, flavor, profiles, settings)

        def build(graph: str = graph, profiles: list[Profile] = profiles) -> BuildResult:
            nonlocal cache
            result = build_plan(
                flavor,
                bundle.graph_file(graph),
                profiles,
                settings,
                timing_cache=cache,
                progress=_of_graph(progress, graph),
            )
            cache = result.timing_cache
            return result

        plan, new = store.get_or_build(key, bundle.manifest.model, build)
        plans.append(plan)
        if new:
            built.append(graph)
            if cache is not None:
                store.save_timing_cache(flavor, cache)
            logger.info(
                f"{graph}: {plan.seconds:.1f} s, {plan.size / 2**20:.1f} MiB, {plan.fusion}; "
                f"on the device {plan.weights / 2**20:.0f} + {plan.activations / 2**20:.0f} MiB"
            )
    return Engines(bundle, tuple(conditions), sizes, tuple(plans), tuple(built), time.perf_counter() - start)


def _of_graph(progress: Progress | None, graph: str) -> Progress | None:
    """Progress that names the graph before each phase."""
    if progress is None:
        return None
    return lambda phase, share: progress(f"{graph}: {phase}", share)


def guided_by_default(bundle: Bundle) -> bool:
    """Whether a request that says nothing of guidance runs with classifier-free guidance."""
    if bundle.guidance_width is not None:
        return False  # a distilled UNet takes its scale as an input
    return SamplingDefaults.of(bundle.manifest).guidance_scale > 1


def required_graphs(bundle: Bundle, conditions: Sequence[str]) -> list[str]:
    """Every graph of the bundle but those of other conditions; the smallest first, so that trouble shows early."""
    for condition in conditions:
        bundle.require_condition(condition)
    graphs = [name for name in bundle.manifest.graphs if condition_of(name) in ("", *conditions)]
    return sorted(graphs, key=lambda name: sum(entry["size"] for entry in bundle.graph_files(name).values()))
