"""What a terminal shows while pictures are drawn."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
