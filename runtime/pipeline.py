"""bundle + request → images, without PyTorch."""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS
from ..errors import BackendError, BundleError, UserError
from .backends.interface import Backend, Stopwatch
from .backends.registry import open_backend
from .encoding_cache import Encodings
from .finiteness import require_finite
from .init_image import ENCODER, draws_noise, encode_init_image, encoder_bytes, first_step, fit_init_image
from .loop import Program, Structure, Values, graphs_of, latent_shape, run, workspace_bytes
from .program_cache import Residents
from .request import Control, Request
from .sampling.guidance import guidance_embedding, is_guided
from .sampling.noise import TorchGenerator
from .sampling.schedulers import UNLIMITED, SamplerTable, build_table
from .text.prompts import Prompts, read_prompts
from .text.tokenizer import Tokenizer

OnStepEnd = Callable[[int, float, NDArray[np.float32]], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Result:
    """Attributes:
    images: uint8 [B,H,W,3].
    latents: float32 [B,4,h,w], what the decoder was given (not divided by the scaling factor).
    seed: of image 0; image i has seed + i.
    timings: seconds by stage, `total` included. Where the whole loop ran as one recording, `loop` stands for its
        stages.
    controls: the control images as they were used, uint8 [H,W,3] each. As every array here, no other's memory: neither
        the request's nor the pipeline's.
    notes: what was changed or dropped on the way (resized conditions, truncated prompts), one line each.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    seed: int
    timings: dict[str, float]
    controls: tuple[NDArray[np.uint8], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A program that is ready for its first step, with what `Result` takes over."""

    program: Program
    values: Values
    clock: Stopwatch
    seed: int
    notes: tuple[str, ...]


class Pipeline:
    """Runs requests on a bundle. Safe to call from several threads: requests run one after the other."""

    def __init__(self, bundle: Bundle, backend: Backend, reason: str = "") -> None:
        self.bundle = bundle
        self.backend = backend
        self.reason = reason
        self._tokenizer = _tokenizer(bundle)
        self._encodings = Encodings(backend)
        self._residents = Residents(backend, bundle)
        self._lock = threading.RLock()  # a callback may extract while its own thread draws
        self._drawing = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        threads: int | None = None,
        *,
        openvino_precision: str | None = None,
        plans: Path | None = None,
        vram_budget: int | None = None,
        warm: bool | Request = False,
    ) -> "Pipeline":
        """Opens a bundle on a backend. Graphs are loaded when a request first needs them.

        Args:
            backend: one of `BACKENDS`; `auto` takes the fastest that works here, and `reason` says why that one.
            threads: of the CPU backends; None uses every physical core.
            openvino_precision: of the backend `openvino`: `f32` (exact, the default) or `bf16`.
            plans: the plan store of the backend `tensorrt`; None is the default one.
            vram_budget: of the backend `tensorrt`: device bytes that weights, activations and buffers may take. The
                engines of conditions that were used longest ago are unloaded to keep it, and loaded again on demand.
            warm: draws once, so that requests of that structure (sizes, steps, guidance, conditions) pay for nothing
                any more: a request, or True for the model's own example and defaults.
        Raises: UserError, BundleError, BackendError
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        loaded, reason = open_backend(
            opened,
            backend,
            threads=threads,
            openvino_precision=openvino_precision,
            plans=plans,
            vram_budget=vram_budget,
        )
        pipeline = cls(opened, loaded, reason)
        if warm:
            pipeline(warm if isinstance(warm, Request) else _example_request(opened))
        return pipeline

    def __call__(
        self,
        request: Request,
        callback_on_step_end: OnStepEnd | None = None,
        *,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Draws the images of a request.

        Args:
            callback_on_step_end: is given the step k, its timestep and a copy of the latents [B,4,h,w] after it.
            on_progress: is given how many steps were launched and how many there are, after each one, and no latents:
                it costs nothing but its own time. Not called where the whole loop runs as one recording.
        Raises: UserError where the request asks for what this bundle has not, BackendError where a graph fails,
            DeviceMemoryError where it does not fit although everything that can be unloaded is.
        """
        with self._lock:
            if self._drawing:
                raise UserError(
                    "a pipeline cannot be called from its own callback: it would write over the image it draws"
                )
            self._drawing = True
            try:
                return self._draw(request, callback_on_step_end, on_progress)
            finally:
                self._drawing = False

    def prepare(self, request: Request) -> "Prepared":
        """Everything before the first step: the program is built, filled, and prompt and conditions are encoded.

        Not locked against other threads: for measuring and for stepping through a program by hand.
        """
        for control in request.controls:
            self.bundle.require_condition(control.condition)
        notes: list[str] = []
        clock = self.backend.stopwatch()
        prompts, table, structure = self._plan(request, notes)
        program = self._residents.program(structure)
        clock.mark("load")
        seed = secrets.randbits(32) if request.seed is None else int(request.seed)
        noise, step_noise, init_latents = self._noise(request, seed, structure, notes)
        width = self.bundle.guidance_width
        values = Values(
            prompts=prompts,
            control_images=tuple(self._fit(control, notes) for control in request.controls),
            table=table,
            guidance_scale=request.guidance_scale,
            conditioning_scales=[c.controlnet_conditioning_scale for c in request.controls],
            noise=noise,
            step_noise=step_noise,
            init_latents=init_latents,
            timestep_cond=None if width is None else guidance_embedding(request.guidance_scale, width),
        )
        program.fill(values)
        clock.mark("fill")
        program.encode(values, self._encodings, clock)
        return Prepared(program, values, clock, seed, tuple(notes))

    def memory_needed(self, request: Request) -> dict[str, int]:
        """Bytes of device memory that a request would take beyond what is held, by part, before anything is loaded.

        Empty on a CPU. A request that does not fit raises DeviceMemoryError and loads nothing.
        """
        structure = self._plan(request, [])[2]
        graphs, nbytes = graphs_of(structure), workspace_bytes(self.bundle, structure)
        if request.init_image is not None:
            graphs, nbytes = [*graphs, ENCODER], nbytes + encoder_bytes(self.bundle)
        with self._lock:
            return self.backend.needed(graphs, nbytes)

    def extract(self, condition: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The control image [H,W,3] of a photo [*,*,3], at the bundle's size.

        Raises: UserError where the bundle has no extractor for the condition.
        """
        from .control.extraction import extract

        self.bundle.require_condition(condition)
        with self._lock:
            graph = f"extractor_{condition}"
            return self._residents.with_room([graph], lambda: extract(self.bundle, self.backend, condition, image))

    def _draw(self, request: Request, on_step_end: OnStepEnd | None, on_progress: OnProgress | None = None) -> Result:
        start = time.perf_counter()
        ready = self.prepare(request)
        program, clock = ready.program, ready.clock
        steps = ready.values.table.timesteps
        progress = None if on_progress is None else lambda k: on_progress(k + 1, len(steps))
        if on_step_end is not None:
            run(program.denoise, clock, lambda k: on_step_end(k, float(steps[k]), program.latents_after(k)), progress)
            run(program.decode, clock)
        elif program.recording is not None:
            program.recording()
            clock.mark("loop")
        else:
            run([*program.denoise, *program.decode], clock, on_progress=progress)
        try:
            found = self._residents.with_room(  # it may load another decoder
                [program.structure, *graphs_of(program.structure)],
                lambda: require_finite(program, ready.values, self.backend, self.bundle),
            )
            notes = [*ready.notes, *found]
        except BackendError:
            self._encodings = Encodings(self.backend)  # it may be one of these that went bad
            raise
        images = self.backend.download(program.workspace.image)
        latents = self.backend.download(program.workspace.latents)
        timings = clock.seconds()
        if on_step_end is None:
            program.record()  # everything in it has run now; the next request of this structure replays it
        if program.unrecordable:
            notes.append(f"the loop runs launch by launch: {program.unrecordable}")
        timings["total"] = time.perf_counter() - start
        return Result(images, latents, ready.seed, timings, tuple(ready.values.control_images), tuple(notes))

    def _plan(self, request: Request, notes: list[str]) -> tuple[Prompts, SamplerTable, Structure]:
        """The prompts, the sampler's table, and the structure that they make."""
        m = self.bundle.manifest
        if request.clip_skip >= m.text_encoder_layers:
            raise UserError(f"clip_skip must be from 0 to {m.text_encoder_layers - 1}, not {request.clip_skip}")
        begin = first_step(request)
        table = build_table(request.scheduler, m.scheduler_config, request.num_inference_steps, begin)
        if table.x0_limit < UNLIMITED:
            notes.append(
                f"{request.scheduler} clips what each step predicts to ±{table.x0_limit:g}: clip_sample in the model's "
                "scheduler config, or diffusers' default where it is not there"
            )
        prompts = read_prompts(self._tokenizer, request, is_guided(self.bundle, request), notes)
        return prompts, table, structure_of(self.bundle, request, table, prompts.chunks)

    def _noise(
        self, request: Request, seed: int, structure: Structure, notes: list[str]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32] | None], NDArray[np.float32] | None]:
        """The noise to start from, that of each step, and the latents of the initial image.

        All of image i is drawn from `torch.Generator("cpu").manual_seed(seed + i)`, in the order that diffusers draws.
        """
        shape, images = latent_shape(self.bundle.manifest), structure.images
        generators = [TorchGenerator(seed + i) for i in range(images)]

        def draw() -> NDArray[np.float32]:
            return np.stack([g.randn(*shape) for g in generators])

        latents = None
        if request.init_image is not None:
            image = fit_init_image(self.bundle, request.init_image, notes)
            sample = draw() if draws_noise(self.bundle) else None
            latents, said = self._residents.with_room(
                [structure, *graphs_of(structure)],
                lambda: encode_init_image(self.bundle, self.backend, image, sample, images),
            )
            notes += said
        return draw(), [draw() if needed else None for needed in structure.noisy], latents

    def _fit(self, control: Control, notes: list[str]) -> NDArray[np.uint8]:
        m = self.bundle.manifest
        height, width = control.image.shape[:2]
        if (width, height) == (m.width, m.height):
            return control.image.copy()  # the result's, which must not change with what a request or a caller holds
        from .images.image_files import resize

        resample = CONDITIONS[control.condition].resample
        notes.append(
            f"the {control.condition} image was resized from {width}x{height} to {m.width}x{m.height} ({resample})"
        )
        return resize(control.image, m.width, m.height, resample)


