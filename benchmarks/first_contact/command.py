"""Every stage in its order: what `cnpp-trt first-contact` does, and the lines that a person pastes."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import CnppError, UserError
from ...files import require_writable
from ...messages import printable
from ..check_records import FirstContact, StageFinding
from ..environment import environment
from ..result import BenchmarkResult, read_result
from .stage import WORKS, Setup
from .stages import DRAWS, STAGES, Stage

logger = logging.getLogger(__name__)

PASTE_LINES = 40
# Seconds of a quick run: what has not begun by then is left for the next one, which takes over what is known.
QUICK = 330.0
_TAIL = 20


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        out: the result's file; what an earlier run of this version on this machine found there is taken over.
        work: a folder for bundle and plans, kept from run to run.
        bundle: an fp16 bundle; None takes the embedded model.
        condition: that is drawn.
        device: the index of the GPU.
        full: whether stages take their time and the GPU's own tests are run.
        again: whether nothing is taken over.
        limit: seconds for each stage instead of its own limit.
    """

    out: Path
    work: Path
    bundle: Path | None = None
    condition: str = "seg"
    device: int = 0
    full: bool = False
    again: bool = False
    limit: float | None = None


def first_contact(settings: Settings) -> BenchmarkResult:
    """Runs the stages, each in a process of its own, and writes the result after each.

    Raises:
        UserError: the result cannot be written.
    """
    require_writable(settings.out.parent)
    settings.work.mkdir(parents=True, exist_ok=True)
    setup = Setup(settings.work.absolute(), settings.bundle, settings.condition, settings.device, settings.full)
    known = {} if settings.again else _known(settings)
    found: list[StageFinding] = []
    start = time.monotonic()
    for stage in STAGES:
        if stage.name in known and known[stage.name]["verdict"] in WORKS:
            found.append(known[stage.name])
        else:
            left = QUICK - (time.monotonic() - start)
            limit = settings.limit or (None if settings.full else min(stage.limit, left))
            found.append(run_stage(stage, setup, found, limit))
        _result(found, settings).write(settings.out)
        logger.info(f"{stage.name}: {found[-1]['verdict']}" + (f", {found[-1]['words']}" if found[-1]["words"] else ""))
    return _result(found, settings)


def exit_status(contact: FirstContact) -> int:
    """0 where a GPU drew the right image and nothing failed, 3 where it did so with restrictions, 1 where none did."""
    verdicts = {stage["name"]: stage["verdict"] for stage in contact["stages"]}
    drew = [name for name in DRAWS if verdicts.get(name) in WORKS]
    if not drew:
        return 1
    wrong = [name for name, verdict in verdicts.items() if verdict in ("failed", "timed out")]
    if "images" in drew and not wrong and verdicts.get("ladder") == "ok":
        return 0
    return 3


def paste(result: BenchmarkResult) -> str:
    """At most 40 lines that say what was found, without names of hosts, folders or users."""
    contact: Any = result.data
    status = {0: "a GPU draws the right image", 3: "a GPU draws the right image, with restrictions", 1: "no GPU draws"}
    lines = [f"cnpp-trt first contact: {status[exit_status(contact)]} ({contact['mode']}, {result.created})"]
    for stage in contact["stages"]:
        numbers = ", ".join(f"{name} {value}" for name, value in stage["numbers"].items())
        told = "; ".join(filter(None, [stage["words"], numbers]))
        lines.append(printable(f"{stage['verdict']} {stage['name']}, {stage['seconds']:.1f} s: {told}", 600))
    for stage in contact["stages"]:
        if stage["verdict"] in ("failed", "timed out"):
            lines += [f"{stage['name']} said: {printable(line, 200)}" for line in stage["said"][-4:]]
    return "\n".join(lines[:PASTE_LINES])


