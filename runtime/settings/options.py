"""Where and how graphs run: the options that every way of opening a pipeline has in common."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from ...errors import UserError
from ...messages import printable, unknown_choice
from .preset import Preset

BACKENDS = ("auto", "tensorrt", "onnxruntime-cuda", "onnxruntime-cpu", "openvino")
PRECISIONS = ("fp32", "fp16", "bf16")
CUDA_GRAPHS = ("step", "loop", "launch", "off")
MAX_THREADS = 1024
_BUDGETED = ("auto", "tensorrt")

Precision = Literal["fp32", "fp16", "bf16"]
CudaGraphs = Literal["step", "loop", "launch", "off"]


class OptionFields(TypedDict, total=False):
    """The fields of `RuntimeOptions`, as keyword arguments."""

    backend: str
    device: int
    threads: int | None
    precision: Precision | None
    plans: Path | str | None
    vram_budget: int | None
    cuda_graphs: CudaGraphs
    presets: tuple[Preset, ...]


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how graphs run. None stands for the default of the backend.

    Attributes:
        backend: one of `BACKENDS`; `auto` takes the fastest that works here.
        device: the index of the GPU, as `CUDA_VISIBLE_DEVICES` leaves them.
        threads: of the backends on the CPU, 1 to 1024; by default every physical core.
        precision: what the backend computes in: `fp32`, `fp16` or `bf16`. A backend computes in the precision of the
            bundle, but for OpenVINO, which computes any bundle in `fp32` (the default) or `bf16`.
        plans: the folder of TensorRT plans; by default that of `cnpp-trt build`.
        vram_budget: of the backend `tensorrt`: device bytes that weights, activations, buffers and recordings may take.
            Engines of conditions that were not used lately are unloaded to keep it, and loaded again on demand.
        cuda_graphs: of the backend `tensorrt`: what is recorded as one CUDA graph, from the second request of a loop
            shape on: each kind of step (`step`), denoising and decoding as a whole for each number of steps (`loop`),
            each launch (`launch`), or nothing (`off`). What cannot be recorded is tried in smaller parts.
        presets: of the conditions that are drawn faster than exactly (`read_presets`); by default none.

    Raises:
        UserError: a value cannot be used.
    """

    backend: str = "auto"
    device: int = 0
    threads: int | None = None
    precision: Precision | None = None
    plans: Path | str | None = None
    vram_budget: int | None = None
    cuda_graphs: CudaGraphs = "step"
    presets: tuple[Preset, ...] = ()

    def __post_init__(self) -> None:
        _require_one_of("backend", self.backend, BACKENDS)
        _require_one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        if self.precision is not None:
            _require_one_of("precision", self.precision, PRECISIONS)
        if not _whole(self.device) or self.device < 0:
            raise UserError(f"device must be the index of a GPU, 0 or more, not {printable(repr(self.device), 40)}")
        if self.threads is not None and not (_whole(self.threads) and 1 <= self.threads <= MAX_THREADS):
            shown = printable(repr(self.threads), 40)
            raise UserError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {shown}")
        if self.vram_budget is not None:
            if not _whole(self.vram_budget) or self.vram_budget < 1:
                shown = printable(repr(self.vram_budget), 40)
                raise UserError(f"a vram budget must be a whole number of bytes above 0, not {shown}")
            if self.backend not in _BUDGETED:
                why = "allocates while it runs" if self.backend == "onnxruntime-cuda" else "runs on the CPU"
                raise UserError(
                    f"{self.backend} {why} and cannot keep a vram budget: leave it out, or take the backend tensorrt"
                )
        if self.precision == "bf16" and self.backend != "openvino":
            raise UserError("bf16 is a precision of the backend openvino: take that backend")


def _require_one_of(what: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise unknown_choice(what, value if isinstance(value, str) else repr(value), choices)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