def structure_of(bundle: Bundle, request: Request, table: SamplerTable, chunks: int = 1) -> Structure:
    """What of a request decides which launches there are; `table` is its sampler's."""
    n = len(table.timesteps)
    return Structure(
        images=request.num_images_per_prompt,
        guided=is_guided(bundle, request),
        steps=n,
        controls=tuple((c.condition, c.active(n)) for c in request.controls),
        noisy=tuple(bool(b) for b in table.uses_noise),
        chunks=chunks,
    )


def _tokenizer(bundle: Bundle) -> Tokenizer:
    """Raises: BundleError where it cannot be read, or makes prompts that the text encoder does not take."""
    m = bundle.manifest
    tokenizer = Tokenizer(bundle.tokenizer_folder(), m.embeddings, m.vocabulary or None)
    positions = int(bundle.graph("text_encoder").outputs[0].shape[1])
    if tokenizer.model_max_length != positions:
        raise BundleError(
            f"the tokenizer of {bundle.folder} makes prompts of {tokenizer.model_max_length} tokens, its text encoder "
            f"reads {positions}: export the bundle anew"
        )
    return tokenizer


def _example_request(bundle: Bundle) -> Request:
    """The bundle's first condition, with the model's defaults, on an empty control image."""
    m = bundle.manifest
    controls = [Control(c, np.zeros((m.height, m.width, 3), np.uint8)) for c in list(m.conditions)[:1]]
    given: dict[str, Any] = dict(m.defaults)
    return Request("", controls=tuple(controls), seed=0, **given)
