"""CUDA graphs of a program: of its whole loop, each kind of step, or each launch (docs/design.md, "Recordings")."""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import BackendError, DeviceMemoryError
from .backends.interface import Backend, Launch, Step
from .loop import Program
from .settings.options import CudaGraphs
from .shape import Schedule, StepKind
from .workspace import StepTable

logger = logging.getLogger(__name__)

# Coarsest first. What cannot be recorded at one is tried at the next.
LADDER: tuple[CudaGraphs, ...] = ("loop", "step", "launch", "off")
_WHAT = {"loop": "the whole loop", "step": "each step", "launch": "each launch", "off": "nothing"}

# Of whole loops: each number of steps, with the steps at which controls apply, is a recording of its own.
_MAX_LOOPS = 4


class Recordings:
    """What replaces the launches of a program. Nothing is recorded that has not run before, or will not run again.

    Args:
        backend: that records.
        program: whose launches they are.
        rung: what is recorded; None is the backend's own choice.

    Attributes:
        program: whose launches they are.
        rung: what is recorded now, one of `LADDER`.
        note: why it is less than what was asked for; empty where it is not.
    """

    def __init__(self, backend: Backend, program: Program, rung: CudaGraphs | None = None) -> None:
        self.rung: CudaGraphs = rung or backend.cuda_graphs
        self.note = ""
        self._asked = self.rung
        self._backend = backend
        self.program = program
        self._ran: set[Schedule] = set()
        self._kinds: set[StepKind] = set()  # of the schedules that ran
        self._loops: OrderedDict[Schedule, tuple[StepTable, Launch]] = OrderedDict()
        self._steps: dict[StepKind, list[Step]] = {}
        self._decode: list[Step] | None = None

    def loop(self) -> Launch | None:
        """Denoising and decoding of the program's schedule as one launch, where that is recorded."""
        table, recording = self._loops.get(self.program.schedule, (None, None))
        return recording if table is self.program.table else None

    def step(self, k: int) -> list[Step]:
        """The launches of step k, recorded ones where there are any."""
        program, kind = self.program, self.program.schedule.kind(k)
        recorded = self._steps.get(kind)
        return program.step(k) if recorded is None else [program.begin(k), *recorded]

    def decode(self) -> list[Step]:
        """The decoding, recorded where it is."""
        return self.program.decode if self._decode is None else self._decode

    def launches(self) -> Iterator[Step]:
        """Denoising and decoding, recorded ones where there are any."""
        loop = self.loop()
        if loop is not None:
            yield Step("loop", "", loop, {}, {})
            return
        for k in range(self.program.schedule.steps):
            yield from self.step(k)
        yield from self.decode()

    def ran(self) -> None:
        """The program's schedule has run to its end."""
        schedule = self.program.schedule
        if schedule not in self._ran:
            self._ran.add(schedule)
            self._kinds.update(schedule.kind(k) for k in range(schedule.steps))

    def record(self) -> None:
        """Records what the program's schedule launches, where it has run before, at the coarsest rung that works.

        Raises:
            DeviceMemoryError: a recording does not fit into device memory; what was recorded so far stays.
        """
        while self.rung != "off":
            try:
                if self.rung == "loop":
                    if self.program.schedule in self._ran and self.loop() is None:
                        self._record_loop()
                else:
                    self._record_steps()
                return
            except DeviceMemoryError:
                raise
            except BackendError as e:
                self.lower(str(e))

    def lower(self, reason: str, rung: CudaGraphs | None = None) -> None:
        """Records less from now on: at the next rung of the ladder, or at `rung`."""
        self.rung = rung or LADDER[LADDER.index(self.rung) + 1]
        self.note = f"CUDA graphs record {_WHAT[self.rung]} instead of {_WHAT[self._asked]}: {reason}"
        logger.info("%s", self.note)

    def _record_loop(self) -> None:
        program = self.program
        recording = self._backend.record([step.launch for step in program.launches()])
        assert program.table is not None
        self._loops[program.schedule] = (program.table, recording)
        while len(self._loops) > _MAX_LOOPS:
            self._loops.popitem(last=False)

    def _record_steps(self) -> None:
        schedule = self.program.schedule
        for kind in {schedule.kind(k) for k in range(schedule.steps)} & self._kinds:
            if kind not in self._steps:
                self._steps[kind] = self._recorded(self.program.of_kind(kind), "denoise")
        if self._ran and self._decode is None:
            self._decode = self._recorded(self.program.decode, "vae_decoder")

    def _recorded(self, steps: Sequence[Step], stage: str) -> list[Step]:
        """Raises BackendError where not one of the launches can be recorded."""
        if self.rung == "step":
            return [Step(stage, "", self._backend.record([step.launch for step in steps]), {}, {})]
        found, reasons = [], []
        launched = [step for step in steps if step.graph]
        for step in steps:
            if not step.graph:  # joins what no recording leaves apart
                found.append(step)
                continue
            try:
                found.append(replace(step, launch=self._backend.record([step.launch])))
            except DeviceMemoryError:
                raise
            except BackendError as e:
                reasons.append(str(e))
                found.append(step)
        if len(reasons) == len(launched):
            raise BackendError(reasons[0])
        return found
