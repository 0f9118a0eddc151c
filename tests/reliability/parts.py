"""The parts of the program. Each gives a row for each kind of attempt, as it is measured."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import reliability_bundle
import reliability_process
import reliability_requests
from cnpp_trt.benchmarks.check_records import Attempts
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.runtime.pipeline import Pipeline
from fixture_cache import exported
from fuzz.run import Outcome, fuzz

SEED = 1
# So that there are over 10,000 without the last two, which are parts of their own.
COUNTS = {
    "manifest": 400, "recipe": 400, "tokenizer": 800, "plan": 800, "scheduler": 1_200, "config": 500, "weights": 500,
    "adapter": 500, "metadata": 900, "image": 1_500, "prompt": 1_000, "result": 900, "records": 800, "dataset": 800,
    "thresholds": 900, "arguments": 700, "rows": 900, "preset": 500, "service": 5_000,
}  # fmt: skip
# Bytes a request may add to the memory of a process that draws one after the other: the allocator's own noise.
GROWTH = 16 * 1024


@dataclass(frozen=True)
class Place:
    """Attributes:
    folder: for what a part writes.
    bundle, checkpoint: of the tiny model, with `seg` and `depth`; only read.
    share: of the usual counts.
    commands: of those that are killed or interrupted, the ones to try; empty is all.
    """

    folder: Path
    bundle: Path
    checkpoint: Path
    share: float = 1.0
    commands: tuple[str, ...] = ()

    def takes(self, command: str) -> bool:
        return not self.commands or command in self.commands

    def count(self, usual: int) -> int:
        return max(1, round(usual * self.share))


@dataclass(frozen=True)
class Part:
    title: str
    measure: Callable[[Place], Iterator[Attempts]]


# ---- what the fuzzers of this repository do


def fuzzed(place: Place) -> Iterator[Attempts]:
    for kind, usual in COUNTS.items():
        yield _fuzz_row(kind, _fuzz(kind, usual, place))


def commands(place: Place) -> Iterator[Attempts]:
    yield _fuzz_row("the installed command, a process each", _fuzz("command", 300, place))


def bits(place: Place) -> Iterator[Attempts]:
    outcome = _fuzz("bit", 1_000, place)
    row = _fuzz_row("a flipped bit of a bundle, then a picture", outcome)
    other = sum(f.what.startswith("OtherPicture") for f in outcome.failures)
    row["outcomes"] = {"refused": outcome.refused, "drew the same picture": outcome.accepted}
    row["wrong"] = {"drew another picture": other, "other": len(outcome.failures) - other}
    yield row


def _fuzz(kind: str, usual: int, place: Place) -> Outcome:
    outcome = fuzz(kind, SEED, place.count(usual), place.bundle, place.checkpoint)
    if outcome.failures:
        print(outcome.text(), flush=True)
    return outcome


def _fuzz_row(what: str, outcome: Outcome) -> Attempts:
    found = Counter(_sort(f.what, f.message) for f in outcome.failures)
    names = ("tracebacks", "hangs", "raw control characters", "other")
    return Attempts(
        what=what,
        tried=outcome.inputs,
        outcomes={"refused in one line": outcome.refused, "accepted": outcome.accepted},
        wrong={name: found[name] for name in names if name != "other" or found[name]},
        seconds=outcome.seconds,
        reason="",
    )


def _sort(what: str, message: str) -> str:
    found = message if what.startswith("Wrong at ") else what  # what a command did, in words
    if "hang" in found:
        return "hangs"
    if "control characters" in found:
        return "raw control characters"
    return "tracebacks" if found.startswith("a traceback") or (" at " in what and found is what) else "other"


# ---- what other test modules measure: adapters to each
#
# They give how many attempts ended in each way; the ways in `WRONG` of the module are wrong ones.


def kills(place: Place) -> Iterator[Attempts]:
    for command, kill, source in (
        ("export", reliability_bundle.kill_exports, place.checkpoint),
        ("build", reliability_bundle.kill_builds, _half(place)),
    ):
        if not place.takes(command):
            continue
        start = time.perf_counter()
        found = kill(source, place.count(100), place.folder / command)
        yield _ways(f"SIGKILL at a random moment of `{command}`", found, reliability_bundle.WRONG, start)


def signals(place: Place) -> Iterator[Attempts]:
    for command in filter(place.takes, ("run", "export", "build", "bench")):
        folder = place.folder / f"signals-{command}"
        line = reliability_process.commands(place.bundle, _half(place), place.checkpoint, folder)[command]
        start = time.perf_counter()
        found = reliability_process.interrupt(line, place.count(50), folder)
        what = f"SIGINT or SIGTERM at a random moment of `{command}`"
        yield _ways(what, found, reliability_process.WRONG, start)


def _half(place: Place) -> Path:
    """The tiny model's fp16 bundle."""
    folder = place.folder / "fp16"
    if folder.is_dir():
        return folder
    checkpoint = Checkpoint(str(place.checkpoint))
    return exported("tiny-fp16", folder, lambda out: export_bundle(checkpoint, ["seg"], out, precision="fp16"))


def _ways(what: str, found: Mapping[str, int], wrong: Collection[str], start: float) -> Attempts:
    return Attempts(
        what=what,
        tried=sum(found.values()),
        outcomes={way: count for way, count in found.items() if way not in wrong},
        wrong={way: found.get(way, 0) for way in wrong},
        seconds=time.perf_counter() - start,
        reason="",
    )


def requests(place: Place) -> Iterator[Attempts]:
    what = "mixed requests in one process"
    start = time.perf_counter()
    count = place.count(500)
    done = reliability_requests.mixed_requests(Pipeline.open(place.bundle, "onnxruntime-cpu", threads=1), count, SEED)
    growth = done.growth()
    yield Attempts(
        what=f"{what}: memory grows by {growth / 1024:.1f} KiB a request in the second half",
        tried=count,
        outcomes=dict(done.outcomes),
        wrong={"memory that grows": int(growth > GROWTH)},
        seconds=time.perf_counter() - start,
        reason="",
    )


PARTS = {
    "fuzz": Part("Files, pictures, prompts, arguments", fuzzed),
    "command": Part("The real command", commands),
    "bits": Part("A bundle's bytes", bits),
    "kills": Part("A killed process", kills),
    "signals": Part("An interrupted process", signals),
    "requests": Part("A long-lived process", requests),
}
