"""What the interfaces share: models, limits, jobs and figures; accepting, draining and stopping."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from ..bundles.bundle import Bundle
from ..runtime.pipeline import Pipeline
from ..runtime.planning import smallest_request
from ..runtime.settings.options import RuntimeOptions
from ..runtime.settings.preset import Preset
from .errors import ServiceError, refused_field
from .jobs import Jobs
from .limits import Limits
from .metrics import Metrics
from .models import Models, ServedModel, names_of
from .tasks import Order, Outcome, Task

T = TypeVar("T")


class Service:
    """The scheduler of a server.

    Args:
        models: (name, pipelines) of each, in their order; the first one serves requests that name none.
        limits: of requests.

    Attributes:
        draining: set once nothing is accepted any more.
        log_prompts: whether the access log may have prompts.
    """

    def __init__(self, models: Sequence[tuple[str, Sequence[Pipeline]]], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.models = Models(
            [ServedModel(name, pipelines, self.limits, self.metrics.batch_of(name)) for name, pipelines in models]
        )
        self.jobs = Jobs(self.limits.jobs, self.limits.job_seconds)
        self.metrics.watch(self.models)
        self.draining = False
        self.log_prompts = False
        self._threads = CapacityLimiter(2)
        self._active: set[Task] = set()

    @classmethod
    def open(
        cls, bundles: Sequence[Path], options: Sequence[RuntimeOptions], limits: Limits | None = None
    ) -> "Service":
        """Opens a pipeline of each bundle with each of the options.

        Options of one backend are workers of one model. With several backends each of them is a model of its own, whose
        name ends with the backend's.

        Raises:
            UserError: a bundle or an option cannot be used.
            BackendError: a backend does not work here.
        """
        opened = [Bundle.open(folder) for folder in bundles]
        names = names_of(bundles, [bundle.manifest for bundle in opened])
        backends = list(dict.fromkeys(each.backend for each in options))
        return cls(
            [
                (
                    name if len(backends) == 1 else f"{name}-{backend}",
                    [
                        Pipeline.open(bundle, _with_own_presets(each, bundle, opened))
                        for each in options
                        if each.backend == backend
                    ],
                )
                for name, bundle in zip(names, opened, strict=True)
                for backend in backends
            ],
            limits,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and answered without a warm-up."""
        return not self.draining and all(model.ready for model in self.models.all)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.active

    @property
    def active(self) -> tuple[Task, ...]:
        """What was accepted and has not ended, the oldest first."""
        self._active = {task for task in self._active if not task.ended}
        return tuple(sorted(self._active, key=lambda task: task.accepted))

    def start(self, *, warm: bool = True) -> None:
        """Starts the workers, each with a first picture of its own unless told otherwise."""
        for model in self.models.all:
            for worker in model.workers:
                worker.start(smallest_request(model.bundle) if warm else None)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes more than a millisecond (images decoded, encoded) beside the event loop.

        Two at a time: an image takes some hundred MiB while it is decoded, and where many threads compute, the event
        loop waits for each of them before it can answer anybody.
        """
        return await to_thread.run_sync(partial(function, *arguments), limiter=self._threads)

    @contextmanager
    def place(self, model: ServedModel) -> Iterator[None]:
        """Keeps a place in the queue while the images of a request are decoded.

        Raises:
            ServiceError: the queue is full (429), or the server is stopping (503): nothing needs to be decoded.
        """
        if self.draining:
            raise stopping()
        with self._counted():
            model.queue.keep_place()
        try:
            yield
        finally:
            model.queue.release_place()

    def require_room(self, model: ServedModel) -> None:
        """Raises ServiceError where `place` would."""
        with self.place(model):
            pass

    def submit(
        self, model: ServedModel, order: Order, timeout: float | None, owner: tuple[str, str], *, placed: bool = False
    ) -> Task:
        """Accepts a request.

        Args:
            model: that draws it.
            order: what is drawn.
            timeout: seconds; None, or more than the server allows, is the server's.
            owner: the interface and the address that it came from.
            placed: whether `place` has kept a place for it.

        Raises:
            ServiceError: the queue is full (429), or the server is stopping (503).
        """
        if self.draining:
            raise stopping()
        if timeout is not None and not timeout > 0:
            raise refused_field("timeout", "must be a number of seconds above 0")
        seconds = min(timeout or self.limits.deadline, self.limits.deadline)
        task = Task(order, time.monotonic() + seconds, owner, model.id)
        with self._counted():
            model.queue.put(task, placed=placed)
        self._active = {each for each in self._active if not each.ended} | {task}
        return task

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What is refused in it is in the figures."""
        try:
            yield
        except ServiceError as e:
            self.metrics.rejected(e.code)
            raise

    async def wait(self, task: Task) -> Outcome:
        """The outcome of a task, as soon as it is there or its deadline is over.

        Raises:
            CnppError: it failed, was cancelled or took too long.
        """
        ended = asyncio.wrap_future(task.future)
        left = task.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(left, 0) + 0.01):
                return await asyncio.shield(ended)
        except TimeoutError:
            task.expire()
            return await ended
        except asyncio.CancelledError:
            task.cancel("the client went away")
            ended.add_done_callback(_forget)
            raise

    def drain(self) -> None:
        """From now on nothing is accepted; what was accepted is finished."""
        self.draining = True
        for model in self.models.all:
            model.queue.close()

    def stop(self, seconds: float = 10.0) -> bool:
        """Ends everything: what still waits or runs is cancelled, at the next step.

        Returns:
            Whether every worker has ended within these seconds.
        """
        self.drain()
        for task in self.active:
            task.cancel("the server was stopped")
        until = time.monotonic() + seconds
        workers = [worker for model in self.models.all for worker in model.workers]
        return all([worker.stop(max(0.0, until - time.monotonic())) for worker in workers])


def stopping() -> ServiceError:
    """The error of a request that comes while the server drains."""
    return ServiceError(503, "the server is stopping: try again later", code="stopping", retry_after=5)


def _forget(future: "asyncio.Future[Outcome]") -> None:
    """Takes the exception of a task that nobody waits for, which would be complained of."""
    if not future.cancelled():
        future.exception()


def _with_own_presets(options: RuntimeOptions, bundle: Bundle, served: Sequence[Bundle]) -> RuntimeOptions:
    """The options with those presets that are of this bundle's model.

    Raises:
        UserError: one is of none that is served.
    """
    for preset in options.presets:
        if not any(_fits(preset, each) for each in served):
            preset.require_fits(bundle)
    return replace(options, presets=tuple(preset for preset in options.presets if _fits(preset, bundle)))


def _fits(preset: Preset, bundle: Bundle) -> bool:
    return not preset.model.difference(bundle.manifest, preset.condition)
