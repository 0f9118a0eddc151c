"""What is computed once per prompt or condition, kept: the text encoder's and the hint graphs' results."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceMemoryError
from .backends.interface import Backend, Buffer, Step, Stopwatch, aligned
from .profiling import profiled
from .text.emphasis import emphasize

# In fp16 at 512x512 a hint is 2.6 MB, a guided prompt 0.2 MB, and its keys and values 10 MB.
MAX_ENCODINGS = 32
MAX_BYTES = 256 << 20


class EncodingCache:
    """The latest results by graph and input, in the backend's memory. Exact: a result is that of the same bytes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._results: OrderedDict[bytes, Buffer] = OrderedDict()

    def clear(self) -> bool:
        """Drops every result, and says whether there was one."""
        found = bool(self._results)
        self._results.clear()
        return found

    def encode(
        self,
        step: Step,
        values: Mapping[str, NDArray[Any]],
        clock: Stopwatch,
        targets: Sequence[Buffer] = (),
        weights: NDArray[np.float32] | None = None,
        made_of: Sequence[NDArray[Any]] = (),
        output: Buffer | None = None,
    ) -> None:
        """Copies the result of `step` for these inputs to `targets`; launches it only where the result is not cached.

        Args:
            values: by the graph's tensor names, its inputs; those that are in their buffers already are left out.
            targets: buffers of the output's number of bytes; by default the output itself.
            weights: float32 [P,T] of emphasis, which the result [P,T,D] is multiplied with (`emphasis.emphasize`).
            made_of: what the inputs that are left out depend on.
            output: the memory of all outputs, where there are several.

        Raises:
            UserError: as of `emphasize`.
        """
        if output is None:
            [output] = step.outputs.values()
        key = blake2b(step.graph.encode(), digest_size=16)
        for array in (*values.values(), *made_of, *(() if weights is None else (weights,))):
            key.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        known = key.digest()
        if known in self._results:
            self._results.move_to_end(known)
            for target in targets or (output,):
                self._backend.copy(self._results[known], _as(target, output))
            return
        for name, array in values.items():
            self._backend.upload(step.inputs[name], array)
        self.compute(step, output, clock, targets, weights)
        try:
            kept = self._backend.arena(aligned(output.nbytes))(output.shape, output.dtype.name)
        except DeviceMemoryError:
            self._results.clear()  # it is in its targets: the cache only saves time, and must not cost the request
            return
        self._backend.copy(output, kept)
        self._results[known] = kept
        while len(self._results) > MAX_ENCODINGS or sum(b.nbytes for b in self._results.values()) > MAX_BYTES:
            self._results.popitem(last=False)

    def compute(
        self,
        step: Step,
        output: Buffer,
        clock: Stopwatch,
        targets: Sequence[Buffer] = (),
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """As `encode`, of what the inputs of `step` hold, and not cached."""
        with profiled(step.stage):
            step.launch()
        if weights is not None:
            self._backend.upload(output, emphasize(self._backend.download(output), weights))
        for target in targets:
            self._backend.copy(output, _as(target, output))
        clock.mark(step.stage)


def _as(target: Buffer, output: Buffer) -> Buffer:
    """The target seen in the output's shape: a row of a batch lacks its first dimension."""
    return target.reshape(*output.shape)
