"""What docs/scale.md says of batch jobs, measured: time and memory, alone and on Ray, and what kills leave.

    python -m cnpp_trt.developer.batch_scale PART [--rows 10000] [--drawn 2000] [--kills 50] [--rounds 2]

Rows of five conditions are mixed, and 20 of them are broken, each in another way. All runs of the same rows must leave
the same bytes. The parts are `count`, `draw` (alone and on Ray), `scaling` (one worker and two in turn, after a first
run of each) and `kill`: a job that is killed at random moments, its workers or the process itself, with another number
of workers each time. Prints a Markdown table of the part.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundles.bundle import Bundle, find_bundle
from ..errors import CnppError

_NAME = "CNPP_TRT_BATCH_SCALE"  # in the environment of what is started, to know its processes again
_BROKEN: tuple[Any, ...] = (
    "{broken",
    "[]",
    {"prompt": 5},
    {"prompts": "a house"},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "seed": [1, 2]},
    {"prompt": "a", "num_inference_steps": 0},
    {"prompt": "a", "num_inference_steps": 1.5},
    {"prompt": "a", "guidance_scale": "high"},
    {"prompt": "a", "scheduler": "none"},
    {"prompt": "a", "num_images_per_prompt": 99},
    {"prompt": "a", "strength": 0},
    {"prompt": "a", "clip_skip": 99},
    {"prompt": "a", "guess_mode": "yes"},
    {"prompt": "a", "controls": [{"condition": "pose", "image": "seg.png"}]},
    {"prompt": "a", "controls": [{"condition": "seg", "image": "missing.png"}]},
    {"prompt": "a", "controls": [{"condition": "seg", "image": "rows.jsonl"}]},
    {"prompt": "a", "controls": [{"condition": "seg"}]},
    {"prompt": "a", "controls": [{"condition": "seg", "image": {"bytes": "!"}}]},
    {"prompt": "a", "controls": [{"condition": "seg", "image": "seg.png", "control_guidance_end": 2}]},
)


@dataclass(frozen=True)
class Run:
    """A command that ended.

    Attributes:
        seconds: from start to end.
        peak: of its own memory, in bytes, without its workers.
        summary: what it printed as JSON.
    """

    seconds: float
    peak: int
    summary: dict[str, Any]


class Bench:
    """Commands on one bundle in one folder."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder
        self._bundle = bundle
        opened = Bundle.open(bundle)
        self._conditions = list(opened.manifest.conditions)
        for name, condition in opened.manifest.conditions.items():
            shutil.copy(opened.file(condition.get("image", "")), folder / f"{name}.png")

    def rows(self, count: int) -> Path:
        """A file of `count` rows, the broken ones spread over it."""
        path = self.folder / f"rows-{count}.jsonl"
        every = count // len(_BROKEN)
        with path.open("w", encoding="utf-8") as file:
            for i in range(count):
                condition = self._conditions[i % len(self._conditions)]
                row: Any = {
                    "prompt": f"a house and trees, number {i}",
                    "seed": i,
                    "controls": [{"condition": condition, "image": f"{condition}.png"}],
                }
                if i % every == every // 2 and i // every < len(_BROKEN):
                    row = _BROKEN[i // every]
                file.write(f"{row if isinstance(row, str) else json.dumps(row)}\n")
        return path

    def line(self, rows: Path, out: str, *options: object) -> list[str]:
        """The command line of a job."""
        words = ["batch", rows, "--out", self.folder / out, "--bundle", self._bundle, "--json"]
        return [sys.executable, "-m", "cnpp_trt", *map(str, [*words, "--backend", "onnxruntime-cpu", *options])]

    def run(self, rows: Path, out: str, *options: object) -> Run:
        """Runs a job to its end.

        Raises:
            CnppError: it did not find exactly the broken rows.
        """
        start = time.perf_counter()
        said_wrong = self.folder / f"{out}.errors"
        with said_wrong.open("wb") as errors:
            process = subprocess.Popen(self.line(rows, out, *options), stdout=subprocess.PIPE, stderr=errors)
            assert process.stdout is not None
            said = process.stdout.read()
            _, _, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        summary = json.loads(said) if said else {}
        if summary.get("wrong") != len(_BROKEN) or summary.get("failed", 0):
            raise CnppError(f"{rows.name} into {out}: {summary} {said_wrong.read_text('utf-8')[-500:]}")
        return Run(seconds, _peak(usage), summary)

    def files(self, out: str) -> dict[str, bytes]:
        """Every file that a job left, but for the times that it took."""
        folder = self.folder / out
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != "timings.jsonl")
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def done(self, out: str) -> int:
        """Requests whose record is there."""
        return sum(len(names) for _, _, names in os.walk(self.folder / out / "records"))

    def killed(self, rows: Path, out: str, kills: int, images: int, seed: int = 0) -> tuple[int, int]:
        """SIGKILL at random moments, of workers and of the process itself, and a last run to the end.

        Returns:
            Kills of the process, kills of workers.
        """
        chosen = random.Random(seed)
        processes = workers = 0
        each = max(1, images // (8 * kills))  # a killed worker's batches, and those of others, go on meanwhile
        with tempfile.TemporaryFile() as errors:
            while processes + workers < kills:
                count = chosen.choice([0, 1, 2])
                name = f"{os.getpid()}-{processes + workers}"
                options = ["--threads", 1, *(["--ray", "local", "--workers", count] if count else [])]
                process = subprocess.Popen(
                    self.line(rows, out, *options),
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, _NAME: name},
                    start_new_session=True,
                )
                while processes + workers < kills and process.poll() is None:
                    if not self._grows(process, out, each):
                        break
                    time.sleep(chosen.uniform(0, 0.3))
                    alive = _workers(name)
                    if alive and chosen.random() < 0.6:
                        with suppress(ProcessLookupError):
                            os.kill(chosen.choice(alive), signal.SIGKILL)
                            workers += 1
                        continue
                    process.kill()
                    processes += 1
                    break
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
                if self.done(out) >= images:
                    break
                _ended(name)
        self.run(rows, out, "--threads", 1)
        return processes, workers

    def _grows(self, process: subprocess.Popen[bytes], out: str, by: int) -> bool:
        """Waits for further requests to be done. Returns whether they were before the process ended."""
        wanted = self.done(out) + by
        while process.poll() is None:
            if self.done(out) >= wanted:
                return True
            time.sleep(0.02)
        return False


