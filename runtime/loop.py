"""The denoising loop as launches over named buffers (docs/design.md, "The loop is launches of a few kinds of step").

What decides which launches there are is a `LoopShape`; in which order steps of which kind run is a `Schedule`. What
only changes values (prompt, seed, scales, the sampler's coefficients, the number of steps) is data in the buffers, so
the launches of one kind of step are bound once, and a backend that can record them records each kind once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..bundles.graph_names import SHALLOW, always_needed, needed_for
from .backends.cuda import Cuda
from .backends.interface import Backend, Buffer, Launch, Step, Stopwatch
from .encoding_cache import EncodingCache
from .hoists import Hoists
from .images.device_image import DeviceImage
from .profiling import profiled
from .sampling.schedulers import SamplerTable
from .shape import LoopShape, Schedule, StepKind
from .text.prompts import Prompts
from .workspace import (
    COEFFICIENTS,
    TIMESTEP,
    Residuals,
    StepTable,
    Workspace,
    buffer_bytes,
    rows_of,
    table_bytes,
    workspace_bytes,
)


@dataclass(frozen=True, eq=False)
class RequestTensors:
    """What one request, or several of one loop shape, put into the buffers. B counts the images of all.

    Attributes:
        prompts: what the text encoder reads.
        control_images: for each control, the uint8 [H,W,3] of each image, on the host or on the GPU.
        table: the sampler's, which all share.
        guidance_scales: of each image.
        residual_scales: for each control, float32 [R,n,B].
        latents: float32 [B,4,h,w], the first x.
        step_noise: for each step float32 [B,4,h,w], or None where the sampler adds none.
        timestep_cond: float32 [B,E] of a distilled UNet, or None.
    """

    prompts: Prompts
    control_images: Sequence[Sequence[NDArray[np.uint8] | DeviceImage]]
    table: SamplerTable
    guidance_scales: Sequence[float]
    residual_scales: Sequence[NDArray[np.float32]]
    latents: NDArray[np.float32]
    step_noise: Sequence[NDArray[np.float32] | None]
    timestep_cond: NDArray[np.float32] | None = None

    def control_image(self, control: int) -> NDArray[np.uint8]:
        """That of the first image, uint8 [1,H,W,3], which is on the host."""
        image = self.control_images[control][0]
        assert isinstance(image, np.ndarray)
        return image[None]

    def guidance(self, guided: bool) -> NDArray[np.float32]:
        """The weights of both sides of the guidance, float32 [n,B]."""
        scales = np.array(self.guidance_scales, np.float32)
        return np.stack([1 - scales, scales]) if guided else np.ones((1, len(scales)), np.float32)

    def reused_guidance(self) -> NDArray[np.float32]:
        """The weights where an earlier step's guidance is added to the prompt's own prediction, float32 [3,B]."""
        negative, positive = self.guidance(guided=True)
        return np.stack([negative, -negative, np.ones_like(positive)])


class Program:
    """The launches of one loop shape, in three phases: `encode` (prompt and conditions), the steps, `decode`.

    Attributes:
        schedule: of the request that it is filled with next, or was last.
        table: the values of its steps.
    """

    def __init__(self, backend: Backend, bundle: Bundle, shape: LoopShape, schedule: Schedule) -> None:
        self.shape = shape
        self.schedule = schedule
        self._backend = backend
        self._bundle = bundle
        backend.reserve(graphs_of(shape, bundle), buffer_bytes(bundle, shape, schedule))
        self.workspace = w = Workspace(backend.arena(workspace_bytes(bundle, shape)), bundle, shape)
        self._kinds: dict[StepKind, tuple[Step, ...]] = {}
        self.table: StepTable | None = None
        self.follow(schedule)
        self.text = self._step(
            "text_encoder", input_ids=w.input_ids, clip_skip=w.clip_skip, prompt_embeds=w.encoded_prompts
        )
        self.hints = [
            self._step("hint", f"hint_{condition}", control_image=w.control_image, hint=w.hint)
            for condition in shape.controls
            if w.control_image is not None and w.hint is not None
        ]
        self.hoists = Hoists(backend, bundle, w, self._step)
        for k in range(schedule.steps):
            self.of_kind(schedule.kind(k))
        self.decode = [self.decoder("vae_decoder")]

    def follow(self, schedule: Schedule) -> None:
        """The steps to come are those of this schedule, whose controls are the loop shape's.

        Raises:
            DeviceMemoryError: there is no memory for the values of so many steps.
        """
        noisy, steps, table = any(schedule.noisy), schedule.steps, self.table
        if table is None or table.rows.shape[0] < steps or (noisy and table.noise.shape[0] < steps):
            self.table = None
            allocate = self._backend.arena(table_bytes(self._bundle, self.shape, schedule))
            self.table = StepTable(allocate, self._bundle, self.shape, steps, noisy)
        self.schedule = schedule

    def fill(self, tensors: RequestTensors) -> None:
        """Writes a request's values into the buffers, but for what `encode` computes."""
        w, put, s, table = self.workspace, self._backend.upload, self.shape, tensors.table
        n, steps = 2 if s.guided else 1, self.schedule.steps
        put(w.guidance, tensors.guidance(s.guided))
        put(w.x0_limit, np.array([table.x0_limit], np.float32))
        assert self.table is not None
        rows = np.zeros(self.table.rows.shape, np.float32)
        rows[:steps, TIMESTEP, 0] = table.timesteps
        rows[:steps, COEFFICIENTS, :35] = table.coefficients.reshape(steps, 35)
        put(self.table.rows, rows)
        for buffer, scales in zip(w.scales, tensors.residual_scales, strict=True):
            put(buffer, scales.reshape(buffer.shape))
        if w.unguided is not None:
            put(w.unguided.guidance, tensors.guidance(guided=False))
            if w.unguided.reused_guidance is not None:
                put(w.unguided.reused_guidance, tensors.reused_guidance())
            for buffer, scales in zip(w.unguided.scales, tensors.residual_scales, strict=True):
                put(buffer, np.ascontiguousarray(scales[:, -1]))
        if any(self.schedule.noisy):
            padded = np.zeros(self.table.noise.shape, np.float32)
            for row, noise in zip(padded, tensors.step_noise, strict=False):
                if noise is not None:
                    row[: noise.size] = noise.reshape(-1)
            put(self.table.noise, padded)
        else:
            put(w.noise, np.zeros(w.noise.shape, np.float32))
        for buffer in w.distilled.values():
            assert tensors.timestep_cond is not None
            put(buffer, tensors.timestep_cond.astype(buffer.dtype))
        x = tensors.latents
        put(self.state(0), np.stack([x, *[np.zeros_like(x)] * 3]))
        put(w.model_input, x * np.float32(table.input_scale))
        put(w.rows, np.tile(np.arange(s.images), n))

    def encode(self, tensors: RequestTensors, encodings: EncodingCache, clock: Stopwatch) -> None:
        """Prompt, time steps and conditions into their buffers, each computed only where that has not been done yet."""
        prompts, w, b = tensors.prompts, self.workspace, self.shape.images
        text = {"input_ids": prompts.input_ids, "clip_skip": prompts.clip_skip}
        encodings.encode(self.text, text, clock, weights=prompts.weights)
        self.hoists.encode_prompt(prompts, encodings, clock)
        for source, target in w.unguided_copies():
            self._backend.copy(source, target)
        assert self.table is not None
        self.hoists.encode_times(self.table, tensors.table.timesteps, tensors.timestep_cond, clock)
        for step, images, hints in zip(self.hints, tensors.control_images, w.hints, strict=True):
            for image in {id(image): image for image in images}.values():
                targets = [hints.part(row) for row in range(b) if images[row] is image]
                if isinstance(image, DeviceImage):
                    assert isinstance(self._backend, Cuda)
                    self._backend.read_image(image, step.inputs["control_image"])
                    encodings.compute(step, step.outputs["hint"], clock, targets)
                    continue
                encodings.encode(step, {"control_image": image[None]}, clock, targets)

    def state(self, k: int) -> Buffer:
        """Where the state [4,B,4,h,w] is that step k reads, k from 0 to N; N stands for that of the last step."""
        return self.workspace.states[(self.schedule.steps - k) % 2]

    def step(self, k: int) -> list[Step]:
        """What step k launches: its values are copied into their slots, then come the graphs of its kind."""
        return [self.begin(k), *self.of_kind(self.schedule.kind(k))]

    def launches(self) -> Iterator[Step]:
        """Denoising and decoding, launch by launch."""
        for k in range(self.schedule.steps):
            yield from self.step(k)
        yield from self.decode

    def begin(self, k: int) -> Step:
        """Copies the values of step k into their slots; no graph runs."""
        assert self.table is not None
        copies = [(self.table.rows.part(k), self.workspace.row), *self.hoists.copies(self.table, k)]
        if any(self.schedule.noisy):
            slot = self.workspace.noise
            copies.append((self.table.noise.part(k, shape=slot.shape), slot))
        return Step("update", "", partial(_copy, self._backend, copies), {}, {})

    def of_kind(self, kind: StepKind) -> tuple[Step, ...]:
        """The launches of a kind of step, bound when they are first asked for."""
        if kind not in self._kinds:
            self._kinds[kind] = tuple(self._bind(kind))
        return self._kinds[kind]

    def decoder(self, graph: str) -> Step:
        """The decoding of the final latents with this graph."""
        w = self.workspace
        buffers = {"latents": w.latents, "image": w.image, "magnitude": w.magnitude(decoded=True)}
        return self._step("vae_decoder", graph, **buffers)

    def _bind(self, kind: StepKind) -> list[Step]:
        s, w = self.shape, self.workspace
        n, b = 1 if kind.unguided or not s.guided else 2, s.images
        own = w.unguided if kind.unguided else None
        # What a step of both sides computed for the prompt's rows lies behind the other side's.
        side = b if kind.reuses_guidance else 0
        split = "unet_encoder" in self._bundle.manifest.graphs
        computes = any(kind.active) and not kind.reuses_residuals and not kind.shallow
        step = {
            "model_input": w.model_input,
            "timestep": w.timestep,
            "prompt_embeds": w.prompt_embeds if own is None else own.prompt_embeds,
            "rows": rows_of(w.rows, n * b),
        }
        scales, guidance = (w.scales, w.guidance) if own is None else (own.scales, own.guidance)
        unet = {**step, **w.network("", kind.unguided), **w.distilled, **_rows_of(w.skips, n * b)}
        steps: list[Step] = []
        if split:  # first: it runs beside the ControlNets
            beside = partial(self._backend.beside, "unet_encoder")
            steps.append(self._bound("unet", "unet_encoder", beside if computes else None, unet))
        total: Residuals | None = None
        sums = 0
        for i, condition in enumerate(s.controls):
            if not kind.active[i]:
                continue
            residuals = _rows_of(w.control_residuals[i], n * b, side)
            if computes:
                controlnet = {
                    **step,
                    **w.network(f"_{condition}", kind.unguided),
                    "hint": w.hints[i],
                    "scales": scales[i],
                    **residuals,
                }
                steps.append(self._step("controlnet", f"controlnet_{condition}", **controlnet))
            if total is None:
                total = residuals
                continue
            target = _rows_of(w.sums[sums % 2], n * b, side)
            sums += 1
            if not kind.shallow:  # else the sum is there
                others, sum_ = (
                    {f"{p}_{t}": x for t, x in r.items()} for p, r in (("other", residuals), ("sum", target))
                )
                steps.append(self._step("controlnet", "add_residuals", **total, **others, **sum_))
            total = target
        total = _rows_of(w.no_residuals, n * b) if total is None else total
        if split and computes:
            steps.append(Step("unet", "", self._backend.join, {}, {}))
        last = "unet_decoder" if split else SHALLOW if kind.shallow else "unet"
        noise_pred = rows_of(w.noise_pred, n * b, 2 * side)
        unet |= {**total, **_rows_of(w.deep, n * b, side), "noise_pred": noise_pred}
        steps.append(self._step("unet", last, **unet))

        if kind.reuses_guidance:
            assert own is not None and own.reused_guidance is not None
            n, noise_pred, guidance = 3, w.noise_pred, own.reused_guidance
        update = self._step(
            "update",
            noise_pred=noise_pred.reshape(n, b, *noise_pred.shape[1:]),
            guidance=guidance,
            state=w.states[kind.state],
            coefficients=w.coefficients,
            x0_limit=w.x0_limit,
            noise=w.noise,
            new_state=w.states[1 - kind.state],
            model_input=w.model_input,
            magnitude=w.magnitude(),
        )
        return [*steps, update]

    def _step(self, stage: str, graph: str | None = None, /, **buffers: Buffer) -> Step:
        return self._bound(stage, graph or stage, None, buffers)

    def _bound(
        self, stage: str, graph: str, bind: Callable[[Mapping[str, Buffer]], Launch] | None, buffers: dict[str, Buffer]
    ) -> Step:
        """A launch of a graph that reads and writes those of the buffers that it has; None binds it as usual."""
        spec = self._bundle.graph(graph)
        inputs, outputs = ({t.name: buffers[t.name] for t in tensors} for tensors in (spec.inputs, spec.outputs))
        bind = bind or self._backend.load(graph).bind
        return Step(stage, graph, bind({**inputs, **outputs}), inputs, outputs)


def run(steps: Iterable[Step], clock: Stopwatch) -> None:
    """Launches the steps in their order and marks each one's stage."""
    for step in steps:
        with profiled(step.stage):
            step.launch()
        clock.mark(step.stage)


def graphs_of(shape: LoopShape, bundle: Bundle) -> list[str]:
    """The names of the graphs of a bundle that a loop shape launches."""
    graphs = bundle.manifest.graphs
    adding = ["add_residuals"] if len(shape.controls) > 1 else []
    shallow = [SHALLOW] if shape.shallow_steps else []
    return [*always_needed(graphs), *shallow, *adding, *needed_for(shape.controls, graphs)]


def _rows_of(buffers: Mapping[str, Buffer], rows: int, first: int = 0) -> dict[str, Buffer]:
    """Some rows of each."""
    return {name: rows_of(buffer, rows, first) for name, buffer in buffers.items()}


def _copy(backend: Backend, copies: Sequence[tuple[Buffer, Buffer]]) -> None:
    for source, target in copies:
        backend.copy(source, target)
