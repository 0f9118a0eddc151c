"""The bundle, a small plan, and the plans of everything that a request needs."""

import time
from collections.abc import Callable

from ...engines.build import BuildRequest, build_engines
from ...engines.builder import build_plan
from ...engines.flavor import Flavor, installed_flavors, load_flavor
from ...engines.plan import BuilderSettings, PlanKey
from ...engines.store import PlanStore
from ...errors import BackendError, UserError
from ...install import EXPORT_MODULES, install_command
from ...install import found as can_import
from ...runtime.backends.cuda import Cuda
from .stage import Finding, Setup


def bundle(setup: Setup) -> Finding:
    """An fp16 bundle: the one that was given, else the embedded model's, exported anew."""
    if setup.bundle is None and not (setup.work / "bundle").exists():
        _export(setup)
    opened = setup.open_bundle()
    if opened.manifest.precision != "fp16":
        raise UserError(f"the bundle is {opened.manifest.precision}: plans are built from one in fp16")
    opened.require_condition(setup.condition)
    m = opened.manifest
    return Finding(numbers={"model": m.model, "size": f"{m.width}x{m.height}", "digest": opened.digest[:16]})


def _export(setup: Setup) -> None:
    missing = [name for name in EXPORT_MODULES if not can_import(name)]
    if missing:
        raise BackendError(
            f"there is no fp16 bundle, and an export lacks {', '.join(missing)}: {install_command('export', 'cpu')}, "
            "or give one with --bundle"
        )
    from ...conditions import CONDITIONS
    from ...export.checkpoint import Checkpoint
    from ...export.exporter import export_bundle

    export_bundle(Checkpoint("miniature"), list(CONDITIONS), setup.work / "bundle", precision="fp16")


def small_plan(setup: Setup) -> Finding:
    """The smallest plan of each flavor: built, found valid, loaded; its memory as promised and as taken."""
    return _each_flavor(lambda flavor, found: _small_plan(setup, flavor, found))


def _small_plan(setup: Setup, flavor: Flavor, found: Finding) -> None:
    opened, settings = setup.open_bundle(), BuilderSettings()
    profiles = BuildRequest().sizes(opened).profiles(opened.graph("update"))
    key = PlanKey.of(opened, "update", flavor, profiles, settings)
    start = time.perf_counter()
    plan, _ = PlanStore(setup.plans).get_or_build(
        key, opened.manifest.model, lambda: build_plan(flavor, opened.graph_file("update"), profiles, settings)
    )
    found.numbers[f"{flavor.name}: update, build s"] = round(time.perf_counter() - start, 1)
    cuda = Cuda(device=setup.device)
    log = flavor.logger()
    with cuda.active():
        runtime = flavor.start_runtime(log)
        if reason := flavor.invalidity(runtime, plan.header):
            raise BackendError(f"{flavor.name} {flavor.version} says of a plan that it just built: {reason}")
        free = cuda.free_memory()
        content = plan.read()
        engine = flavor.create("load the plan", runtime.deserialize_cuda_engine, content, log=log)
        found.numbers[f"{flavor.name}: update, promised KiB"] = plan.weights // 1024
        found.numbers[f"{flavor.name}: update, taken KiB"] = (free - cuda.free_memory()) // 1024
        del engine


def plans(setup: Setup) -> Finding:
    """Every plan that requests of two conditions need, and a pipeline that opens them."""
    return _each_flavor(lambda flavor, found: _plans(setup, flavor, found))


def _plans(setup: Setup, flavor: Flavor, found: Finding) -> None:
    opened = setup.open_bundle()
    others = [c for c in opened.manifest.conditions if c != setup.condition]
    sizes, settings = BuildRequest().sizes(opened), BuilderSettings()
    store = PlanStore(setup.plans)
    built = build_engines(opened, [setup.condition, *others[:1]], flavor, store, sizes, settings)
    found.numbers[f"{flavor.name}: build s"] = round(built.seconds, 1)
    found.numbers[f"{flavor.name}: plans MiB"] = round(sum(plan.size for plan in built.plans) / 2**20, 1)


def _each_flavor(work: Callable[[Flavor, Finding], None]) -> Finding:
    """`ok` where every installed flavor works, `degraded` where one does."""
    found, works = Finding(), 0
    for name in installed_flavors():
        try:
            work(load_flavor(name), found)
            works += 1
        except BackendError as e:
            found.degrade(str(e))
    if not works:
        raise BackendError(found.words or "no flavor of TensorRT is installed")
    return found
