"""The denoising loop as a list of launches over named buffers (docs/design.md, "The loop is a list of launches").

What shapes the list is a `LoopShape`: sizes, steps, guided or not, which controls apply at which step. What only
changes values (prompt, seed, scales, the sampler's coefficients) is data in the buffers, so one list serves every
request of a loop shape, and a backend that can record launches records it once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle, Manifest, TensorSpec
from ..errors import BackendError, BundleError
from .backends.interface import ALIGNMENT, Allocate, Backend, Buffer, Launch, Step, Stopwatch, aligned
from .encoding_cache import EncodingCache
from .sampling.schedulers import SamplerTable
from .text.prompts import Prompts

# What a ControlNet hands the UNet, buffer by tensor name.
Residuals = dict[str, Buffer]

# A step's values (timestep and coefficients) lie in a row each, so that both are aligned for TensorRT and all of a
# request's are uploaded at once.
_ROW = ALIGNMENT // 4
_TIMESTEP, _COEFFICIENTS = 0, 1


@dataclass(frozen=True)
class LoopShape:
    """Everything that decides which launches there are.

    Attributes:
        images: B, of all requests together.
        guided: whether the batch is doubled for classifier-free guidance.
        steps: N.
        controls: conditions in their order, with the steps at which each applies ([N] booleans).
        noisy: whether the sampler adds fresh noise at a step ([N] booleans).
        chunks: of 77 tokens that a prompt has.
    """

    images: int
    guided: bool
    steps: int
    controls: tuple[tuple[str, tuple[bool, ...]], ...]
    noisy: tuple[bool, ...]
    chunks: int = 1


@dataclass(frozen=True, eq=False)
class RequestTensors:
    """What one request, or several of one loop shape, put into the buffers. B counts the images of all.

    Attributes:
        prompts: what the text encoder reads.
        control_images: for each control, the uint8 [H,W,3] of each image.
        table: the sampler's, which all share.
        guidance_scales: of each image.
        residual_scales: for each control, float32 [R,n,B].
        latents: float32 [B,4,h,w], the first x.
        step_noise: for each step float32 [B,4,h,w], or None where the sampler adds none.
        timestep_cond: float32 [B,E] of a distilled UNet, or None.
    """

    prompts: Prompts
    control_images: Sequence[Sequence[NDArray[np.uint8]]]
    table: SamplerTable
    guidance_scales: Sequence[float]
    residual_scales: Sequence[NDArray[np.float32]]
    latents: NDArray[np.float32]
    step_noise: Sequence[NDArray[np.float32] | None]
    timestep_cond: NDArray[np.float32] | None = None

    def guidance(self, guided: bool) -> NDArray[np.float32]:
        """The weights of both sides of the guidance, float32 [n,B]."""
        scales = np.array(self.guidance_scales, np.float32)
        return np.stack([1 - scales, scales]) if guided else np.ones((1, len(scales)), np.float32)


class Workspace:
    """The named buffers of one loop shape. They are allocated once and live as long as any launch holds them."""

    def __init__(self, allocate: Allocate, bundle: Bundle, shape: LoopShape) -> None:
        self._allocate = allocate
        s, m = shape, bundle.manifest
        b, n = s.images, 2 if s.guided else 1
        float_type = "float16" if m.precision == "fp16" else "float32"
        tokens, width = bundle.graph("text_encoder").outputs[0].shape[1:]
        latent = latent_shape(m)

        self.input_ids = self._new("int64", n * b * s.chunks, tokens)
        self.clip_skip = self._new("int64", n * b * s.chunks)
        self.prompt_embeds = self._new(float_type, n * b, int(tokens) * s.chunks, width)
        # A row's chunks follow each other: the same memory, chunk by chunk.
        self.encoded_prompts = self.prompt_embeds.reshape(n * b * s.chunks, int(tokens), int(width))
        # One control image at a time is encoded, and its hint copied to the rows of the batch that it belongs to.
        self.control_image = self._new("uint8", 1, m.height, m.width, 3) if s.controls else None
        hint_shapes = [self._output(bundle, f"hint_{name}", "hint").shape[1:] for name, _ in s.controls]
        if len(set(hint_shapes)) > 1:
            raise BundleError(
                f"the hints of {', '.join(c for c, _ in s.controls)} differ in size: export the bundle again"
            )
        self.hint = self._new(float_type, 1, *hint_shapes[0]) if s.controls else None
        self.hints = [self._new(float_type, n * b, *shape) for shape in hint_shapes]

        self.model_input = self._new(float_type, n * b, *latent)
        self.noise_pred = self._new(float_type, n * b, *latent)
        # Read from one, write to the other: step k leaves the state in states[(k + 1) % 2].
        self.states = [self._new("float32", 4, b, *latent) for _ in range(2)]
        self.latents = self.states[s.steps % 2].part(0)
        self.image = self._new("uint8", b, m.height, m.width, 3)
        # One for each step, and the decoder's.
        self.magnitudes = self._new("float32", s.steps + 1, _ROW)

        self.guidance = self._new("float32", n, b)
        self.x0_limit = self._new("float32", 1)
        self.rows = self._new("float32", s.steps, 2, _ROW)
        # A row for each step, so long that every one is aligned for TensorRT.
        self.step_noise = self._new("float32", sum(s.noisy), aligned(4 * b * math.prod(latent)) // 4)
        zero_noise = self._new("float32", b, *latent)
        noisy_steps = iter(range(sum(s.noisy)))
        self.noises = [
            self.step_noise.part(next(noisy_steps), shape=(b, *latent)) if noisy else zero_noise for noisy in s.noisy
        ]

        unet = bundle.graph("unet")
        # What only a distilled UNet reads.
        self.distilled = {
            t.name: self._new(t.dtype, n * b, *t.shape[1:]) for t in unet.inputs if t.name == "timestep_cond"
        }
        self._residual_shapes = {t.name: t.shape for t in unet.inputs if t.name == "mid" or t.name.startswith("down_")}
        self._residual_batch = (float_type, n * b)
        # Where no control applies, the UNet reads zeros that nothing writes.
        self.no_residuals = self.residuals() if not all(any_active(s)) else {}
        self.control_residuals = [self.residuals() for _ in s.controls]
        self.sums = [self.residuals() for _ in range(min(len(s.controls) - 1, 2))]
        self.scales = [self._new("float32", len(self._residual_shapes), n * b) for _ in s.controls]

    def timestep(self, k: int) -> Buffer:
        """The timestep of step k, [1]."""
        return self.rows.part(k, _TIMESTEP, shape=(1,))

    def coefficients(self, k: int) -> Buffer:
        """The coefficients of step k, [5,7]."""
        return self.rows.part(k, _COEFFICIENTS, shape=(5, 7))

    def magnitude(self, k: int) -> Buffer:
        """The mean magnitude of the state after step k, [1]; the last is the decoder's."""
        return self.magnitudes.part(k, shape=(1,))

    def residuals(self) -> Residuals:
        """New buffers for a ControlNet's residuals."""
        float_type, batch = self._residual_batch
        return {name: self._new(float_type, batch, *shape[1:]) for name, shape in self._residual_shapes.items()}

    def _new(self, dtype: str, *shape: int | str) -> Buffer:
        if not all(isinstance(d, int) for d in shape):
            raise BundleError(f"a graph has {list(shape)} where its sizes must be fixed: export the bundle again")
        return self._allocate([int(d) for d in shape], dtype)

    def _output(self, bundle: Bundle, graph: str, output: str) -> TensorSpec:
        return next(t for t in bundle.graph(graph).outputs if t.name == output)


