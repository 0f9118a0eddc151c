"""The bounded queue of a model: oldest first, and with the oldest those that can run in its launch list."""

import threading
import time

from .errors import ServiceError, busy
from .tasks import Task


class TaskQueue:
    """Requests that wait for one of a model's workers. Safe to use from any thread.

    Args:
        limit: how many may wait.
        window: seconds that a worker waits for requests to come back that it has just answered together.
    """

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._waiting: list[Task] = []
        self._kept = 0  # places of requests that do not wait yet
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # for each image, as lately measured

    def __len__(self) -> int:
        with self._changed:
            self._forget_ended()
            return len(self._waiting)

    def keep_place(self) -> None:
        """Keeps a place for a request whose images are still decoded, until `release_place`.

        Raises:
            ServiceError: the queue is full (429): with what waits, and the places that are kept.
        """
        with self._changed:
            self._require_room()
            self._kept += 1

    def release_place(self) -> None:
        """Whoever kept a place has put its request, or has none."""
        with self._changed:
            self._kept -= 1

    def put(self, task: Task, *, placed: bool = False) -> None:
        """Adds a task.

        Args:
            task: that waits from now on.
            placed: whether a place was kept for it.

        Raises:
            ServiceError: the queue is full (429), or closed (503).
        """
        with self._changed:
            if self._closed:
                raise ServiceError(503, "the server is stopping: try again later", code="stopping", retry_after=5)
            if not placed:
                self._require_room()
            self._waiting.append(task)
            self._changed.notify_all()

    def take(self, most: int, expected: int) -> list[Task] | None:
        """The oldest task, and those of its structure, at most `most` images together, or one request.

        Args:
            most: images of one launch list.
            expected: requests that are likely to come soon: for these it waits as long as the window. Clients that
                were answered together ask again together; who is alone waits for nobody.

        Returns:
            The tasks, which have left the queue; None once it is closed and empty.
        """
        with self._changed:
            began: float | None = None
            while True:
                self._forget_ended()
                if not self._waiting:
                    if self._closed:
                        return None
                    began = None
                    self._changed.wait(1.0)
                    continue
                batch, images = self._together(most)
                began = time.monotonic() if began is None else began
                left = began + self._window - time.monotonic()
                if self._closed or images >= most or len(self._waiting) >= expected or left <= 0:
                    taken = set(map(id, batch))
                    self._waiting = [task for task in self._waiting if id(task) not in taken]
                    return batch
                self._changed.wait(left)

    def position(self, task: Task) -> int | None:
        """How many requests are before a task; None where it does not wait."""
        with self._changed:
            return next((i for i, each in enumerate(self._waiting) if each is task), None)

    def measured(self, seconds: float, images: int) -> None:
        """A batch took so long: what `Retry-After` is estimated from."""
        with self._changed:
            self._seconds += 0.3 * (seconds / images - self._seconds)

    def close(self) -> None:
        """Nothing is accepted any more; what waits is still taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def cancel_all(self, why: str) -> None:
        """Ends everything that waits."""
        with self._changed:
            for task in self._waiting:
                task.cancel(why)
            self._waiting.clear()

    def wake(self) -> None:
        """Lets workers look again: a task that waited has ended."""
        with self._changed:
            self._changed.notify_all()

    def _require_room(self) -> None:
        self._forget_ended()
        if len(self._waiting) + self._kept >= self._limit:
            seconds = self._seconds * sum(task.order.images for task in self._waiting)
            raise busy(f"{self._limit} requests wait already: try again later", seconds)

    def _forget_ended(self) -> None:
        for task in self._waiting:
            task.expire()
        self._waiting = [task for task in self._waiting if not task.ended]

    def _together(self, most: int) -> tuple[list[Task], int]:
        first = self._waiting[0]
        batch, images = [first], first.order.images
        for task in self._waiting[1:]:
            if task.order.key == first.order.key and images + task.order.images <= most:
                batch.append(task)
                images += task.order.images
        return batch, images
