"""Requests that run in a thread of the pipeline's, one after the other."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Submission(Future[T], Generic[T]):
    """A request on its way: a `concurrent.futures.Future` that can also be cancelled while it runs.

    `asyncio.wrap_future` makes it awaitable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()

    def cancel(self) -> bool:
        """Takes the request out of the queue, or ends it after its current step: `result` then raises `Cancelled`.

        Returns:
            False where it had ended.
        """
        self.stop.set()
        return super().cancel() or not self.done()


class Submissions:
    """The thread, which starts with the first submission, and its queue."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "cnpp-trt")

    def submit(self, work: Callable[[threading.Event], T]) -> Submission[T]:
        """Queues `work`, which is given the event that cancels it."""
        submission: Submission[T] = Submission()
        self._executor.submit(_run, submission, work)
        return submission

    def close(self) -> None:
        """Ends the thread once what was submitted has ended."""
        self._executor.shutdown(wait=False)


def _run(submission: Submission[T], work: Callable[[threading.Event], T]) -> None:
    if not submission.set_running_or_notify_cancel():
        return
    try:
        result = work(submission.stop)
    except BaseException as e:
        submission.set_exception(e)
    else:
        submission.set_result(result)
