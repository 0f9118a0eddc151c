"""Jobs: requests whose result is fetched later. Finished ones are kept for a while, and so many of them."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from .errors import ServiceError
from .models import ServedModel
from .tasks import Task


@dataclass(eq=False)
class Job:
    """A task with what its client asked for.

    Attributes:
        reply: how the images are encoded: the interface's own settings.
        fetched: whether its result was told.
    """

    task: Task
    model: ServedModel
    reply: Any
    fetched: bool = False
    ended: float | None = field(default=None)


class Jobs:
    """The jobs of a server. Used from the event loop's thread alone.

    Args:
        limit: images of finished jobs that are kept.
        seconds: that a finished one is kept.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def add(self, job: Job) -> None:
        """Keeps a job."""
        self.forget_old()
        self._jobs[job.task.id] = job

    def get(self, id: str) -> Job:
        """The job of this id.

        Raises:
            ServiceError: there is none (404).
        """
        self.forget_old()
        if id not in self._jobs:
            raise ServiceError(404, "there is no such job: it was deleted, or is too old", code="job_not_found")
        return self._jobs[id]

    def remove(self, id: str) -> Job:
        """Cancels a job and forgets it.

        Raises:
            ServiceError: there is none (404).
        """
        job = self.get(id)
        job.task.cancel("the job was deleted")
        del self._jobs[id]
        return job

    @property
    def unfetched(self) -> int:
        """Jobs that are done and whose result nobody has read."""
        return sum(job.task.state == "done" and not job.fetched for job in self._jobs.values())

    def forget_old(self) -> None:
        """Drops what is finished for too long, and the oldest of too many."""
        now = time.monotonic()
        for job in self._jobs.values():
            job.task.expire()
            if job.ended is None and job.task.ended:
                job.ended = now
        finished = [id for id, job in self._jobs.items() if job.ended is not None]
        images = sum(self._jobs[id].task.order.images for id in finished)
        for id in finished:
            if images > self._limit:
                images -= self._jobs[id].task.order.images
                del self._jobs[id]
        for id in finished:
            kept = self._jobs.get(id)
            if kept is not None and kept.ended is not None and now - kept.ended > self._seconds:
                del self._jobs[id]
