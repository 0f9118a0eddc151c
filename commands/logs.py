"""Where the package's log goes while a command runs: each message alone on stderr."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .options import echo

PACKAGE = __name__.partition(".")[0]


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Prints what the package logs at level INFO and above to stderr; loggers of other packages stay as they are."""
    logger, handler = logging.getLogger(PACKAGE), _Stderr()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger would print every message again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Stderr(logging.Handler):
    """Looks `sys.stderr` up for every message, as a progress bar replaces it for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")
