"""A request on its way: its state, what waits for it, and how it ends."""

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import Cancelled, CnppError
from ..runtime.control.consistency import Score
from ..runtime.images.image_files import Pixels
from ..runtime.settings.request import ResolvedRequest
from .errors import ServiceError

if TYPE_CHECKING:
    from ..runtime.result import Result

State: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Order:
    """What a client asked for, checked, before it waits for its turn.

    Attributes:
        request: to be drawn; the control images of `photos` are still the photos that they come from.
        key: requests that share it run in one launch list.
        steps: that are drawn.
        photos: for each control, whether its image is a photo from which the condition is extracted first.
        score: whether the condition is extracted again from each image and compared.
        preview: whether latents are kept after each step.
        notes: on what was done to the images, one line each.
    """

    request: ResolvedRequest
    key: tuple[object, ...]
    steps: int
    photos: tuple[bool, ...] = ()
    score: bool = False
    preview: bool = False
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many it draws."""
        return self.request.num_images_per_prompt


@dataclass(frozen=True)
class ControlScores:
    """What became of one control in the images of a request.

    Attributes:
        condition: its name.
        scores: of each image.
        extracted: the condition found in each image, uint8 [H,W,3].
    """

    condition: str
    scores: tuple[Score, ...]
    extracted: tuple[Pixels, ...]


@dataclass(frozen=True)
class Outcome:
    """What a request gave.

    Attributes:
        result: the images, and how they were made.
        scores: for each control that can be extracted, where the client asked for it.
        waited: seconds in the queue.
        batch: images that were drawn together.
    """

    result: "Result"
    scores: tuple[ControlScores, ...]
    waited: float
    batch: int


Listener: TypeAlias = Callable[["Task"], None]


@dataclass(eq=False)
class Task:
    """A request that was accepted. Every method may be called from any thread.

    Attributes:
        order: what is drawn.
        owner: whose interface and address it came from: who may interrupt it.
        model: what clients call the model that draws it.
        deadline: of `time.monotonic()`; after it nobody waits any more.
        step, steps: how far it is.
        latents: float32 [B,4,h,w] after the last step, where the order wants previews.
        future: gets the `Outcome`, or a `CnppError`.
    """

    order: Order
    deadline: float
    owner: tuple[str, str] = ("", "")
    model: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: float = field(default_factory=time.time)
    accepted: float = field(default_factory=time.monotonic)
    state: State = "queued"
    step: int = 0
    latents: NDArray[np.float32] | None = None
    future: "Future[Outcome]" = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Listener] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.order.steps

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state not in ("queued", "running")

    def start(self) -> bool:
        """Its turn has come. Returns: False where it ended before."""
        self.expire()
        with self._lock:
            if self.state != "queued":
                return False
            self.state = "running"
        self._tell()
        return True

    def progress(self, done: int) -> None:
        """`done` of its steps have ended."""
        self.step = done
        self.expire()
        self._tell()

    def finish(self, outcome: Outcome) -> None:
        """It is drawn."""
        if self._end("done"):
            self.future.set_result(outcome)
            self._tell()

    def fail(self, error: CnppError) -> None:
        """It cannot be drawn, or nobody wants it any more."""
        if self._end("cancelled" if isinstance(error, Cancelled) else "failed"):
            self.future.set_exception(error)
            self._tell()

    def cancel(self, why: str = "the request was cancelled") -> bool:
        """Leaves the queue, or ends at the next step. Returns: whether it had not ended."""
        before = self.ended
        self.fail(Cancelled(why))
        return not before

    def expire(self) -> None:
        """Ends the task where its deadline is over."""
        if not self.ended and time.monotonic() >= self.deadline:
            self.fail(deadline_error(self.deadline - self.accepted))

    def listen(self, listener: Listener) -> None:
        """`listener` is called with the task after each change, in the thread that changed it."""
        self._listeners.append(listener)

    def _end(self, state: State) -> bool:
        with self._lock:
            if self.ended:
                return False
            self.state = state
            return True

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener(self)


def deadline_error(seconds: float) -> ServiceError:
    """The error of a request that took longer than it may."""
    return ServiceError(
        504,
        f"the request took longer than its deadline of {seconds:.3g} s: ask for less, or for a longer timeout",
        code="deadline_exceeded",
    )
