"""What a terminal shows while pictures are drawn."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .options import echo

if TYPE_CHECKING:
    from ..batch.job import JobProgress

_EVERY = 30.0  # seconds between lines where stderr is no terminal


@contextmanager
def drawing() -> Iterator[Callable[[int, int], None] | None]:
    """On a terminal, a line on stderr with the time that has gone by, and a bar once steps are counted; it goes away.

    Yields:
        What to call with the steps done and the steps there are; None where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def step(done: int, total: int) -> None:
            # After the last step the decoder runs, which on a CPU takes as long as some steps do.
            what = "decoding" if done == total else "drawing"
            progress.update(task, description=f"{what} {done}/{total}", completed=done, total=total)

        yield step


@contextmanager
def counting() -> Iterator[Callable[["JobProgress"], None]]:
    """On a terminal, a bar on stderr with images/s, mean scores and an estimate; elsewhere a line now and then.

    Yields:
        What to call with the progress of a job.
    """
    if not sys.stderr.isatty():
        said = time.monotonic()

        def line(progress: "JobProgress") -> None:
            nonlocal said
            if time.monotonic() - said >= _EVERY:
                said = time.monotonic()
                left = "" if progress.left is None else f", {_duration(progress.left)} left"
                echo(f"{progress.done:,} of {progress.images:,} images, {_rate(progress)}{left}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    left_column = TextColumn("left {task.fields[left]}")
    with Progress(*columns, left_column, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the rows", total=None, left="?")

        def move(progress: "JobProgress") -> None:
            # Rich's own estimate would count what an earlier run drew.
            left = "?" if progress.left is None else _duration(progress.left)
            what = f"{progress.done:,}/{progress.images:,} {_rate(progress)}"
            bar.update(task, description=what, completed=progress.done, total=progress.images, left=left)

        yield move


def _rate(progress: "JobProgress") -> str:
    means = "".join(f", {condition} {value:.1f}" for condition, value in sorted(progress.means.items()))
    return f"{progress.rate:.2f} images/s{means}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
