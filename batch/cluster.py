"""`--ray`: batches drawn by workers of a Ray cluster.

A worker is an actor that opens the bundle once and draws one batch at a time. It gets the rows of a batch without
their pixels, reads images from the folders that it shares with this process, and writes what it draws there itself:
no image passes through Ray's object store. What a batch writes follows from its rows alone, so it does not matter who
draws it, when, or how often.
"""

import logging
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..bundles.bundle import Bundle
from ..errors import BackendError, CnppError
from ..install import cannot_import
from ..messages import one_line, printable
from ..runtime.settings.options import RuntimeOptions
from .drawing import DrawingSettings, LocalTeam, Outcome
from .outputs import Outputs
from .rows import Job

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that may die of a batch before it is halved, or given up where it is one request."""
_OBJECT_STORE = 80 << 20  # bytes: Ray's least; nothing large is put there
_PATIENCE = 10.0  # seconds
_ON_CPU = ("onnxruntime-cpu", "openvino")


class Worker:
    """An actor: a team of its own, in another process.

    Args:
        bundle: its folder, as it is called on every node.
        digest: that the bundle must have.
        options: where and how its graphs run.
    """

    def __init__(self, bundle: Path, digest: str, options: RuntimeOptions) -> None:
        self._folder = bundle
        self._digest = digest
        self._options = options
        self._team: LocalTeam | None = None

    def open(self) -> str:
        """Opens the bundle. Returns the name of the backend.

        Raises:
            BackendError: the bundle is another one than the job's.
        """
        bundle = Bundle.open(self._folder)
        if bundle.digest != self._digest:
            raise BackendError(f"{printable(self._folder)} is another bundle on a worker: copy the job's to every node")
        self._team = LocalTeam(bundle, self._options)
        return self._team.open()

    def draw(self, jobs: list[Job], outputs: Outputs, settings: DrawingSettings) -> tuple[list[Outcome], float]:
        """Draws one batch. Returns its outcomes and seconds."""
        assert self._team is not None
        [found] = self._team.draw([jobs], outputs, settings)
        return found


@dataclass(frozen=True)
class _Task:
    """A batch, and how many workers died of it."""

    jobs: list[Job]
    deaths: int = 0


class RayTeam:
    """Workers on a Ray cluster.

    Args:
        address: `local` starts Ray on this machine; else that of a cluster, or `auto`.
        workers: how many; None: one for each GPU, or for as many CPUs as a worker has threads. More than fit wait
            until the cluster has grown.
        bundle: that draws, in a folder that every node has.
        options: where and how its graphs run.
    """

    worker: type[Worker] = Worker

    def __init__(self, address: str, workers: int | None, bundle: Bundle, options: RuntimeOptions) -> None:
        self._address = address
        self._workers = workers
        self._bundle = bundle
        self._options = options
        self._ray: Any = None
        self._started = False
        self._streams = ExitStack()
        self._idle: list[Any] = []
        self._backend = ""
        self._deaths_before_opening = 0
        # What an actor is doing: opening the bundle, where the task is None, or drawing.
        self._running: dict[Any, tuple[Any, _Task | None]] = {}

    def open(self) -> str:
        """Connects, starts the workers and waits for the first one. Returns the name of its backend.

        Raises:
            CnppError: Ray is not installed, or the cluster does not answer.
            BackendError: the backend does not work on a worker.
        """
        try:
            self._ray = ray = import_module("ray")
        except ImportError as e:
            raise CnppError(cannot_import("--ray", e, "ray")) from None
        self._connect()
        resources = ray.cluster_resources()
        on_gpu = self._options.backend not in _ON_CPU and resources.get("GPU", 0) >= 1
        threads = self._options.threads or 1
        fitting = resources.get("GPU", 0) if on_gpu else resources.get("CPU", 1) // threads
        count = self._workers or max(1, int(fitting))
        self._actor_options = {"num_cpus": 1 if on_gpu else threads, "num_gpus": int(on_gpu), "max_restarts": 0}
        for _ in range(count):
            self._hire()
        while not self._backend:
            for actor, _ in self._finished():
                self._idle.append(actor)
        return self._backend

    def draw(
        self, batches: Iterable[list[Job]], outputs: Outputs, settings: DrawingSettings
    ) -> Iterator[tuple[list[Outcome], float]]:
        """Draws all batches. Yields the outcomes of each and its seconds, as they end.

        Raises:
            CnppError: a file cannot be written, or workers die before they draw anything.
        """
        coming = iter(batches)
        again: deque[_Task] = deque()
        more = True
        while True:
            while self._idle:
                task = again.popleft() if again else next((_Task(jobs) for jobs in coming), None)
                if task is None:
                    more = False
                    break
                actor = self._idle.pop()
                self._running[actor.draw.remote(task.jobs, outputs, settings)] = (actor, task)
            if not (more or again or any(task for _, task in self._running.values())):
                return  # workers that still wait for a place are not needed
            for actor, found in self._finished():
                if isinstance(found, _Task):  # its worker died
                    yield from self._retry(found, again)
                    continue
                self._idle.append(actor)
                if found is not None:
                    yield found

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        if self._started:
            self._started = False
            self._ray.shutdown()
        self._streams.close()

    def _connect(self) -> None:
        arguments: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        arguments["address"] = self._address  # `local` counts for more than Ray's own variable RAY_ADDRESS
        if self._address == "local":
            arguments |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
            if self._workers is not None:
                arguments["num_cpus"] = self._workers * (self._options.threads or 1)
        else:
            self._require_answer()
        main = threading.current_thread() is threading.main_thread()
        before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._ray.init(**arguments)
        except (ConnectionError, RuntimeError, ValueError, OSError) as e:
            raise CnppError(f"cannot reach a Ray cluster at {printable(self._address)}: {one_line(e)}") from None
        finally:
            for kind, handler in before.items():
                if main and handler is not None:
                    signal.signal(kind, handler)  # Ray sets its own, which would end this process without a word
        self._started = True
        # From now on a thread of Ray's tells of lost nodes with `print`: results alone belong on stdout.
        self._streams.enter_context(redirect_stdout(sys.stderr))

    def _require_answer(self) -> None:
        """Looks whether anybody listens at HOST:PORT: Ray itself would try for minutes."""
        host, _, port = self._address.rpartition("://")[2].rpartition(":")
        if not host or not port.isdecimal():
            return
        try:
            socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
        except (OSError, OverflowError, UnicodeError) as e:
            raise CnppError(f"cannot reach a Ray cluster at {printable(self._address)}: {one_line(e)}") from None

    def _hire(self) -> None:
        """Starts a worker, which waits until the cluster has room for it."""
        made = self._ray.remote(self.worker).options(**self._actor_options)
        options = replace(self._options, device=0)  # Ray shows a worker its own GPU alone
        actor = made.remote(self._bundle.folder.absolute(), self._bundle.digest, options)
        self._running[actor.open.remote()] = (actor, None)

    def _finished(self) -> list[tuple[Any, Any]]:
        """Waits for one call to end. Returns its actor with what it drew, None where it opened, its task where it died.

        Raises:
            CnppError: what the call raised, which is of no single request.
        """
        [ended], _ = self._ray.wait(list(self._running), num_returns=1)
        actor, task = self._running.pop(ended)
        try:
            found = self._ray.get(ended)
        except self._ray.exceptions.RayTaskError as e:
            cause = e.cause if isinstance(e.cause, Exception) else e
            if isinstance(cause, CnppError):
                raise cause from None
            raise CnppError(f"a worker failed: {one_line(cause)}") from None
        except self._ray.exceptions.RayError as e:  # the process or its node is gone
            logger.info(f"a worker was lost: {one_line(e, 100)}")
            self._hire()
            if task is not None:
                return [(actor, task)]
            self._deaths_before_opening += 1
            if self._deaths_before_opening > ATTEMPTS * max(1, self._workers or 1):
                raise BackendError(
                    f"workers die before they draw ({one_line(e)}): look at Ray's logs, or draw without --ray"
                ) from None
            return []
        if task is not None:
            return [(actor, found)]
        if self._backend and found != self._backend:
            raise BackendError(f"one worker draws on {found}, another on {self._backend}: choose one with --backend")
        self._backend, self._deaths_before_opening = found, 0
        return [(actor, None)]

    def _retry(self, task: _Task, again: "deque[_Task]") -> Iterator[tuple[list[Outcome], float]]:
        """Puts the batch of a dead worker back, halved where it killed several."""
        deaths = task.deaths + 1
        if deaths < ATTEMPTS:
            again.append(_Task(task.jobs, deaths))
        elif len(task.jobs) > 1:
            middle = len(task.jobs) // 2
            again.extend((_Task(task.jobs[:middle]), _Task(task.jobs[middle:])))
        else:
            [job] = task.jobs
            error = f"each of {ATTEMPTS} workers that drew it died: look at the memory that it takes"
            yield [Outcome(job.key, error, job.images)], 0.0
