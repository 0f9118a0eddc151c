"""`consistency --ray`: prompts generated and judged by workers of a Ray cluster, on the pool of batch jobs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ...batch.pool import ATTEMPTS, LOST, RayPool
from ...errors import BackendError
from ...messages import printable
from ...runtime.nodes import BundleOnNodes
from ...runtime.pipeline import Pipeline
from ...runtime.settings.options import RuntimeOptions
from ..systems import System
from .command import ConsistencySettings, study_of
from .generating import LocalGenerator
from .study import Study


class Worker:
    """An actor: it opens the study as the driver does, and generates one prompt at a time.

    Args:
        bundle: under test, and how it gets here.
        options: where and how graphs run.
        settings: of the study, with folders that every node has.
    """

    def __init__(self, bundle: BundleOnNodes, options: RuntimeOptions, settings: ConsistencySettings) -> None:
        self._bundle = bundle
        self._options = options
        self._settings = settings
        self._study: Study | None = None

    def open(self) -> str:
        """Opens the study. Returns the name of the backend.

        Raises:
            CnppError: as `BundleOnNodes.open` and `study_of`.
        """
        deployed = Pipeline.open(self._bundle.open(self._options), self._options)
        self._study = study_of(deployed, self._settings, partial(Pipeline.open, options=self._options))
        self._generator = LocalGenerator(self._study)
        return deployed.backend.name

    def record(self, name: str, condition: str, index: int) -> Mapping[str, Any]:
        """The record of a prompt of the system of this name."""
        assert self._study is not None
        system = next(system for system in self._study.systems if system.name == name)
        return self._generator.record(system, condition, index)


class RayGenerator:
    """Workers on a Ray cluster.

    Args:
        pool: of `Worker`, opened.
    """

    def __init__(self, pool: RayPool[tuple[str, str, int]]) -> None:
        self._pool = pool

    def records(self, system: System, condition: str, pending: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        """The records of these prompts, in their order, whichever ends first.

        Raises:
            BackendError: several workers died of a prompt.
        """
        early: dict[int, Mapping[str, Any]] = {}
        left = iter(pending)
        following = next(left, None)
        for (_, _, index), found in self._pool.run((system.name, condition, index) for index in pending):
            if found is LOST:
                raise BackendError(
                    f"each of {ATTEMPTS} workers that generated prompt {index} of {condition} with "
                    f"{printable(system.name)} died: look at the memory that it takes"
                )
            early[index] = found
            while following in early:
                yield early.pop(following)
                following = next(left, None)


@contextmanager
def ray_generator(
    address: str,
    workers: int | None,
    bundle: BundleOnNodes,
    backend: str,
    options: RuntimeOptions,
    settings: ConsistencySettings,
) -> Iterator[RayGenerator]:
    """Starts the workers, and ends them afterwards.

    Args:
        address, workers: as `RayPool` takes them.
        bundle: under test.
        backend: the name of the one in this process, which the records name.
        options: where and how graphs run.
        settings: of the study, with folders in full.

    Raises:
        BackendError: workers draw on another backend.
        CnppError: as `RayPool.open`.
    """
    arguments = (bundle, replace(options, device=0), settings)
    pool: RayPool[tuple[str, str, int]] = RayPool(address, workers, options, Worker, arguments, "record")
    try:
        found = pool.open()
        if found != backend:
            raise BackendError(f"workers draw on {found}, this process on {backend}: choose one with --backend")
        yield RayGenerator(pool)
    finally:
        pool.close()
