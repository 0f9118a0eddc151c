"""The two flavors of TensorRT and the only place that imports them.

`tensorrt` 10 and 11 (data center and every other GPU; builds on the GPU that will run the plan) and `tensorrt_rtx` 1.7
(GeForce and RTX; builds anywhere, and compiles for the GPU when a plan is first run) share one API.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BackendError, UserError
from ..gpu import Gpu, find_gpu
from ..install import cannot_import, found, install_command
from ..messages import one_line, unknown_choice
from ..versions import CUDA_MAJORS, installed

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class Flavor:
    """A flavor of TensorRT that was imported.

    Attributes:
        name: `tensorrt` or `tensorrt-rtx`.
        trt: the module, of type Any because it brings no types.
        version: of the package; a plan runs on no other.
        compute_capabilities: which GPUs TensorRT-RTX builds for, as in (75, 89); empty for those it chooses itself.
    """

    name: str
    trt: Any
    version: str
    compute_capabilities: tuple[int, ...] = ()

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    @property
    def cuda(self) -> int | None:
        """The major version of CUDA that the package was built for; None where its parts' names do not say."""
        return next((major for major in CUDA_MAJORS if installed([f"{self.name}-cu{major}-bindings"])), None)

    def create(self, what: str, factory: Callable[..., Any], *arguments: Any, log: Any) -> Any:
        """What one of TensorRT's factories makes.

        A factory that fails returns None or raises TypeError ("factory function returned nullptr", pybind11).

        Args:
            what: what for, as in `start its runtime`.
            log: as `logger` makes it.

        Raises:
            BackendError: it fails, with what TensorRT said and, where the driver is too old, what to install.
        """
        try:
            made = factory(*arguments)
            reason = ""
        except Exception as e:  # bindings raise what they like
            made, reason = None, one_line(e)
        if made is None:
            gpu = find_gpu().gpu
            old = gpu.too_old_for(self.cuda) if gpu else None
            raise BackendError(
                f"{self.name} {self.version} cannot {what}: "
                + "; ".join(filter(None, [old, "; ".join(log.errors[-3:]) or reason or "it gave no reason"]))
            )
        return made

    def logger(self) -> Any:
        """A new logger, which keeps the last errors and warnings, and what the layer list and memory are read from."""
        return _logger(self.trt)

    def start_runtime(self, log: Any) -> Any:
        """What deserializes plans.

        Args:
            log: as `logger` makes it.

        Raises:
            BackendError: it does not start here.
        """
        return self.create("start its runtime", self.trt.Runtime, log, log=log)

    def invalidity(self, runtime: Any, header: Callable[[int], bytes]) -> str | None:
        """Why a plan cannot run on this machine, from its first bytes; None where it can, or where nothing tells.

        Args:
            runtime: as `start_runtime` makes it.
            header: gives so many of the plan's first bytes.
        """
        ask = getattr(runtime, "get_engine_validity", None)  # TensorRT-RTX alone has it
        if ask is None:
            return None
        validity, diagnostics = ask(header(runtime.engine_header_size))
        if validity != self.trt.EngineValidity.INVALID:
            return None
        kinds = self.trt.EngineInvalidityDiagnostics
        names = [name for name in dir(kinds) if name.isupper() and int(diagnostics) & int(getattr(kinds, name))]
        return ", ".join(name.lower().replace("_", " ") for name in names) or "invalid here"

    def target(self) -> str:
        """What a plan built here is for.

        Returns:
            This GPU's kind, as in `sm90-132-nvidia-h100-80gb-hbm3`; of TensorRT-RTX `portable`, the GPUs that it covers
            by itself, or the compute capabilities that were asked for, as in `sm75+sm89`.

        Raises:
            BackendError: this flavor cannot build here.
        """
        if self.rtx:
            return "+".join(f"sm{capability}" for capability in self.compute_capabilities) or "portable"
        search = find_gpu()
        if search.gpu is None:
            raise BackendError(
                f"TensorRT builds plans on the GPU that runs them, and here is none: {search.reason}; "
                f"--flavor tensorrt-rtx builds without one ({install_command('rtx')})"
            )
        return search.gpu.kind

    def runs(self, target: str, gpu: Gpu) -> bool:
        """Whether a plan for `target` may run on `gpu`. Of TensorRT-RTX's plans only it knows (`invalidity`): True."""
        return self.rtx or target == gpu.kind

    def building_for(self, compute_capabilities: Sequence[int]) -> "Flavor":
        """The flavor that builds for these GPUs, as in (75, 89).

        Raises:
            UserError: TensorRT builds for its own GPU, or TensorRT-RTX does not know one of them.
        """
        if not compute_capabilities:
            return self
        if not self.rtx:
            raise UserError("a compute capability is chosen for TensorRT-RTX: TensorRT builds for the GPU it runs on")
        known = sorted(
            int(name[2:]) for name in dir(self.trt.ComputeCapability) if name.startswith("SM") and name[2:].isdigit()
        )
        for capability in compute_capabilities:
            if capability not in known:
                shown = ", ".join(map(str, known))
                raise UserError(f"tensorrt-rtx {self.version} builds for no GPU of {capability}: choose of {shown}")
        return replace(self, compute_capabilities=tuple(sorted(set(compute_capabilities))))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.details: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kept = " ".join(message.split())[:400]
            if severity <= trt.ILogger.Severity.ERROR:
                # What follows from having no GPU, which TensorRT-RTX needs none of to build, hides the reason.
                if "catchCudaError" not in message:
                    self.errors = [*self.errors[-9:], kept]
            elif severity <= trt.ILogger.Severity.WARNING:
                self.warnings = [*self.warnings[-9:], kept]
            elif "LayerType: " in message or message.startswith("Total "):
                self.details.append(message)

    return Logger()


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
