"""ControlNet++ as ONNX graphs and TensorRT engines, with a runtime that needs no PyTorch.

The names in `__all__` are public. Modules and everything else in them may change between versions.
"""

from typing import TYPE_CHECKING, Any

from . import telemetry
from .versions import __version__

if TYPE_CHECKING:
    from .bundles.bundle import Bundle
    from .conditions import CONDITIONS
    from .errors import BackendError, BundleError, Cancelled, CnppError, DeviceMemoryError, UserError
    from .runtime.control.consistency import Score
    from .runtime.device_result import DeviceArray, DeviceResult
    from .runtime.images.image_files import read_image
    from .runtime.pipeline import Pipeline
    from .runtime.result import Result
    from .runtime.sampling.schedulers import SCHEDULERS
    from .runtime.settings.options import BACKENDS, RuntimeOptions
    from .runtime.settings.preset import Preset, read_presets
    from .runtime.settings.request import Control, Request

__all__ = [
    "BACKENDS",
    "CONDITIONS",
    "SCHEDULERS",
    "BackendError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CnppError",
    "Control",
    "DeviceArray",
    "DeviceMemoryError",
    "DeviceResult",
    "Pipeline",
    "Preset",
    "Request",
    "Result",
    "RuntimeOptions",
    "Score",
    "UserError",
    "__version__",
    "read_image",
    "read_presets",
]

telemetry.switch_off()  # before anything imports ONNX Runtime

_MODULES = {
    "bundles.bundle": ("Bundle",),
    "conditions": ("CONDITIONS",),
    "errors": ("BackendError", "BundleError", "Cancelled", "CnppError", "DeviceMemoryError", "UserError"),
    "runtime.control.consistency": ("Score",),
    "runtime.device_result": ("DeviceArray", "DeviceResult"),
    "runtime.images.image_files": ("read_image",),
    "runtime.settings.options": ("BACKENDS", "RuntimeOptions"),
    "runtime.pipeline": ("Pipeline",),
    "runtime.result": ("Result",),
    "runtime.settings.preset": ("Preset", "read_presets"),
    "runtime.settings.request": ("Control", "Request"),
    "runtime.sampling.schedulers": ("SCHEDULERS",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Lazy, so that `cnpp-trt --help` and `import cnpp_trt` load nothing that they do not use.
    if name in _MODULE_OF:
        from importlib import import_module

        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
