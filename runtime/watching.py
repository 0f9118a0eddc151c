"""Callbacks, progress and cancellation between steps, which never let a GPU wait."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Cancelled
from .backends.interface import Backend, Stopwatch
from .loop import Program

OnStepEnd = Callable[[int, float, NDArray[np.float32]], None]
OnProgress = Callable[[int, int], None]


class Watcher:
    """Tells of steps when they have ended, while the backend may be at the next one.

    Args:
        program: whose steps are launched.
        backend: that runs them; it says how many steps it may be `ahead`.
        clock: marks the time of `on_step_end` as a stage of its own.
        timesteps: of every step, [N].
        on_step_end, on_progress, cancel: as `Pipeline.__call__` takes them.
    """

    def __init__(
        self,
        program: Program,
        backend: Backend,
        clock: Stopwatch,
        timesteps: Sequence[float] | NDArray[Any],
        on_step_end: OnStepEnd | None,
        on_progress: OnProgress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._program = program
        self._backend = backend
        self._clock = clock
        self._timesteps = timesteps
        self._on_step_end = on_step_end
        self._on_progress = on_progress
        self._cancel = cancel
        self._pending: deque[tuple[int, Callable[[], NDArray[Any]]]] = deque()

    def launched(self, k: int) -> None:
        """Step k was launched, step k + 1 was not.

        Raises:
            Cancelled: by `cancel` or by a callback.
        """
        if self._on_step_end is not None:
            self._pending.append((k, self._backend.snapshot(self._program.state(k + 1).part(0))))
        elif self._on_progress is not None or self._cancel is not None:
            self._pending.append((k, self._backend.snapshot(self._program.workspace.magnitude())))
        while len(self._pending) > self._backend.ahead:
            self._tell()

    def finish(self) -> None:
        """Everything was launched: tells what was not told yet."""
        while self._pending:
            self._tell()

    def require_not_cancelled(self) -> None:
        """Raises Cancelled once that was asked for."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled

    def _tell(self) -> None:
        k, read = self._pending.popleft()
        content = read()
        if self._on_step_end is not None:
            self._on_step_end(k, float(self._timesteps[k]), content)
            self._clock.mark("callback")
        if self._on_progress is not None:
            self._on_progress(k + 1, len(self._timesteps))
        self.require_not_cancelled()
