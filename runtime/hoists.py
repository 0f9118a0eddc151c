"""What of the networks is computed before the loop (`Network`): launches of `text_kv…` and `time_embeds…`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..bundles.graph_names import STEPS_AT_ONCE
from .backends.interface import Backend, Buffer, Step, Stopwatch
from .encoding_cache import EncodingCache
from .profiling import profiled
from .text.prompts import Prompts
from .workspace import StepTable, Workspace

# (stage, graph, buffers by tensor name) → a launch of the graph.
Bind = Callable[..., Step]


class Hoists:
    """The launches of a program that compute keys and values of its prompt, and the time embeddings of its steps.

    Attributes:
        text: by the network's suffix; empty where the graphs compute it at every step.
        times: the same.
    """

    def __init__(self, backend: Backend, bundle: Bundle, workspace: Workspace, bind: Bind) -> None:
        self._backend = backend
        self._workspace = w = workspace
        graphs = bundle.manifest.graphs
        self.text: Mapping[str, Step] = {
            suffix: bind("text_kv", f"text_kv{suffix}", prompt_embeds=w.prompt_embeds, **network.keys_values)
            for suffix, network in w.networks.items()
            if f"text_kv{suffix}" in graphs
        }
        own = {"timesteps": w.timesteps, **w.distilled}
        self.times: Mapping[str, Step] = {
            suffix: bind("time_embeds", f"time_embeds{suffix}", **own, time_embeds=network.times)
            for suffix, network in w.networks.items()
            if network.times is not None
        }

    def steps(self) -> list[Step]:
        """Every launch, once."""
        return [*self.text.values(), *self.times.values()]

    def encode_prompt(self, prompts: Prompts, encodings: EncodingCache, clock: Stopwatch) -> None:
        """Keys and values of the prompt, whose embeddings are in their buffer, where `encodings` does not have them."""
        weights = () if prompts.weights is None else (prompts.weights,)
        made_of = (prompts.input_ids, prompts.clip_skip, *weights)
        for suffix, step in self.text.items():
            encodings.encode(step, {}, clock, made_of=made_of, output=self._workspace.networks[suffix].block)

    def encode_times(
        self,
        table: StepTable,
        timesteps: NDArray[Any],
        timestep_cond: NDArray[np.float32] | None,
        clock: Stopwatch,
    ) -> None:
        """The time embeddings of every step into the table, unless they are there.

        Args:
            timesteps: [N].
            timestep_cond: what is in the buffer of that name already.
        """
        made_of = np.asarray(timesteps, np.float32).tobytes()
        made_of += b"" if timestep_cond is None else timestep_cond.tobytes()
        if not self.times or table.times_of == made_of:
            return
        for first in range(0, len(timesteps), STEPS_AT_ONCE):
            chunk = timesteps[first : first + STEPS_AT_ONCE]
            padded = np.zeros(STEPS_AT_ONCE, np.float32)
            padded[: len(chunk)] = chunk
            self._backend.upload(self._workspace.timesteps, padded)
            for suffix, step in self.times.items():
                with profiled(step.stage):
                    step.launch()
                computed, rows = self._workspace.networks[suffix].times, table.time_embeds[suffix]
                assert computed is not None
                of_chunk = (len(chunk), *rows.shape[1:])
                target = rows.view(first * rows.part(0).nbytes, of_chunk, rows.dtype.name)
                self._backend.copy(computed.part(shape=of_chunk), target)
        table.times_of = made_of
        clock.mark("time_embeds")

    def copies(self, table: StepTable, k: int) -> list[tuple[Buffer, Buffer]]:
        """What step k begins with: its rows of the table into the networks' slots."""
        slots = ((rows, self._workspace.networks[suffix].time_embeds) for suffix, rows in table.time_embeds.items())
        return [(rows.part(k), slot) for rows, slot in slots if slot is not None]