def _workers(name: str) -> list[int]:
    """Ray's processes that draw for the command that was started with this name."""
    return [pid for pid, command in _started(name) if command.startswith(b"ray::Worker")]


def _ended(name: str, patience: float = 30.0) -> None:
    """Waits until nothing of a killed command is left."""
    until = time.monotonic() + patience
    while _started(name) and time.monotonic() < until:
        time.sleep(0.1)


def _started(name: str) -> list[tuple[int, bytes]]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{_NAME}={name}\0".encode() in (path / "environ").read_bytes():
                found.append((int(path.name), (path / "cmdline").read_bytes().split(b"\0")[0]))
    return found


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _row(what: str, command: str, found: Run, note: str) -> str:
    return f"| {what} | `{command}` | {found.seconds:.1f} s | {found.peak / 2**20:.0f} MiB | {note} |"


def _rate(found: Run) -> float:
    """Images per second, from the first worker's opened bundle to the last image."""
    return float(found.summary["drawn"] / found.summary["seconds"])


def count_rows(bench: Bench, rows: int, drawn: int, kills: int, rounds: int) -> Iterator[str]:
    """Rows read and checked: a tenth, all, and ten times as many."""
    for count in (rows // 10, rows, rows * 10):
        found = bench.run(bench.rows(count), "checked", "--check")
        yield _row(f"{count:,} rows counted", "--check", found, f"{found.summary['wrong']} wrong")


def draw_rows(bench: Bench, rows: int, drawn: int, kills: int, rounds: int) -> Iterator[str]:
    """The same rows alone, on one worker of Ray and on two."""
    file = bench.rows(drawn)
    first = bench.run(file, "whole", "--threads", 1)
    images, whole = first.summary["images"], bench.files("whole")
    yield _row(f"{images:,} images", "--threads 1", first, f"{_rate(first):.2f} images/s")
    for workers in (1, 2):
        found = bench.run(file, f"workers-{workers}", "--threads", 1, "--ray", "local", "--workers", workers)
        note = f"{_rate(found):.2f} images/s; {_same(bench, f'workers-{workers}', whole)}"
        yield _row(f"{images:,} images", f"--ray local --workers {workers}", found, note)


def compare_workers(bench: Bench, rows: int, drawn: int, kills: int, rounds: int) -> Iterator[str]:
    """One worker and two, one process of one thread and of two, in turn, round by round.

    Two commands at once that draw the same rows into a folder each show what the machine gives two processes.
    """
    file = bench.rows(drawn)
    ways: dict[str, list[object]] = {
        f"--ray local --workers {workers}": ["--threads", 1, "--ray", "local", "--workers", workers]
        for workers in (1, 2)
    }
    ways |= {f"--threads {threads}": ["--threads", threads] for threads in (1, 2)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    twice = "two commands at once, each --threads 1"
    rates[twice] = []
    for number in range(rounds):
        for way, options in ways.items():
            found = bench.run(file, f"{way[-1]}{len(way)}-{number}", *options)
            rates[way].append(_rate(found))
            yield _row(f"round {number + 1}", way, found, f"{rates[way][-1]:.2f} images/s")
        with ThreadPoolExecutor(2) as pool:
            started = [pool.submit(bench.run, file, f"beside-{i}-{number}", "--threads", 1) for i in range(2)]
            both = [each.result() for each in started]
        rates[twice].append(sum(map(_rate, both)))
        slower = max(both, key=lambda run: run.seconds)
        yield _row(f"round {number + 1}", twice, slower, f"{rates[twice][-1]:.2f} images/s together")
    first = rates["--ray local --workers 1"]
    for way, of_way in rates.items():
        ratios = ", ".join(f"{rate / one:.2f}" for rate, one in zip(of_way, first, strict=True))
        yield f"| `{way}` beside one worker | | | | {ratios} times its images/s |"


def kill_and_go_on(bench: Bench, rows: int, drawn: int, kills: int, rounds: int) -> Iterator[str]:
    """A job that is killed again and again, beside one that is not."""
    file = bench.rows(drawn)
    images = bench.run(file, "whole", "--threads", 1).summary["images"]
    whole, start = bench.files("whole"), time.perf_counter()
    processes, workers = bench.killed(file, "killed", kills, images)
    seconds = time.perf_counter() - start
    note = f"{processes} kills of the process, {workers} of a worker; {_same(bench, 'killed', whole)}"
    yield f"| {images:,} images, SIGKILL | alone, `--workers 1`, `--workers 2` in turn | {seconds:.1f} s | – | {note} |"


PARTS = {"count": count_rows, "draw": draw_rows, "scaling": compare_workers, "kill": kill_and_go_on}


def _same(bench: Bench, out: str, whole: dict[str, bytes]) -> str:
    found = bench.files(out)
    if found != whole:
        names = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        raise CnppError(f"{out} differs in {len(names)} files: {', '.join(names[:5])}")
    return f"{len(found):,} files, the same bytes"


def _main(
    part: Annotated[str, typer.Argument(help=", ".join(PARTS))],
    rows: Annotated[int, typer.Option(help="Rows that are counted.")] = 10_000,
    drawn: Annotated[int, typer.Option(help="Rows of which images are drawn.")] = 2_000,
    kills: Annotated[int, typer.Option(help="Moments at which something is killed.")] = 50,
    rounds: Annotated[int, typer.Option(help="Of one worker and two in turn.")] = 2,
    model: str = "miniature-lcm",
) -> None:
    before = os.getloadavg()[0]
    print("| what | options | time | peak memory | result |\n|---|---|---:|---:|---|")
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-scale-") as folder:
        bench = Bench(Path(folder), find_bundle(model, "fp32", None, ("fp32",)))
        for line in PARTS[part](bench, rows, drawn, kills, rounds):
            print(line, flush=True)
    print(f"\n{os.cpu_count()} CPU cores; load average {before:.1f} before and {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    typer.run(_main)
