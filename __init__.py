"""ControlNet++ as ONNX graphs and TensorRT engines, with a runtime that needs no PyTorch."""

from typing import TYPE_CHECKING, Any

from . import telemetry
from .versions import __version__

if TYPE_CHECKING:
    from .runtime.pipeline import Pipeline, Result
    from .runtime.request import Control, Request

__all__ = ["Control", "Pipeline", "Request", "Result", "__version__"]

telemetry.switch_off()  # before anything imports ONNX Runtime

_HOMES = {"Pipeline": "pipeline", "Result": "pipeline", "Control": "request", "Request": "request"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `cnpp-trt --help` and `import cnpp_trt` pay for nothing they do not use.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".runtime.{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
