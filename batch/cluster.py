"""`--ray`: batches drawn by workers of a Ray cluster.

A worker is an actor that opens the bundle once and draws one batch at a time. It gets the rows of a batch without
their pixels, reads images from the folders that it shares with this process, and writes what it draws there itself:
no image passes through Ray's object store. What a batch writes follows from its rows alone, so it does not matter who
draws it, when, or how often.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..runtime.nodes import BundleOnNodes
from ..runtime.settings.options import RuntimeOptions
from .drawing import DrawingSettings, LocalTeam, Outcome
from .outputs import Outputs
from .pool import ATTEMPTS, LOST, RayPool
from .rows import Job


class Worker:
    """An actor: a team of its own, in another process.

    Args:
        bundle: and how it gets here.
        options: where and how its graphs run.
    """

    def __init__(self, bundle: BundleOnNodes, options: RuntimeOptions) -> None:
        self._bundle = bundle
        self._options = options
        self._team: LocalTeam | None = None

    def open(self) -> str:
        """Opens the bundle. Returns the name of the backend.

        Raises:
            UserError, BackendError: as `BundleOnNodes.open`.
        """
        self._team = LocalTeam(self._bundle.open(self._options), self._options)
        return self._team.open()

    def draw(self, jobs: list[Job], outputs: Outputs, settings: DrawingSettings) -> tuple[list[Outcome], float]:
        """Draws one batch. Returns its outcomes and seconds."""
        assert self._team is not None
        [found] = self._team.draw([jobs], outputs, settings)
        return found


class RayTeam:
    """Workers on a Ray cluster.

    Args:
        address: as `RayPool` takes it.
        workers: as `RayPool` takes it.
        bundle: that draws, and how it reaches them.
        options: where and how its graphs run.
    """

    worker: type[Worker] = Worker

    def __init__(self, address: str, workers: int | None, bundle: BundleOnNodes, options: RuntimeOptions) -> None:
        arguments = (bundle, replace(options, device=0))  # Ray shows a worker its own GPU alone
        self._pool: RayPool[tuple[list[Job], Outputs, DrawingSettings]] = RayPool(
            address, workers, options, self.worker, arguments, "draw"
        )

    def open(self) -> str:
        """Connects, starts the workers and waits for the first one. Returns the name of its backend.

        Raises:
            CnppError: Ray is not installed, or the cluster does not answer.
            BackendError: the backend does not work on a worker.
        """
        return str(self._pool.open())

    def draw(
        self, batches: Iterable[list[Job]], outputs: Outputs, settings: DrawingSettings
    ) -> Iterator[tuple[list[Outcome], float]]:
        """Draws all batches. Yields the outcomes of each and its seconds, as they end.

        Raises:
            CnppError: a file cannot be written, or workers die before they draw anything.
        """
        for (jobs, *_), found in self._pool.run((jobs, outputs, settings) for jobs in batches):
            if found is not LOST:
                yield found
            elif len(jobs) > 1:
                middle = len(jobs) // 2
                self._pool.add((part, outputs, settings) for part in (jobs[:middle], jobs[middle:]))
            else:
                [job] = jobs
                error = f"each of {ATTEMPTS} workers that drew it died: look at the memory that it takes"
                yield [Outcome(job.key, error, job.images)], 0.0

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        self._pool.close()