def run_stage(stage: Stage, setup: Setup, found: Sequence[StageFinding], limit: float | None = None) -> StageFinding:
    """Runs a stage in a process of its own, unless it needs what did not work.

    Args:
        stage: what is run.
        setup: what it is told.
        found: by the stages before it.
        limit: seconds, instead of its own limit.
    """
    verdicts = {one["name"]: one["verdict"] for one in found}
    made = StageFinding(
        name=stage.name, title=stage.title, verdict="skipped", words="", numbers={}, seconds=0.0, said=[]
    )
    if stage.full and not setup.full:
        return {**made, "words": "in a full run only"}
    if lacking := [need for need in stage.needs if verdicts[need] not in WORKS]:
        return {**made, "words": f"needs {lacking[0]}, which was {verdicts[lacking[0]]}"}
    if limit is not None and limit < 1:
        return {**made, "words": "there was no time left in a quick run: run it again, which goes on here, or --full"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-contact-") as folder:
        file = Path(folder) / "finding.json"
        fields = {**asdict(setup), "work": str(setup.work), "bundle": setup.bundle and str(setup.bundle.absolute())}
        line = [sys.executable, "-m", f"{__package__}.child", stage.name, json.dumps(fields), str(file)]
        limit = limit or stage.limit * (3 if setup.full else 1)
        status, said = _ended(line, limit)
        made["seconds"] = round(time.perf_counter() - start, 2)
        made["said"] = [printable(_private(text, setup), 400) for text in said.splitlines()[-_TAIL:] if text.strip()]
        if status is None:
            return {**made, "verdict": "timed out", "words": f"it did not end within {limit:g} s"}
        try:
            read: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            return {**made, "verdict": "failed", "words": f"its process ended with status {status}"}
    words = printable(_private(read["words"], setup), 600)
    return {**made, "verdict": read["verdict"], "words": words, "numbers": read["numbers"]}


def _ended(line: Sequence[str], limit: float) -> tuple[int | None, str]:
    """The exit status of a process and what it printed; None where it took longer."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(line, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started: the GPU's tests run in a process more
                process.wait()
        said.seek(0)
        return status, said.read()[-100_000:]


def _private(text: str, setup: Setup) -> str:
    """`text` without the folders of this machine and its user."""
    own = Path(__file__).parents[2]
    places = ((setup.bundle, "BUNDLE"), (setup.work, "WORK"), (own, "cnpp_trt"), (Path(sys.prefix), "PREFIX"))
    for folder, stands in (*places, (Path.home(), "~")):
        if folder is not None:
            text = text.replace(str(folder.absolute()), stands).replace(str(folder.resolve()), stands)
    return text


def _known(settings: Settings) -> dict[str, StageFinding]:
    """What an earlier run found with the same version and packages, on the same GPU, model and condition."""
    try:
        before = read_result(settings.out)
    except UserError:
        return {}
    same = ("cnpp-trt", "commit", "gpu", "versions", "python")
    here: dict[str, Any] = json.loads(json.dumps(environment()))
    facts = _comparable(here), _comparable(before.environment)
    data: Any = before.data
    if before.kind != "first_contact" or any(facts[0].get(name) != facts[1].get(name) for name in same):
        return {}
    if (data["condition"], data["mode"]) != (settings.condition, _mode(settings)):
        return {}
    return {stage["name"]: stage for stage in data["stages"]}


def _comparable(facts: Any) -> dict[str, Any]:
    """Facts of an environment that do not change from minute to minute."""
    gpu = facts.get("gpu") or {}
    return {**facts, "gpu": {name: gpu.get(name) for name in ("name", "driver_version", "memory.total")}}


def _mode(settings: Settings) -> str:
    return "full" if settings.full else "quick"


def _result(found: Sequence[StageFinding], settings: Settings) -> BenchmarkResult:
    flags = [" --full" if settings.full else "", f" --cond {settings.condition}", f" --device {settings.device}"]
    contact = FirstContact(mode=_mode(settings), condition=settings.condition, stages=list(found))
    gpu = next((stage["numbers"].get("gpu", "no GPU") for stage in found if stage["name"] == "machine"), "no GPU")
    return BenchmarkResult.of("first_contact", str(gpu), "cnpp-trt first-contact" + "".join(flags), contact)


def require_fp16(bundle: Path | None) -> Path | None:
    """The bundle to run with: the one given, the embedded model's in fp16 where it is there, else None."""
    from ...bundles.bundle import Bundle
    from ...bundles.library import find_bundle

    if bundle is not None:
        Bundle.open(bundle)
        return bundle
    try:
        return find_bundle("miniature", "fp16")
    except CnppError:
        return None
