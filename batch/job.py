"""A job from its rows to its results: read, checked, arranged into batches, drawn, written."""

import hashlib
import json
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..bundles.bundle import Bundle
from ..errors import CnppError, UserError
from ..files import Busy, exclusive, new_partial_folder, partial_folders, remove_folder, replace_file
from ..messages import one_line, printable
from ..runtime.settings.preset import Preset
from ..schema import Record, SchemaError, decode, read_bounded, to_json
from .drawing import DrawingSettings, Outcome
from .outputs import ImageFormat, Outputs
from .planning import Counts, JobPlan
from .reading import read_lines
from .results import require_parquet, timings, write_results
from .rows import Job, RowReader

logger = logging.getLogger(__name__)

HEADER = "job.json"
TIMINGS = "timings.jsonl"
SHOWN = 50
"""Wrong rows that are told one by one; all of them are in the results."""
DEFAULT_BATCH = 4
_PLAN = "plan"  # of the hidden folder in which a process keeps its rows
_BYTES_PER_PIXEL = 2.0  # of a PNG with its metadata, where nothing was drawn yet


class Team(Protocol):
    """What draws batches: this process, or workers elsewhere."""

    def open(self) -> str:
        """Opens the bundle. Returns the name of the backend."""
        ...

    def draw(
        self, batches: Iterable[list[Job]], outputs: Outputs, settings: DrawingSettings
    ) -> Iterator[tuple[list[Outcome], float]]:
        """Draws all batches. Yields the outcomes of each and its seconds, in any order."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


@dataclass(frozen=True)
class JobSettings:
    """What a job is, beside its rows.

    Attributes:
        jobs: the file or folder of its rows.
        out: the folder of all that it writes.
        threads: of a backend on the CPU; the images depend on it.
        batch_size: images of one list of launches; None: 1 with TensorRT, else 4.
        strict: whether wrong rows end the job before anything is drawn.
        parquet: whether `results.parquet` is written too.
        shard_size: images of a tar shard; None writes none.
        presets: of conditions that are drawn faster than exactly; rows may still say otherwise.
    """

    jobs: Path
    out: Path
    bundle: Bundle
    threads: int
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    batch_size: int | None = None
    image_format: ImageFormat = "png"
    quality: int = 90
    strict: bool = False
    parquet: bool = False
    shard_size: int | None = None
    presets: tuple[Preset, ...] = ()


class _Header(Record):
    """Everything beside its rows that the files of a job depend on."""

    bundle: str
    backend: str
    threads: int
    batch_size: int
    image_format: str
    quality: int
    filter: list[str]
    tries: int
    scored: bool


@dataclass
class JobProgress:
    """How far a job is.

    Attributes:
        images: of the whole job.
        done: of these, those that are there.
        drawn: by this run.
        seconds: since this run began to draw.
        means: the mean score of each condition, of what this run drew.
    """

    images: int
    done: int
    drawn: int = 0
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Images per second of this run; 0 before the first."""
        return self.drawn / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that are left at this rate; None before the first image."""
        return (self.images - self.done) / self.rate if self.rate else None


@dataclass(frozen=True)
class Check:
    """What a job would be.

    Attributes:
        counts: of its rows, requests and batches.
        bytes: that its images take, by those that are there, else by their pixels.
        hours: that the missing ones take, by the batches that were drawn into this folder; None before those.
    """

    counts: Counts
    bytes: int
    hours: float | None


@dataclass(frozen=True)
class Summary:
    """What a run of a job did.

    Attributes:
        counts: at its end.
        failed: requests that could not be drawn.
        progress: at its end.
    """

    counts: Counts
    failed: int
    progress: JobProgress


def check_job(settings: JobSettings) -> Check:
    """Reads and checks every row, and draws nothing.

    Raises:
        UserError: the file of the rows cannot be read; with `strict` also for a wrong row.
    """
    outputs = Outputs(settings.out, settings.image_format, settings.quality)
    with tempfile.TemporaryDirectory(prefix="cnpp-trt-") as folder:
        plan = _plan(settings, Path(folder), settings.batch_size or DEFAULT_BATCH, outputs)
        counts = plan.counts()
        records = (record for record in map(outputs.read, plan.requests()) if record is not None)
        size = sum(image.size for record in records for image in record.images)
        plan.close()
    m = settings.bundle.manifest
    known = counts.images_done and size / counts.images_done
    each = known or _BYTES_PER_PIXEL * m.width * m.height
    seconds = _seconds_per_image(settings.out / TIMINGS)
    missing = counts.images - counts.images_done
    return Check(counts, round(each * counts.images), None if seconds is None else missing * seconds / 3600)


def run_job(settings: JobSettings, team: Team, on_progress: Callable[[JobProgress], None] | None = None) -> Summary:
    """Draws what is missing of a job and writes its results.

    Args:
        settings: of the job.
        team: that draws; it is closed at the end.
        on_progress: is told after each batch.

    Raises:
        UserError: the rows cannot be read, the folder holds another job or another process writes it; with `strict`
            also for a wrong row.
        CnppError: a file cannot be written, or the backend does not work.
    """
    if settings.parquet:
        require_parquet()
    with ExitStack() as stack:
        stack.callback(team.close)
        stack.enter_context(_alone(settings.out))
        backend = team.open()
        drawing = _require_same_job(settings, backend)
        outputs = Outputs(settings.out.absolute(), settings.image_format, settings.quality)
        outputs.remove_partial()
        for left in partial_folders(settings.out / _PLAN):
            remove_folder(left)
        folder = new_partial_folder(settings.out / _PLAN)
        stack.callback(remove_folder, folder)
        plan = _plan(settings, folder, drawing.batch_size, outputs)
        stack.callback(plan.close)
        progress = _draw(settings, team, plan, outputs, drawing, on_progress)
        outputs.remove_partial()  # of workers that died
        plan.mark_done(key for key in plan.requests() if outputs.read(key) is not None)
        write_results(plan, outputs, parquet=settings.parquet, shard_size=settings.shard_size)
        counts = plan.counts()
        return Summary(counts, counts.requests - counts.done, progress)


def _draw(
    settings: JobSettings,
    team: Team,
    plan: JobPlan,
    outputs: Outputs,
    drawing: DrawingSettings,
    on_progress: Callable[[JobProgress], None] | None,
) -> JobProgress:
    counts = plan.counts()
    progress = JobProgress(counts.images, counts.images_done)
    sums: dict[str, tuple[float, int]] = {}
    start = time.perf_counter()
    with timings(settings.out / TIMINGS) as append:
        for outcomes, seconds in team.draw(plan.pending(), outputs, drawing):
            for outcome in outcomes:
                if outcome.error:
                    plan.mark_failed(outcome.key, outcome.error)
                    continue
                for condition, value in outcome.scores:
                    total, number = sums.get(condition, (0.0, 0))
                    sums[condition] = (total + value, number + 1)
            drawn = sum(outcome.images for outcome in outcomes if not outcome.error)
            append({"seconds": round(seconds, 4), "images": drawn, "requests": [outcome.key for outcome in outcomes]})
            progress.drawn += drawn
            progress.done += sum(outcome.images for outcome in outcomes if outcome.new)
            progress.seconds = time.perf_counter() - start
            progress.means = {condition: total / number for condition, (total, number) in sums.items()}
            if on_progress is not None:
                on_progress(progress)
    return progress


def _plan(settings: JobSettings, folder: Path, batch_size: int, outputs: Outputs) -> JobPlan:
    """Reads all rows into a plan below `folder`, and looks at which requests are done."""
    try:
        return _planned(settings, folder, batch_size, outputs)
    except sqlite3.Error as e:  # its disk is full, as a rule
        raise CnppError(
            f"cannot keep the rows of the job in {printable(folder)} ({one_line(e)}): free some space"
        ) from e


def _planned(settings: JobSettings, folder: Path, batch_size: int, outputs: Outputs) -> JobPlan:
    plan = JobPlan(folder, batch_size)
    reader = RowReader(settings.bundle, lambda content: _keep(folder, content), settings.presets)
    wrong = 0
    for line in read_lines(settings.jobs):
        found: Job | str
        try:
            found = line.error if line.value is None else reader.read(line.value, line.folder)
        except UserError as e:
            found = one_line(e, 1000)
        if isinstance(found, str):
            wrong += 1
            if wrong <= SHOWN:
                logger.warning(f"{printable(line.file)}, line {line.number}: {found}")
        plan.add(line, found)
    if wrong > SHOWN:
        logger.warning(f"{wrong - SHOWN:,} further rows are wrong: the results have them all")
    if wrong and settings.strict:
        plan.close()
        raise UserError(f"{wrong:,} rows of {printable(settings.jobs)} are wrong: nothing was drawn")
    plan.arrange()
    plan.mark_done(key for key in plan.requests() if outputs.read(key) is not None)
    return plan


def _keep(folder: Path, content: bytes) -> Path:
    """Stores the bytes of an embedded image for as long as the job runs, once for all rows that have it."""
    name = hashlib.sha256(content).hexdigest()
    path = (folder / name[:2] / name).absolute()
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return path


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        with exclusive(out / ".lock", out, wait=False):
            yield
    except Busy:
        raise UserError(f"another process draws into {printable(out)}: wait for it, or choose another --out") from None


def recorded(out: Path) -> dict[str, Any]:
    """What the job in a folder was begun with, by the fields of its header; empty where there is none.

    Raises:
        UserError: the header is damaged.
    """
    path = out / HEADER
    try:
        header: dict[str, Any] = json.loads(to_json(decode(read_bounded(path), _Header)))
    except FileNotFoundError:
        return {}
    except (OSError, SchemaError) as e:
        raise UserError(f"cannot read {printable(path)} ({one_line(e)}): choose another --out") from None
    return header


def _require_same_job(settings: JobSettings, backend: str) -> DrawingSettings:
    """Writes the header of a new job, or finds out whether the one that is there is this one's.

    Returns:
        The settings with the batch size decided.

    Raises:
        UserError: the folder holds a job whose images would be others.
    """
    size = settings.batch_size or (1 if backend.startswith("tensorrt") else DEFAULT_BATCH)
    drawing = DrawingSettings(size, settings.drawing.keep, settings.drawing.tries, settings.drawing.scored)
    header = _Header(
        bundle=settings.bundle.digest,
        backend=backend,
        threads=0 if "cuda" in backend or backend.startswith("tensorrt") else settings.threads,
        batch_size=size,
        image_format=settings.image_format,
        quality=0 if settings.image_format == "png" else settings.quality,
        filter=[f"score.{term.condition} {term.sign} {term.limit:g}" for term in drawing.keep.terms],
        tries=drawing.tries,
        scored=drawing.scored,
    )
    before = recorded(settings.out)
    if not before:
        replace_file(settings.out / HEADER, to_json(header))
        return drawing
    differences = _differences(before, json.loads(to_json(header)))
    if differences:
        raise UserError(
            f"{printable(settings.out)} holds a job with {'; '.join(differences)}: choose another --out, or the same "
            "options"
        )
    return drawing


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return printable(" and ".join(map(str, value)) or "none", 80)
        return printable(value, 16) if isinstance(value, str) else str(value)

    names = [name for name in now if before.get(name) != now[name]]
    return [f"{name.replace('_', ' ')} {shown(before.get(name))} instead of {shown(now[name])}" for name in names]


def _seconds_per_image(path: Path) -> float | None:
    """By the lines of `timings.jsonl`; None where there are none."""
    seconds, images = 0.0, 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = decode(line, dict[str, Any])
                    seconds, images = seconds + float(record["seconds"]), images + int(record["images"])
                except (SchemaError, LookupError, TypeError, ValueError):
                    continue
    except OSError:
        return None
    return seconds / images if images else None


def physical_cores() -> int:
    """Those that this process may use, as backends count them by default.

    A job is begun with a number, because the images depend on it by rounding.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text("ascii"))
        except OSError:
            cores.add(str(number))
    return max(1, len(cores))
