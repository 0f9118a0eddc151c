"""Actors on a Ray cluster that do one thing at a time: started, fed, and replaced where they die.

An actor is a class with `open`, which is called once and first, and a method that does an item of work. What an item
leaves must follow from the item alone: where an actor dies, another one does its item again.
"""

import logging
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Generic, TypeVar

from ..errors import BackendError, CnppError
from ..install import cannot_import
from ..messages import one_line, printable
from ..runtime.settings.options import RuntimeOptions

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Actors that may die of an item before it is given up."""
_OBJECT_STORE = 80 << 20  # bytes: Ray's least; nothing large is put there
_PATIENCE = 10.0  # seconds
_ON_CPU = ("onnxruntime-cpu", "openvino")

Item = TypeVar("Item", bound=tuple[Any, ...])


class _Lost:
    """What an item gives of which `ATTEMPTS` actors died."""


LOST: Final = _Lost()


@dataclass(frozen=True)
class _Task(Generic[Item]):
    """An item, and how many actors died of it."""

    item: Item
    deaths: int = 0


class RayPool(Generic[Item]):
    """Actors of one class.

    Args:
        address: `local` starts Ray on this machine; else that of a cluster, or `auto`.
        workers: how many; None: one for each GPU, or for as many CPUs as one has threads. More than fit wait until the
            cluster has grown.
        options: where and how graphs run on each.
        actor: the class.
        arguments: of its constructor.
        method: of the actor, which takes an item's values.
    """

    def __init__(
        self,
        address: str,
        workers: int | None,
        options: RuntimeOptions,
        actor: type,
        arguments: tuple[Any, ...],
        method: str,
    ) -> None:
        self._address = address
        self._workers = workers
        self._options = options
        self._actor = actor
        self._arguments = arguments
        self._method = method
        self._ray: Any = None
        self._started = False
        self._streams = ExitStack()
        self._idle: list[Any] = []
        self._again: deque[_Task[Item]] = deque()
        self._opened: Any = None
        self._deaths_before_opening = 0
        # What an actor is doing: opening, where the task is None, or an item.
        self._running: dict[Any, tuple[Any, _Task[Item] | None]] = {}

    def open(self) -> Any:
        """Connects, starts the actors and waits for the first one. Returns what its `open` does.

        Raises:
            CnppError: Ray is not installed, the cluster does not answer, or what `open` raises.
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
        self._actor_options = {"num_cpus": 1 if on_gpu else threads, "num_gpus": int(on_gpu), "max_restarts": 0}
        for _ in range(self._workers or max(1, int(fitting))):
            self._hire()
        while self._opened is None:
            for actor, _, _ in self._finished():
                self._idle.append(actor)
        return self._opened

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Does all items. Yields each with what the method gave, or `LOST`, as they end.

        Raises:
            CnppError: what a method raised, or actors die before they do anything.
        """
        coming = iter(items)
        more = True
        while True:
            while self._idle:
                task = self._again.popleft() if self._again else next((_Task(item) for item in coming), None)
                if task is None:
                    more = False
                    break
                actor = self._idle.pop()
                self._running[getattr(actor, self._method).remote(*task.item)] = (actor, task)
            if not (more or self._again or any(task for _, task in self._running.values())):
                return  # actors that still wait for a place are not needed
            for actor, done, found in self._finished():
                if found is LOST:
                    assert done is not None
                    if done.deaths + 1 < ATTEMPTS:
                        self._again.append(_Task(done.item, done.deaths + 1))
                    else:
                        yield done.item, LOST
                    continue
                self._idle.append(actor)
                if done is not None:
                    yield done.item, found

    def add(self, items: Iterable[Item]) -> None:
        """Further items, while `run` goes on: the parts of one that was lost."""
        self._again.extend(_Task(item) for item in items)

    def close(self) -> None:
        """Ends the actors, and Ray where it was started here."""
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
        """Starts an actor, which waits until the cluster has room for it."""
        actor = self._ray.remote(self._actor).options(**self._actor_options).remote(*self._arguments)
        self._running[actor.open.remote()] = (actor, None)

    def _finished(self) -> list[tuple[Any, _Task[Item] | None, Any]]:
        """Waits for one call to end. Returns its actor, its task and what it gave: LOST where the actor died.

        Raises:
            CnppError: what the call raised, which is of no single item.
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
                return [(actor, task, LOST)]
            self._deaths_before_opening += 1
            if self._deaths_before_opening > ATTEMPTS * max(1, self._workers or 1):
                raise BackendError(
                    f"workers die before they draw ({one_line(e)}): look at Ray's logs, or draw without --ray"
                ) from None
            return []
        if task is not None:
            return [(actor, task, found)]
        if self._opened is not None and found != self._opened:
            raise BackendError(f"one worker draws on {found}, another on {self._opened}: choose one with --backend")
        self._opened, self._deaths_before_opening = found, 0
        return [(actor, None, None)]
