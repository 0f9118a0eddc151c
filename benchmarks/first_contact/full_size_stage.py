"""SD 1.5 at its full size, with random weights: how fast this GPU is, and what its plans take."""

import shutil
import subprocess
import sys
from dataclasses import replace

from ...errors import BackendError
from ...install import EXPORT_MODULES, install_command
from ...install import found as can_import
from ...messages import printable
from . import image_stages, plan_stages
from .stage import Finding, Setup

# A program, because developer/ is above the benchmarks, and is not in the wheel.
_MODEL: tuple[str, ...] = ("cnpp_trt.developer.random_models.checkpoint",)


def full_size(setup: Setup) -> Finding:
    """A checkpoint is made and exported, its plans are built, and a request is timed by what is recorded.

    What was made stays in the work folder: some 8 GiB, taken over by a second run.
    """
    own = replace(setup, bundle=setup.work / "sd15-random")
    if own.bundle is not None and not own.bundle.exists():
        _export(own)
    found = plan_stages.plans(own)
    timed = image_stages.speed(own)
    found.numbers.update(timed.numbers)
    return found


def _export(setup: Setup) -> None:
    missing = [name for name in EXPORT_MODULES if not can_import(name)]
    if missing:
        raise BackendError(f"an export lacks {', '.join(missing)}: {install_command('export')}")
    if not can_import("cnpp_trt.developer"):
        raise BackendError("developer/ makes the model, and is not here: it is in a checkout and in the sdist")
    from ...export.checkpoint import Checkpoint
    from ...export.exporter import export_bundle

    assert setup.bundle is not None
    checkpoint = setup.work / "sd15-random-checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)  # of a run that was ended
    line = [sys.executable, "-m", *_MODEL, str(checkpoint), "--cond", setup.condition]
    ended = subprocess.run(line, capture_output=True, text=True)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no word"]
        raise BackendError(f"the random model could not be made: {printable(lines[-1])}")
    export_bundle(Checkpoint(str(checkpoint)), [setup.condition], setup.bundle, precision="fp16")
    shutil.rmtree(checkpoint)
