"""`cnpp-trt parity` as a function: compare a pipeline with PyTorch, write the result."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...export.provenance import find_source_checkpoint
from ...files import require_writable, require_writable_file
from ...places import results
from ...runtime.pipeline import Pipeline
from ..result import BenchmarkResult, default_path
from .measure import compare_with_pytorch
from .thresholds import read_thresholds


@dataclass(frozen=True)
class ParitySettings:
    """What is compared, and where the result goes.

    Attributes:
        conditions: to compare; empty takes all of the bundle's.
        images: of each condition.
        half: how many of them PyTorch generates in fp16 too; None takes all on a GPU, one of a small model on a CPU.
        steps: denoising steps; None takes the model's own.
        thresholds: a TOML file like `thresholds.toml`; what it leaves out is taken from that one.
        threads: of PyTorch on a CPU; None leaves them as they are.
        model: the checkpoint that the bundle was exported from; None takes the one that the bundle names.
        controlnets: ControlNet sources by condition, as they were exported.
        out: the result's file; None writes into the default folder.
    """

    conditions: Sequence[str] = ()
    images: int = 8
    half: int | None = None
    steps: int | None = None
    thresholds: Path | None = None
    threads: int | None = None
    model: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None


def measure_parity(deployed: Pipeline, settings: ParitySettings) -> tuple[BenchmarkResult, Path]:
    """Compares graphs, steps and images of a pipeline with PyTorch in fp32, and writes the result.

    Args:
        deployed: the pipeline to compare.
        settings: what is compared.

    Returns:
        The result, whose data is a `records.Parity`, and its file. `data["passed"]` is the gate's outcome.

    Raises:
        UserError: a setting, the checkpoint, the thresholds or the file cannot be used.
        CnppError: the reference or the pipeline failed.
    """
    if settings.out is None:
        require_writable(results())
    else:
        require_writable_file(settings.out)
    m, backend = deployed.bundle.manifest, deployed.backend.name
    conditions = list(settings.conditions or m.conditions)
    checkpoint = find_source_checkpoint(deployed.bundle, settings.model, settings.controlnets)
    thresholds = read_thresholds(deployed.precision, settings.thresholds)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = compare_with_pytorch(
        deployed, checkpoint, conditions, thresholds, images=settings.images, half=settings.half, steps=settings.steps
    )
    title = f"{m.model}, {data['precision']} on {backend}"
    result = BenchmarkResult.of(
        "parity", title, _command(deployed, conditions, settings.images), data, settings.threads
    )
    path = settings.out or default_path("parity", f"{deployed.bundle.folder.name}-{backend}")
    result.write(path)
    return result, path


def _command(deployed: Pipeline, conditions: Sequence[str], images: int) -> str:
    """The command that measures it again; without paths, which would describe the machine it was measured on."""
    m, backend = deployed.bundle.manifest, deployed.backend.name.removesuffix("-bf16")
    words = [f"cnpp-trt parity --model {shlex.quote(m.model)} --precision {deployed.precision} --backend {backend}"]
    if list(conditions) != list(m.conditions):
        words += [f"--cond {condition}" for condition in conditions]
    return " ".join([*words, f"--images {images}"])
