"""The thread of a pipeline: it takes requests from its model's queue and draws them together."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import Cancelled, CnppError
from ..messages import one_line
from ..runtime.control.consistency import graded_score
from ..runtime.control.extraction import can_extract
from ..runtime.settings.request import MAX_IMAGES, Control, Request, ResolvedRequest
from .preview import Previewer
from .queue import TaskQueue
from .tasks import ControlScores, Outcome, Task

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..runtime.result import Result

logger = logging.getLogger(__name__)

_NICE = 5
"""By how much: a thread of nice 5 has a third of the share of one of nice 0 where both want the same core."""

OnBatch = Callable[[Sequence[tuple[Task, Outcome]], float], None]


class Worker:
    """Draws what a queue holds on one pipeline, in a thread of its own.

    Args:
        pipeline: that nobody else uses.
        queue: of the model, which several workers may share.
        previewer: learns from finished images.
        max_batch: images that are drawn together, 1 to 16.
        on_batch: is told of each batch: the tasks with their outcomes, and seconds.

    Attributes:
        ready: set once the warm-up is over.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        queue: TaskQueue,
        previewer: Previewer,
        max_batch: int,
        on_batch: OnBatch | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.ready = threading.Event()
        self.running: tuple[Task, ...] = ()
        self._queue = queue
        self._previewer = previewer
        self._most = max_batch
        self._on_batch = on_batch
        self._thread = threading.Thread(target=self._run, name="cnpp-trt-worker", daemon=True)

    def start(self, warm: Request | None = None) -> None:
        """Begins to work; before the first request it draws `warm`, which loads what every request needs."""
        self._warm = warm
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Waits until the queue, which must be closed, is empty. Returns: whether the thread has ended in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        _give_way()
        self._warm_up()
        self.ready.set()
        expected = 1
        while (batch := self._queue.take(self._most, expected)) is not None:
            self.running = tuple(batch)
            began = time.monotonic()
            try:
                self._serve(batch)
            except Exception as e:  # the worker must live on, whatever a request does
                logger.exception("a request failed: %s", one_line(e))
                for task in batch:
                    task.fail(CnppError("the request failed: the server's log says more"))
            finally:
                self.running = ()
            images = sum(task.order.images for task in batch)
            if any(task.state == "done" for task in batch):
                self._queue.measured(time.monotonic() - began, images)
            expected = len(batch) + len(self._queue)

    def _warm_up(self) -> None:
        if self._warm is None:
            return
        try:
            # A GPU records what it launches when a second request comes.
            result = self.pipeline(self._warm)
            if self.pipeline.backend.ahead:
                result = self.pipeline(self._warm)
            self._previewer.learn(result.latents, result.images)
        except Exception as e:  # the worker must live on
            logger.warning("the warm-up failed, requests may: %s", one_line(e))

    def _serve(self, batch: list[Task]) -> None:
        ready: list[tuple[Task, ResolvedRequest]] = []
        for task in batch:
            if not task.start():
                continue
            try:
                ready.append((task, self._prepared(task)))
            except CnppError as e:
                task.fail(e)
        if ready:
            self._draw(ready)

    def _prepared(self, task: Task) -> ResolvedRequest:
        """The request, with the conditions of its photos."""
        request = task.order.request
        if not any(task.order.photos):
            return request
        controls: list[Control] = [
            replace(control, image=self.pipeline.extract(control.condition, control.pixels)) if photo else control
            for control, photo in zip(request.controls, task.order.photos, strict=True)
        ]
        return replace(request, controls=tuple(controls))

    def _draw(self, group: list[tuple[Task, ResolvedRequest]]) -> None:
        began = time.monotonic()
        tasks = [task for task, _ in group]
        requests = [request for _, request in group]
        cancel = threading.Event()
        images = sum(task.order.images for task in tasks)
        keep = self._keeper(tasks) if any(task.order.preview for task in tasks) else None
        try:
            results = self.pipeline.batch(
                requests,
                max_images=min(max(images, 1), MAX_IMAGES),
                on_progress=partial(_progress, tasks, cancel),
                callback_on_step_end=keep,
                cancel=cancel,
            )
        except Cancelled as e:
            for task in tasks:
                task.fail(e)
            return
        except CnppError as e:
            if len(group) == 1:
                tasks[0].fail(e)
                return
            # One that fails must not fail the others; where each one alone works, together they were too many.
            self._most = max(1, images // 2)
            logger.warning("%d requests failed together, now each alone: %s", len(group), one_line(e))
            for one in group:
                self._draw([one])
            return
        done = []
        # Whoever wants no scores does not wait for those of others.
        for task, result in sorted(zip(tasks, results, strict=True), key=lambda pair: pair[0].order.score):
            if task.ended:
                continue
            try:
                scores = self._scores(result) if task.order.score else ()
            except CnppError as e:
                task.fail(e)
                continue
            outcome = Outcome(result, scores, began - task.accepted, images)
            task.finish(outcome)
            done.append((task, outcome))
        for _, outcome in done:  # clients do not wait for that
            self._previewer.learn(outcome.result.latents, outcome.result.images)
        if self._on_batch is not None:
            self._on_batch(done, time.monotonic() - began)

    def _keeper(self, tasks: list[Task]) -> Callable[[int, float, NDArray[np.float32]], None]:
        def keep(step: int, timestep: float, latents: NDArray[np.float32]) -> None:
            first = 0
            for task in tasks:
                own = latents[first : first + task.order.images]
                first += task.order.images
                if task.order.preview:
                    task.latents = own

        return keep

    def _scores(self, result: "Result") -> tuple[ControlScores, ...]:
        """As the sheet of `cnpp-trt run` has them."""
        bundle, found = self.pipeline.bundle, []
        for control, given in zip(result.request.controls, result.control_images, strict=True):
            if not can_extract(bundle, control.condition):
                continue
            extracted = tuple(self.pipeline.extract(control.condition, image) for image in result.images)
            scores = tuple(graded_score(bundle, control.condition, given, each) for each in extracted)
            found.append(ControlScores(control.condition, scores, extracted))
        return tuple(found)


def _give_way() -> None:
    """Lowers the priority of this thread, on Linux: those that answer clients come first where cores are short.

    The threads that a backend starts for its graphs inherit it, as they are loaded here.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)


def _progress(tasks: list[Task], cancel: threading.Event, done: int, total: int) -> None:
    for task in tasks:
        task.progress(done)
    if all(task.ended for task in tasks):
        cancel.set()
