"""The two flavors of TensorRT and the only place that imports them.

`tensorrt` 11 (data center and every other GPU; builds on the GPU that will run the plan) and `tensorrt_rtx` 1.7
(GeForce and RTX; builds anywhere, and compiles for the GPU when a plan is first run) share one API.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError
from ..gpu import Gpu, find_gpu
from ..install import cannot_import, found, install_command
from ..messages import one_line, unknown_choice

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class Flavor:
    """A flavor of TensorRT that was imported.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
    trt: the module, of type Any because it brings no types.
    version: of the package; a plan runs on no other.
    """

    name: str
    trt: Any
    version: str

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    def target(self) -> str:
        """What a plan built here is for: this GPU's `sm90`, or `portable`, the GPUs that TensorRT-RTX covers.

        Raises:
            BackendError: this flavor cannot build here.
        """
        if self.rtx:
            return "portable"
        search = find_gpu()
        if search.gpu is None:
            raise BackendError(
                f"TensorRT builds plans on the GPU that runs them, and here is none: {search.reason}; "
                f"--flavor tensorrt-rtx builds without one ({install_command('rtx')})"
            )
        return search.gpu.sm

    def runs(self, target: str, gpu: Gpu) -> bool:
        """Whether a plan for `target` may run on `gpu`. Of a portable plan only TensorRT-RTX itself knows: True."""
        return target in ("portable", gpu.sm)


def installed_flavors() -> list[str]:
    """Those that can be imported, without importing them."""
    return [name for name, module in MODULES.items() if found(module)]


def load_flavor(name: str = "auto") -> Flavor:
    """Imports a flavor.

    Args:
        name: `auto` takes `tensorrt` on a machine with an NVIDIA GPU, else `tensorrt-rtx`; whichever is installed.

    Raises:
        UserError: there is no such flavor.
        BackendError: it is not installed.
    """
    if name == "auto":
        preferred = list(MODULES) if find_gpu().gpu else ["tensorrt-rtx"]
        name = next((flavor for flavor in preferred if flavor in installed_flavors()), preferred[-1])
    if name not in MODULES:
        raise unknown_choice("flavor", name, ("auto", *MODULES))
    try:
        trt = importlib.import_module(MODULES[name])
    except ImportError as e:
        raise BackendError(cannot_import(name, e)) from None
    except OSError as e:  # a library that ctypes cannot load
        raise BackendError(f"{name} cannot be imported here: {one_line(e)}") from None
    return Flavor(name, trt, str(trt.__version__))
