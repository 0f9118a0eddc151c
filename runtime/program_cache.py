"""What a pipeline keeps from request to request: programs with their recordings, and the engines of conditions."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TypeVar

from ..bundles.bundle import Bundle
from ..bundles.graph_names import condition_of
from ..errors import DeviceMemoryError
from .backends.interface import Backend
from .loop import Program, graphs_of
from .recordings import Recordings
from .shape import LoopShape, Schedule

# Every condition with room to spare. At full size the buffers of one are some 30 MB for each pair of images in fp16.
MAX_PROGRAMS = 8

T = TypeVar("T")


class ProgramCache:
    """Programs by loop shape, and which graphs of conditions were used when.

    Where device memory is short, encodings go, which are made again in milliseconds; then what was used longest ago: a
    program with its buffers and its recording, and the engines of its condition, which nothing holds any more. They are
    loaded again on demand.

    Args:
        backend, bundle: whose programs they are.
        drop_encodings: drops all that are kept, and says whether there were any.
    """

    def __init__(self, backend: Backend, bundle: Bundle, drop_encodings: Callable[[], bool]) -> None:
        self._drop_encodings = drop_encodings
        self.programs: OrderedDict[LoopShape, Recordings] = OrderedDict()
        self._backend = backend
        self._bundle = bundle
        # Loop shapes and graphs in the order of their last use, a loop shape before its graphs.
        self._used: OrderedDict[LoopShape | str, None] = OrderedDict()

    def program(self, shape: LoopShape, schedule: Schedule) -> Recordings:
        """The program of a loop shape with its recordings, made where it is not there.

        Args:
            shape: what it is made for.
            schedule: what it will follow.

        Raises:
            DeviceMemoryError: it does not fit although everything else that can go is gone.
        """
        graphs = graphs_of(shape, self._bundle)
        if shape not in self.programs:
            while len(self.programs) >= MAX_PROGRAMS:
                self._used.pop(self.programs.popitem(last=False)[0], None)
            made = self.retry_with_eviction(graphs, lambda: Program(self._backend, self._bundle, shape, schedule))
            self.programs[shape] = Recordings(self._backend, made)
        self.programs.move_to_end(shape)
        self._touch(shape, *graphs)
        found = self.programs[shape]
        self.retry_with_eviction([shape, *graphs], lambda: found.program.follow(schedule))
        return found

    def record(self, recordings: Recordings) -> None:
        """Records what the program has run before; where there is no memory for that, it runs launch by launch."""
        shape = recordings.program.shape
        try:
            self.retry_with_eviction([shape, *graphs_of(shape, self._bundle)], recordings.record)
        except DeviceMemoryError as e:
            recordings.lower(str(e), "off")

    def retry_with_eviction(self, keep: Collection[LoopShape | str], work: Callable[[], T]) -> T:
        """What `work` returns; while device memory is too short for it, something that it does not need goes.

        Args:
            keep: the loop shapes and graphs that it needs.
            work: may be called several times.

        Raises:
            DeviceMemoryError: nothing else can go.
        """
        self._touch(*keep)  # first: what is loaded before `work` fails can go too, one day
        nothing_left = False
        while True:
            try:
                return work()
            except DeviceMemoryError:
                if nothing_left:
                    raise
            if self._drop_encodings():
                continue
            # Not in the `except`: the error's traceback holds what `work` had made so far.
            old = next((old for old in self._used if old not in keep), None)
            nothing_left = old is None
            self._drop(old)

    def clear(self) -> None:
        """Drops every program with its buffers and its recording."""
        self.programs.clear()
        self._used.clear()

    def _touch(self, *used: LoopShape | str) -> None:
        for one in used:
            # Graphs that serve every condition stay.
            if isinstance(one, LoopShape) or condition_of(one):
                self._used[one] = None
                self._used.move_to_end(one)

    def _drop(self, old: LoopShape | str | None) -> None:
        """A program or a graph, and what no program needs any more."""
        if old is not None:
            del self._used[old]
        if isinstance(old, LoopShape):
            self.programs.pop(old, None)
        self._backend.release(old if isinstance(old, str) else None)
