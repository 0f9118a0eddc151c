"""What generates images of the same requests, to be compared: the deployed pipeline, other bundles, and PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..bundles.bundle import Bundle, find_bundle, model_name
from ..errors import CnppError, UserError
from ..install import EXPORT_MODULES, cannot_import
from ..places import bundle_at
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import ResolvedRequest
from ..versions import RUNTIME_PACKAGES, installed

SUBJECT = "deployed"
PYTORCH = {"pytorch": "fp32", "pytorch-fp16": "fp16"}


class ImageGenerator(Protocol):
    """What `Pipeline` and `PyTorch` have in common."""

    def __call__(self, request: ResolvedRequest, /) -> Any:
        """Something with `images`, uint8 [B,H,W,3]."""
        ...


@dataclass(frozen=True)
class System:
    """Something that generates images for requests, and what its images depend on.

    Attributes:
        title: for people.
        conditions: that it has.
        identity: what its images depend on besides the request, JSON-able.
        open: loads it; what is loaded goes with the last reference to it.
    """

    name: str
    title: str
    conditions: tuple[str, ...]
    identity: Mapping[str, Any]
    open: Callable[[], ImageGenerator]


def title_of(pipeline: Pipeline) -> str:
    """As in `miniature, fp32 on onnxruntime-cpu`."""
    return f"{pipeline.bundle.manifest.model}, {pipeline.precision} on {pipeline.backend.name.removesuffix('-bf16')}"


def subject_system(pipeline: Pipeline) -> System:
    """The deployed pipeline as a system."""
    return _of_pipeline(SUBJECT, pipeline, lambda: pipeline)


def other_systems(
    names: Sequence[str],
    deployed: Pipeline,
    open_pipeline: Callable[[Path], Pipeline],
    model: str | None = None,
    controlnets: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> list[System]:
    """Of `pytorch`, `pytorch-fp16`, a bundle's folder, or a model whose bundle is under CNPP_TRT_HOME.

    Args:
        names: of the systems.
        deployed: the pipeline that they are compared with.
        open_pipeline: opens a bundle's folder as the deployed one was.
        model: where PyTorch finds the checkpoint of the deployed bundle; None for the embedded models.
        controlnets: the same of ControlNets, by condition.
        threads: of PyTorch on a CPU; None leaves them as they are.

    Raises:
        UserError, CnppError: the message says what is wrong and what to do.
    """
    systems = [
        _pytorch(name, deployed, model, controlnets, threads)
        if name in PYTORCH
        else _bundle(name, deployed, open_pipeline)
        for name in dict.fromkeys(names)
    ]
    taken = [SUBJECT, *(system.name for system in systems)]
    for name in taken:
        if taken.count(name) > 1:
            raise UserError(f"two systems are called {name!r}: rename the folder of one")
    return systems


def _bundle(given: str, deployed: Pipeline, open_pipeline: Callable[[Path], Pipeline]) -> System:
    m = deployed.bundle.manifest
    size = m.width, m.height
    own = bundle_at(given)
    folder = own or find_bundle(given, None, size, (m.precision,))
    other = Bundle.open(folder).manifest
    if (other.width, other.height) != size:
        raise UserError(f"{folder} generates {other.width}x{other.height}, the deployed bundle {m.width}x{m.height}")
    # Opened for its backend's name only: no graph is loaded before it generates.
    name = own.resolve().name if own else model_name(given)
    return _of_pipeline(name, open_pipeline(folder), lambda: open_pipeline(folder))


def _of_pipeline(name: str, pipeline: Pipeline, open_: Callable[[], ImageGenerator]) -> System:
    identity = {
        "bundle": pipeline.bundle.digest,
        "backend": pipeline.backend.name,
        "versions": installed(RUNTIME_PACKAGES),
    }
    return System(name, title_of(pipeline), tuple(pipeline.bundle.manifest.conditions), identity, open_)


def _pytorch(
    name: str,
    deployed: Pipeline,
    model: str | None,
    controlnets: Mapping[str, str] | None,
    threads: int | None,
) -> System:
    from ..export.provenance import find_source_checkpoint

    checkpoint = find_source_checkpoint(deployed.bundle, model, controlnets)
    try:
        import torch

        from .pytorch import PyTorch, device_of, exact_float32
    except ModuleNotFoundError as e:
        raise CnppError(cannot_import(f"--against {name}", e, *EXPORT_MODULES)) from None
    precision, device = PYTORCH[name], device_of(deployed)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    exact_float32()
    if threads is not None:
        torch.set_num_threads(threads)
    identity = {
        "base": checkpoint.fingerprint(),
        "precision": precision,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": installed(("torch", "diffusers", "transformers")),
    }
    conditions = tuple(deployed.bundle.manifest.conditions)
    return System(name, f"PyTorch, {precision}", conditions, identity, lambda: PyTorch(checkpoint, dtype, device))
