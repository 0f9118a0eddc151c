"""TensorRT's real Python bindings: what is in them, and what the package makes of them where TensorRT fails.

Run by tests/engines/test_tensorrt_bindings.py: the first argument names the function, the others are its own. All but
`describe` want the library of tests/tensorrt_stub in TensorRT's place.
"""

import faulthandler
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines import builder
from cnpp_trt.engines.builder import build_plan
from cnpp_trt.engines.flavor import Flavor, load_flavor
from cnpp_trt.engines.plan import BuilderSettings, Range
from cnpp_trt.errors import BackendError
from cnpp_trt.versions import installed

ONNX = Path("graph.onnx")


def describe(module: str) -> None:
    """Prints the classes of a module by name, as in `ILogger.Severity`, with their members, as JSON."""
    trt = importlib.import_module(module)
    classes: dict[str, Any] = {}

    def add(name: str, owner: Any) -> None:
        members = classes[name] = {}
        for member in dir(owner):
            found = inspect.getattr_static(owner, member)
            value = getattr(owner, member)
            if inspect.isclass(value):
                kind: dict[str, Any] = {"kind": "class"}
                if member not in classes and not member.startswith("_"):
                    add(f"{name}.{member}", value)
            elif isinstance(found, property):
                kind = {"kind": "writable" if found.fset else "property", "text": found.fget and found.fget.__doc__}
            elif callable(value):
                kind = {"kind": "method", "text": value.__doc__}
            elif isinstance(value, owner):
                kind = {"kind": "value", "value": int(value)}
            else:
                kind = {"kind": "other"}
            members[member] = kind

    for name in dir(trt):
        if inspect.isclass(getattr(trt, name)) and not name.startswith("_"):
            add(name, getattr(trt, name))
    print(json.dumps({"version": trt.__version__, "classes": classes}))


def refused(call: Callable[[], object]) -> None:
    try:
        call()
    except BackendError as e:
        assert "\n" not in str(e)
        print(e)
        return
    raise AssertionError("nothing was raised")


def factories() -> None:
    """Prints which CUDA the bindings are for, and what is said where neither a runtime nor a builder starts."""
    flavor = load_flavor("tensorrt")
    print(flavor.cuda)
    assert installed(["tensorrt"]) == {"tensorrt": flavor.version}  # as doctor and the plan store know it
    refused(lambda: flavor.start_runtime(flavor.logger()))
    refused(lambda: build(flavor))
    assert flavor.invalidity(flavor.trt.Runtime, lambda nbytes: b"") is None  # only TensorRT-RTX tells


def build(flavor: Flavor, timing_cache: bytes | None = None) -> Any:
    """Of a graph whose inputs have no name, as those of the stub."""
    profiles = [{"": Range((1, 2), (2, 2), (4, 2))}, {"": Range((8, 2), (8, 2), (8, 2))}]
    return build_plan(flavor, ONNX, profiles, BuilderSettings(3), timing_cache=timing_cache)


def refused_build() -> None:
    refused(lambda: build(load_flavor("tensorrt")))


def whole_build() -> None:
    """Every call of a build takes what it is given; and the settings that the calls leave behind."""
    flavor = load_flavor("tensorrt")
    built = build(flavor)
    assert isinstance(built.plan, flavor.trt.IHostMemory)
    build_plan(flavor, ONNX, [{"": Range((2, 2), (2, 2), (2, 2))}], BuilderSettings())  # a static network
    log = flavor.logger()
    maker = flavor.create("start its builder", flavor.trt.Builder, log, log=log)
    # Not in `build`, which reads the cache that comes out of it: the stub has none.
    config = builder._config(flavor, maker, BuilderSettings(0, 1, 2, 3), b"", log)
    assert isinstance(config.get_timing_cache(), flavor.trt.ITimingCache)


def whole_request(bundle: str, plans: str) -> None:
    """Every call of a request takes what it is given: plans are loaded, bound, launched, recorded and given up.

    Nothing is computed, so the image is what lay in memory.
    """
    import numpy as np
    from cnpp_trt import Control, Pipeline, Request
    from fake_tensorrt import make_plans
    from simulator import Simulator

    gpu = Simulator()
    make_plans(Bundle.open(bundle), Path(plans), name="tensorrt")
    pipeline = Pipeline.open(bundle, "tensorrt", plans=Path(plans))
    backend: Any = pipeline.backend
    assert (backend.name, backend._flavor.trt.__name__) == ("tensorrt", "tensorrt")
    m = pipeline.bundle.manifest
    control = Control("seg", np.zeros((m.height, m.width, 3), np.uint8))
    for images in (1, 2):
        for seed in (1, 2, 3):  # a request is recorded when another of its kind comes
            fields: dict[str, Any] = {"num_images_per_prompt": images, "num_inference_steps": 2, "seed": seed}
            result = pipeline(Request("a house", controls=control, **fields))
            assert result.images.shape == (images, m.height, m.width, 3)
    assert "cuGraphLaunch" in {line.split()[0] for line in gpu.trace()}
    backend.release("unet")


def severities() -> None:
    """Whatever TensorRT says goes to its place; the calls are those of the bindings."""
    flavor = load_flavor("tensorrt")
    log = flavor.logger()
    severity = flavor.trt.ILogger.Severity
    for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        log.log(getattr(severity, name), f"{name} of\nTensorRT")
        log.log(getattr(severity, name), f"Total {name}")
    assert log.errors == ["INTERNAL_ERROR of TensorRT", "Total INTERNAL_ERROR", "ERROR of TensorRT", "Total ERROR"]
    assert log.warnings == ["WARNING of TensorRT", "Total WARNING"]
    assert log.details == ["Total INFO", "Total VERBOSE"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+(\.post\d+)?", flavor.version)


if __name__ == "__main__":
    faulthandler.enable()
    globals()[sys.argv[1]](*sys.argv[2:])
