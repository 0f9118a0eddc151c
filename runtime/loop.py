"""The denoising loop as a list of launches over named buffers (docs/design.md, "The loop is a list of launches").

What shapes the list is a `Structure`: sizes, steps, guided or not, which controls apply at which step. What only
changes values (prompt, seed, scales, the sampler's coefficients) is data in the buffers, so one list serves every
request of a structure, and a backend that can record launches records it once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, Manifest
from .backend import Backend, Buffer, Launch
from .schedulers import SamplerTable

# What a ControlNet hands the UNet, buffer by tensor name.
Residuals = dict[str, Buffer]


@dataclass(frozen=True)
class Structure:
    """Everything that decides which launches there are.

    Attributes:
        images: B.
        guided: whether the batch is doubled for classifier-free guidance.
        steps: N.
        controls: conditions in their order, with the steps at which each applies ([N] booleans).
        noisy: whether the sampler adds fresh noise at a step ([N] booleans).
    """

    images: int
    guided: bool
    steps: int
    controls: tuple[tuple[str, tuple[bool, ...]], ...]
    noisy: tuple[bool, ...]


@dataclass(frozen=True)
class Step:
    """A launch with the stage it counts for and, for an update, the step k that it ends."""

    stage: str
    launch: Launch
    ends: int | None = None


class Workspace:
    """The named buffers of one structure. They are allocated once and live as long as any launch holds them."""

    def __init__(self, backend: Backend, bundle: Bundle, structure: Structure) -> None:
        self._allocate = backend.allocate
        s, m = structure, bundle.manifest
        b, n = s.images, 2 if s.guided else 1
        float_type = "float16" if m.precision == "fp16" else "float32"
        tokens, width = bundle.graph("text_encoder").outputs[0].shape[1:]
        latent = latent_shape(m)

        self.input_ids = self._new("int64", n * b, tokens)
        self.prompt_embeds = self._new(float_type, n * b, tokens, width)
        self.control_images = [self._new("uint8", 1, m.height, m.width, 3) for _ in s.controls]
        self.hints = [self._like(bundle, f"hint_{name}", "hint") for name, _ in s.controls]

        self.model_input = self._new(float_type, n * b, *latent)
        self.noise_pred = self._new(float_type, n * b, *latent)
        # Read from one, write to the other: step k leaves the state in states[(k + 1) % 2].
        self.states = [self._new("float32", 4, b, *latent) for _ in range(2)]
        self.latents = Buffer(self.states[s.steps % 2].address, (b, *latent), np.dtype("float32"), self.states)
        self.image = self._new("uint8", b, m.height, m.width, 3)

        # Row k of a table is its own buffer: a launch binds it, nothing is copied inside the loop.
        self.guidance = self._new("float32", n)
        self.timesteps = [self._new("float32", 1) for _ in range(s.steps)]
        self.coefficients = [self._new("float32", 5, 6) for _ in range(s.steps)]
        self.scales = [[self._new("float32") for _ in range(s.steps)] for _ in s.controls]
        silence = self._new("float32", b, *latent)
        self.noises = [self._new("float32", b, *latent) if noisy else silence for noisy in s.noisy]

        unet = bundle.graph("unet")
        self._residual_shapes = {t.name: t.shape for t in unet.inputs if t.name == "mid" or t.name.startswith("down_")}
        self._residual_batch = (float_type, n * b)
        # Where no control applies, the UNet reads zeros that nothing writes.
        self.no_residuals = self.residuals() if not all(any_active(s)) else {}
        self.control_residuals = [self.residuals() for _ in s.controls]
        self.sums = [self.residuals() for _ in range(min(len(s.controls) - 1, 2))]

    def residuals(self) -> Residuals:
        float_type, batch = self._residual_batch
        return {
            name: self._new(float_type, batch, *(int(d) for d in shape[1:]))
            for name, shape in self._residual_shapes.items()
        }

    def _new(self, dtype: str, *shape: int | str) -> Buffer:
        return self._allocate([int(d) for d in shape], dtype)

    def _like(self, bundle: Bundle, graph: str, output: str) -> Buffer:
        spec = next(t for t in bundle.graph(graph).outputs if t.name == output)
        return self._new(spec.dtype, *spec.shape)


class Program:
    """The launches of one structure, in three phases: `prepare` (prompt and conditions), `denoise`, `decode`."""

    def __init__(self, backend: Backend, bundle: Bundle, structure: Structure) -> None:
        self.structure = structure
        self.workspace = w = Workspace(backend, bundle, structure)
        self._backend = backend
        self.prepare = [self._step("text_encoder", input_ids=w.input_ids, prompt_embeds=w.prompt_embeds)]
        for (condition, _), image, hint in zip(structure.controls, w.control_images, w.hints, strict=True):
            self.prepare.append(self._step("hint", f"hint_{condition}", control_image=image, hint=hint))
        self.denoise = [step for k in range(structure.steps) for step in self._denoise_step(k)]
        self.decode = [self._step("vae_decoder", latents=w.latents, image=w.image)]

    def fill(
        self,
        *,
        input_ids: NDArray[np.int64],
        control_images: Sequence[NDArray[np.uint8]],
        table: SamplerTable,
        guidance_scale: float,
        conditioning_scales: Sequence[float],
        noise: NDArray[np.float32],
        step_noise: Sequence[NDArray[np.float32] | None],
    ) -> None:
        """Writes a request's values into the buffers.

        Args:
            input_ids: [G,77], the negative prompt's first.
            control_images: [H,W,3] for each control.
            noise: [B,4,h,w], what the latents start from.
            step_noise: for each step [B,4,h,w], or None where the sampler adds none.
        """
        w, put = self.workspace, self._backend.upload
        n = 2 if self.structure.guided else 1
        put(w.input_ids, input_ids)
        for buffer, image in zip(w.control_images, control_images, strict=True):
            put(buffer, image[None])
        put(w.guidance, np.array([1 - guidance_scale, guidance_scale] if n == 2 else [1.0], np.float32))
        for k in range(self.structure.steps):
            put(w.timesteps[k], table.timesteps[k : k + 1])
            put(w.coefficients[k], table.coefficients[k].astype(np.float32))
            fresh = step_noise[k]
            if fresh is not None:
                put(w.noises[k], fresh)
        for rows, scale in zip(w.scales, conditioning_scales, strict=True):
            for row in rows:
                put(row, np.array(scale, np.float32))
        x = noise * np.float32(table.init_noise_sigma)
        put(w.states[0], np.stack([x, *[np.zeros_like(x)] * 3]))
        put(w.model_input, np.concatenate([x * np.float32(table.input_scale)] * n))

    def latents_after(self, k: int) -> NDArray[np.float32]:
        """The latents [B,4,h,w] after step k, while step k + 1 has not run yet."""
        state: NDArray[np.float32] = self._backend.download(self.workspace.states[(k + 1) % 2])[0]
        return state

    def _denoise_step(self, k: int) -> list[Step]:
        s, w = self.structure, self.workspace
        step = {"model_input": w.model_input, "timestep": w.timesteps[k], "prompt_embeds": w.prompt_embeds}
        steps: list[Step] = []
        total: Residuals | None = None
        sums = 0
        for i, (condition, active) in enumerate(s.controls):
            if not active[k]:
                continue
            own = w.control_residuals[i]
            controlnet = {**step, "hint": w.hints[i], "scale": w.scales[i][k], **own}
            steps.append(self._step("controlnet", f"controlnet_{condition}", **controlnet))
            if total is None:
                total = own
                continue
            target = w.sums[sums % 2]
            sums += 1
            both = {**total, **{f"other_{t}": b for t, b in own.items()}, **{f"sum_{t}": b for t, b in target.items()}}
            steps.append(self._step("controlnet", "add_residuals", **both))
            total = target
        residuals = w.no_residuals if total is None else total
        steps.append(self._step("unet", **step, **residuals, noise_pred=w.noise_pred))

        n, b = 2 if s.guided else 1, s.images
        grouped = (n, b, *w.model_input.shape[1:])
        update = self._step(
            "update",
            noise_pred=w.noise_pred.reshape(*grouped),
            guidance=w.guidance,
            state=w.states[k % 2],
            coefficients=w.coefficients[k],
            noise=w.noises[k],
            new_state=w.states[(k + 1) % 2],
            model_input=w.model_input.reshape(*grouped),
        )
        return [*steps, Step(update.stage, update.launch, ends=k)]

    def _step(self, stage: str, graph: str | None = None, /, **buffers: Buffer) -> Step:
        return Step(stage, self._backend.load(graph or stage).bind(buffers))


def run(steps: Sequence[Step], timings: dict[str, float], on_step_end: Callable[[int], None] | None = None) -> None:
    """Launches in order, adds the seconds of each to its stage, and tells `on_step_end` the step k that ended."""
    for step in steps:
        start = time.perf_counter()
        step.launch()
        timings[step.stage] = timings.get(step.stage, 0.0) + time.perf_counter() - start
        if on_step_end is not None and step.ends is not None:
            on_step_end(step.ends)


def any_active(structure: Structure) -> list[bool]:
    """For each step whether any control applies."""
    return [any(active[k] for _, active in structure.controls) for k in range(structure.steps)]


def latent_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(channels, h, w) of one image's latents."""
    factor = manifest.vae_scale_factor
    return manifest.latent_channels, manifest.height // factor, manifest.width // factor
