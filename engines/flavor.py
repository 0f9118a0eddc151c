"""The two flavours of TensorRT and the only place that imports them.

`tensorrt` 11 (data centre and every other GPU; builds on the GPU that will run the plan) and `tensorrt_rtx` 1.7
(GeForce and RTX; builds anywhere, and compiles for the GPU when a plan is first run) share one API.
"""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ..errors import BackendError, UserError
from ..gpu import Gpu, find_gpu

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {"tensorrt": "pip install 'cnpp-trt[gpu]'", "tensorrt-rtx": "pip install 'cnpp-trt[rtx]'"}


@dataclass(frozen=True)
class Flavor:
    """Attributes:
    name: `tensorrt` or `tensorrt-rtx`.
    trt: the module, of type Any because it brings no types.
    version: of the package; a plan runs on no other.
    """

    name: str
    trt: Any
    version: str

    @property
    def rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    def target(self) -> str:
        """What a plan built here is for: this GPU's `sm90`, or `portable`, the GPUs that TensorRT-RTX covers.

        Raises: BackendError where this flavour cannot build here.
        """
        if self.rtx:
            return "portable"
        gpu = find_gpu()
        if isinstance(gpu, str):
            raise BackendError(
                f"TensorRT builds plans on the GPU that runs them, and here is none: {gpu}; "
                f"--flavor tensorrt-rtx builds without one ({INSTALL['tensorrt-rtx']})"
            )
        return gpu.sm

    def runs(self, target: str, gpu: Gpu) -> bool:
        """Whether a plan for `target` may run on `gpu`. Of a portable plan only TensorRT-RTX itself knows: True."""
        return target in ("portable", gpu.sm)


def installed_flavors() -> list[str]:
    """Those that can be imported, without importing them."""
    return [name for name, module in MODULES.items() if find_spec(module) is not None]


def load_flavor(name: str = "auto") -> Flavor:
    """Imports a flavour.

    Args:
        name: `auto` takes `tensorrt` on a machine with an NVIDIA GPU, else `tensorrt-rtx`; whichever is installed.
    Raises: UserError for an unknown name, BackendError where it is not installed.
    """
    if name == "auto":
        preferred = list(MODULES) if isinstance(find_gpu(), Gpu) else ["tensorrt-rtx"]
        name = next((flavor for flavor in preferred if flavor in installed_flavors()), preferred[-1])
    if name not in MODULES:
        raise UserError(f"unknown flavor {name!r}: choose from auto, {', '.join(MODULES)}")
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as e:  # OSError: a library that ctypes cannot load
        missing = find_spec(MODULES[name]) is None
        reason = " ".join(str(e).split())
        raise BackendError(
            f"{name} is not installed: {INSTALL[name]}" if missing else f"{name} cannot be imported: {reason}"
        ) from None
    return Flavor(name, trt, str(trt.__version__))