def workspace_bytes(bundle: Bundle, shape: LoopShape) -> int:
    """What the buffers of a loop shape take, each rounded up to the alignment."""
    total = 0

    def count(shape: Sequence[int], dtype: str) -> Buffer:
        nonlocal total
        buffer = Buffer(0, tuple(shape), np.dtype(dtype), None)
        total += aligned(buffer.nbytes)
        return buffer

    Workspace(count, bundle, shape)
    return total


class Program:
    """The launches of one loop shape, in three phases: `encode` (prompt and conditions), `denoise`, `decode`."""

    def __init__(self, backend: Backend, bundle: Bundle, shape: LoopShape) -> None:
        self.shape = shape
        nbytes = workspace_bytes(bundle, shape)
        backend.reserve(graphs_of(shape), nbytes)
        self.workspace = w = Workspace(backend.arena(nbytes), bundle, shape)
        self.recording: Launch | None = None
        self.unrecordable = ""  # why there is no recording, where the backend tried
        self._backend = backend
        self._bundle = bundle
        self.text = self._step(
            "text_encoder", input_ids=w.input_ids, clip_skip=w.clip_skip, prompt_embeds=w.encoded_prompts
        )
        self.hints = [
            self._step("hint", f"hint_{condition}", control_image=w.control_image, hint=w.hint)
            for condition, _ in shape.controls
            if w.control_image is not None and w.hint is not None
        ]
        self.denoise = [step for k in range(shape.steps) for step in self._denoise_step(k)]
        self.decode = [self.decoder("vae_decoder")]

    def fill(self, tensors: RequestTensors) -> None:
        """Writes a request's values into the buffers, but for prompt and conditions: those are `encode`'s."""
        w, put, s, table = self.workspace, self._backend.upload, self.shape, tensors.table
        n = 2 if s.guided else 1
        put(w.guidance, tensors.guidance(s.guided))
        put(w.x0_limit, np.array([table.x0_limit], np.float32))
        rows = np.zeros(w.rows.shape, np.float32)
        rows[:, _TIMESTEP, 0] = table.timesteps
        rows[:, _COEFFICIENTS, :35] = table.coefficients.reshape(s.steps, 35)
        put(w.rows, rows)
        for buffer, scales in zip(w.scales, tensors.residual_scales, strict=True):
            put(buffer, scales.reshape(buffer.shape))
        noises = [noise for noise in tensors.step_noise if noise is not None]
        if noises:
            padded = np.zeros(w.step_noise.shape, np.float32)
            padded[:, : noises[0].size] = np.stack(noises).reshape(len(noises), -1)
            put(w.step_noise, padded)
        for buffer in w.distilled.values():
            assert tensors.timestep_cond is not None
            put(buffer, tensors.timestep_cond.astype(buffer.dtype))
        x = tensors.latents
        put(w.states[0], np.stack([x, *[np.zeros_like(x)] * 3]))
        put(w.model_input, np.concatenate([x * np.float32(table.input_scale)] * n))

    def encode(self, tensors: RequestTensors, encodings: EncodingCache, clock: Stopwatch) -> None:
        """Prompt and conditions into their buffers, each computed only where `encodings` does not have it."""
        prompts, w, b = tensors.prompts, self.workspace, self.shape.images
        text = {"input_ids": prompts.input_ids, "clip_skip": prompts.clip_skip}
        encodings.encode(self.text, text, clock, weights=prompts.weights)
        for step, images, hints in zip(self.hints, tensors.control_images, w.hints, strict=True):
            for image in {id(image): image for image in images}.values():
                # A row of the batch is an image's on one side of the guidance.
                targets = [hints.part(row) for row in range(hints.shape[0]) if images[row % b] is image]
                encodings.encode(step, {"control_image": image[None]}, clock, targets)

    def latents_after(self, k: int) -> NDArray[np.float32]:
        """The latents [B,4,h,w] after step k, while step k + 1 has not run yet."""
        state: NDArray[np.float32] = self._backend.download(self.workspace.states[(k + 1) % 2])[0]
        return state

    def record(self) -> None:
        """Records denoising and decoding as one launch, where the backend can. They must have run before."""
        if self.recording is not None or self.unrecordable:
            return
        try:
            self.recording = self._backend.record([step.launch for step in (*self.denoise, *self.decode)])
        except BackendError as e:
            self.unrecordable = str(e)

    def decoder(self, graph: str) -> Step:
        """The decoding of the final latents with this graph."""
        w = self.workspace
        buffers = {"latents": w.latents, "image": w.image, "magnitude": w.magnitude(self.shape.steps)}
        return self._step("vae_decoder", graph, **buffers)

    def _denoise_step(self, k: int) -> list[Step]:
        s, w = self.shape, self.workspace
        step = {"model_input": w.model_input, "timestep": w.timestep(k), "prompt_embeds": w.prompt_embeds}
        steps: list[Step] = []
        total: Residuals | None = None
        sums = 0
        for i, (condition, active) in enumerate(s.controls):
            if not active[k]:
                continue
            own = w.control_residuals[i]
            controlnet = {**step, "hint": w.hints[i], "scales": w.scales[i], **own}
            steps.append(self._step("controlnet", f"controlnet_{condition}", k, **controlnet))
            if total is None:
                total = own
                continue
            target = w.sums[sums % 2]
            sums += 1
            both = {**total, **{f"other_{t}": b for t, b in own.items()}, **{f"sum_{t}": b for t, b in target.items()}}
            steps.append(self._step("controlnet", "add_residuals", k, **both))
            total = target
        residuals = w.no_residuals if total is None else total
        steps.append(self._step("unet", "unet", k, **step, **w.distilled, **residuals, noise_pred=w.noise_pred))

        n, b = 2 if s.guided else 1, s.images
        grouped = (n, b, *w.model_input.shape[1:])
        update = self._step(
            "update",
            "update",
            k,
            True,
            noise_pred=w.noise_pred.reshape(*grouped),
            guidance=w.guidance,
            state=w.states[k % 2],
            coefficients=w.coefficients(k),
            x0_limit=w.x0_limit,
            noise=w.noises[k],
            new_state=w.states[(k + 1) % 2],
            model_input=w.model_input.reshape(*grouped),
            magnitude=w.magnitude(k),
        )
        return [*steps, update]

    def _step(
        self, stage: str, graph: str | None = None, index: int | None = None, ends: bool = False, /, **buffers: Buffer
    ) -> Step:
        graph = graph or stage
        spec = self._bundle.graph(graph)
        inputs, outputs = ({t.name: buffers[t.name] for t in tensors} for tensors in (spec.inputs, spec.outputs))
        return Step(stage, graph, self._backend.load(graph).bind(buffers), inputs, outputs, index, ends)


def run(
    steps: Sequence[Step],
    clock: Stopwatch,
    on_step_end: Callable[[int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Launches in order, marks each one's stage, and tells `on_step_end` the step k that ended.

    `on_progress` is told too; its time, unlike that of `on_step_end`, is no stage of its own.
    """
    for step in steps:
        step.launch()
        clock.mark(step.stage)
        if not step.ends or step.index is None:
            continue
        if on_step_end is not None:
            on_step_end(step.index)
            clock.mark("callback")
        if on_progress is not None:
            on_progress(step.index)


def graphs_of(shape: LoopShape) -> list[str]:
    """The names of the graphs that a loop shape launches."""
    own = [f"{role}_{condition}" for condition, _ in shape.controls for role in ("hint", "controlnet")]
    adding = ["add_residuals"] if len(shape.controls) > 1 else []
    return ["text_encoder", "unet", "update", "vae_decoder", *adding, *own]


def any_active(shape: LoopShape) -> list[bool]:
    """For each step whether any control applies."""
    return [any(active[k] for _, active in shape.controls) for k in range(shape.steps)]


def latent_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(channels, h, w) of one image's latents."""
    factor = manifest.vae_scale_factor
    return manifest.latent_channels, manifest.height // factor, manifest.width // factor
