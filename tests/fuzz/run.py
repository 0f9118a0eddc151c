"""Runs a kind of fuzzed input in a process of its own: bounded in time and memory, its folders watched."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Seconds without a new input after which the process is killed: a hang that no signal ends.
PATIENCE = 180


@dataclass(frozen=True)
class Failure:
    """An input for which the property does not hold. `what` is an exception's class and place, or what was found."""

    what: str
    message: str
    example: str


@dataclass(frozen=True)
class Outcome:
    """How a kind's inputs ended. Attributes: seconds: of the whole process, with its imports."""

    kind: str
    inputs: int
    refused: int
    accepted: int
    failures: tuple[Failure, ...]
    seconds: float

    def text(self) -> str:
        """The failures of each sort, with its shortest example, for a test's message."""
        lines = [f"{self.kind}: {self.inputs} inputs, {self.refused} refused, {len(self.failures)} failures"]
        for what, count in Counter(f.what for f in self.failures).most_common():
            first = min((f for f in self.failures if f.what == what), key=lambda f: len(f.example))
            lines.append(f"{count} x {what}: {first.message[:300]!r}\n    {first.example[:700]}")
        return "\n".join(lines)


def fuzz(kind: str, seed: int, count: int, bundle: Path, checkpoint: Path) -> Outcome:
    """Tries `count` inputs of a kind; the same seed gives the same ones.

    Args: bundle, checkpoint: of the tiny model, with `seg` and `depth`; they are only read.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-fuzz-") as name:
        sandbox = Path(name)
        for part in ("home", "current", "artifacts", "folder"):
            (sandbox / part).mkdir()
        (sandbox / "passwd").write_text("canary")
        environment = {
            **os.environ,
            "HOME": str(sandbox / "home"),
            "CNPP_TRT_HOME": str(sandbox / "artifacts"),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(sandbox / "home" / "hub"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(sandbox / "hypothesis"),
            "OMP_NUM_THREADS": "1",
        }
        line = [
            sys.executable,
            "-m",
            "fuzz.worker",
            kind,
            str(seed),
            str(count),
            str(sandbox),
            str(bundle),
            str(checkpoint),
        ]
        with (sandbox / "log").open("wb") as log:
            process = subprocess.Popen(
                line, cwd=sandbox / "current", env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            failures = _watch(process, sandbox)
        said = (sandbox / "log").read_text("utf-8", "replace")
        found = json.loads((sandbox / "outcome.json").read_text()) if (sandbox / "outcome.json").exists() else None
        if found is None:
            example = (sandbox / "example").read_text("utf-8", "replace") if (sandbox / "example").exists() else ""
            failures.append(Failure(f"process ended with {process.returncode}", said[-2_000:], example))
            found = {"inputs": 0, "refused": 0, "accepted": 0, "failures": []}
        failures += [Failure(**failure) for failure in found.pop("failures")]
        stray = [str(p.relative_to(sandbox)) for part in ("home", "current") for p in (sandbox / part).rglob("*")]
        known = {
            "home",
            "current",
            "artifacts",
            "folder",
            "hypothesis",
            "passwd",
            "example",
            "outcome.json",
            "said",
            "log",
        }
        stray += [p.name for p in sandbox.iterdir() if p.name not in known]
        # A dependency's own doings, which are judged elsewhere.
        stray = [path for path in stray if not path.startswith(("home/.cache", "home/hub", "home/.config"))]
        if stray or (sandbox / "passwd").read_text() != "canary":
            failures.append(Failure("written outside", ", ".join(sorted(stray)[:5]), ""))
    return Outcome(kind, **found, failures=tuple(failures), seconds=time.perf_counter() - start)


def _watch(process: "subprocess.Popen[bytes]", sandbox: Path) -> list[Failure]:
    """Waits for the process; kills it where it does not go on."""
    example = sandbox / "example"
    since = time.monotonic()
    last = -1.0
    while process.poll() is None:
        time.sleep(0.05)
        now = example.stat().st_mtime_ns if example.exists() else -1.0
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
            process.wait()
            return [
                Failure("hang", f"no end after {PATIENCE} s", example.read_text("utf-8", "replace") if last > 0 else "")
            ]
    return []
