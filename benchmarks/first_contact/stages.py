"""The stages in their order, what each needs, and how long it may take."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import BackendError, CnppError
from ...install import found as can_import
from ...messages import printable
from . import device_stages, full_size_stage, image_stages, plan_stages
from .stage import Finding, Setup

_TESTS = Path(__file__).parents[2] / "tests" / "gpu"


@dataclass(frozen=True)
class Stage:
    """One question to this machine, asked in a process of its own.

    Attributes:
        title: what is found out, for people.
        limit: seconds after which it is ended.
        run: finds it out; raises BackendError or UserError where the machine or a library refuses.
        needs: stages without which it makes no sense.
        full: whether it is left out of a quick run.
    """

    name: str
    title: str
    limit: float
    run: Callable[[Setup], Finding]
    needs: tuple[str, ...] = ()
    full: bool = False


def gpu_tests(setup: Setup) -> Finding:
    """The project's own tests on a GPU, where they are."""
    if not _TESTS.is_dir():
        raise BackendError("tests/gpu is not here: it is in a checkout and in the sdist")
    if not can_import("pytest"):
        raise BackendError("pytest is not installed: make test-gpu installs it")
    line = [sys.executable, "-m", "pytest", "-q", "-rs", str(_TESTS)]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=_TESTS.parents[1])
    said = [text for text in ended.stdout.splitlines() if text.strip()]
    last = printable(said[-1]) if said else "pytest printed nothing"
    if ended.returncode:
        raise CnppError(last)
    return Finding(words=last)


STAGES = (
    Stage("machine", "GPU, driver and packages", 60, device_stages.machine),
    Stage("cuda", "memory, copies and a captured graph", 60, device_stages.cuda, ("machine",)),
    Stage("libraries", "TensorRT starts", 120, device_stages.libraries, ("machine",)),
    Stage("bundle", "a model in fp16", 300, plan_stages.bundle),
    Stage(
        "small plan", "the smallest plan is built and loaded", 120, plan_stages.small_plan,
        ("libraries", "bundle", "cuda"),
    ),
    Stage("plans", "every plan of two conditions is built", 600, plan_stages.plans, ("small plan",)),
    Stage("graphs", "each graph against ONNX Runtime on the CPU", 120, image_stages.graphs, ("plans",)),
    Stage("ladder", "recorded images are those of plain launches", 180, image_stages.ladder, ("plans",)),
    Stage("images", "an image against the CPU backend's", 120, image_stages.images, ("plans",)),
    Stage("eviction", "conditions in turn within a memory budget", 120, image_stages.eviction, ("plans",)),
    Stage(
        "onnxruntime-cuda", "ONNX Runtime's CUDA provider draws the image", 180, image_stages.onnxruntime_cuda,
        ("cuda", "bundle"),
    ),
    Stage("leaks", "memory and threads over many requests", 300, image_stages.leaks, ("images",)),
    Stage("speed", "a request by what is recorded", 300, image_stages.speed, ("images",)),
    Stage(
        "full size", "a request of SD 1.5 with random weights, by what is recorded", 1800, full_size_stage.full_size,
        ("images",), full=True,
    ),
    Stage("tests", "the project's own tests on a GPU", 1800, gpu_tests, ("machine",), full=True),
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}
DRAWS = ("images", "onnxruntime-cuda")
"""The stages that draw an image on the GPU and compare it."""
