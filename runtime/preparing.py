"""From planned requests to a filled program: noise, initial latents, control images, scales."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..bundles.bundle import Bundle
from ..conditions import CONDITIONS
from ..errors import UserError
from .backends.cuda import Cuda
from .backends.interface import Backend, Buffer, Stopwatch
from .control.scales import residual_scales
from .encoding_cache import EncodingCache
from .images.device_image import DeviceImage
from .images.fitting import to_size
from .images.image_files import Pixels
from .init_image import draws_noise, encode_init_image, fit_init_image
from .loop import Program, RequestTensors, graphs_of
from .planning import Plan
from .program_cache import ProgramCache
from .recordings import Recordings
from .sampling.guidance import guidance_embedding
from .sampling.noise import TorchGenerator
from .settings.request import Control, ResolvedRequest
from .shape import LoopShape
from .text.prompts import join
from .workspace import latent_shape


@dataclass(frozen=True, eq=False)
class Prepared:
    """A program that is ready for its first step.

    Attributes:
        recordings: of the program.
        plans: of the requests whose images it makes.
        control_images: for each request, those of its controls.
        notes: for each request.
    """

    recordings: Recordings
    tensors: RequestTensors
    clock: Stopwatch
    plans: tuple[Plan, ...]
    control_images: tuple[tuple[Pixels | DeviceImage, ...], ...]
    notes: tuple[tuple[str, ...], ...]

    @property
    def program(self) -> Program:
        """What runs."""
        return self.recordings.program

    def host_control_images(self, backend: Backend) -> list[tuple[Pixels, ...]]:
        """The control images of each request; those on the GPU are copied from there."""
        return [tuple(_on_host(backend, image) for image in images) for images in self.control_images]


@dataclass(frozen=True, eq=False)
class Ran:
    """What ran: its program has the images. `remarks` are on all requests, `start` is a time of `perf_counter`."""

    ready: Prepared
    remarks: tuple[str, ...]
    start: float

    def timings(self) -> dict[str, float]:
        """Seconds by stage, and from the start until now."""
        stages = self.ready.clock.seconds()
        return {**stages, "total": time.perf_counter() - self.start}


class Preparation:
    """Makes programs ready, with what it keeps from request to request.

    Attributes:
        programs: by loop shape.
        encodings: of prompts and control images.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self.encodings = EncodingCache(backend)
        # Bound to the cache, not to this object: a cycle would keep a dropped pipeline's memory until it is collected.
        self.programs = ProgramCache(backend, bundle, self.encodings.clear)

    def forget_encodings(self) -> None:
        """Drops the cached encodings: one of them may hold what is not finite."""
        self.encodings.clear()

    def prepare(self, plans: Sequence[Plan]) -> Prepared:
        """Everything before the first step of requests that run in one launch list."""
        clock = self.backend.stopwatch()
        requests = [plan.request for plan in plans]
        shape = replace(plans[0].shape, images=sum(plan.shape.images for plan in plans))
        schedule = plans[0].schedule
        recordings = self.programs.program(shape, schedule)
        program = recordings.program
        clock.mark("load")
        fitted = [[self._control_image(control) for control in request.controls] for request in requests]
        starts = [self._start(plan, shape) for plan in plans]
        images = [(i, r) for i, r in enumerate(requests) for _ in range(r.num_images_per_prompt)]
        width, sides = self.bundle.guidance_width, 2 if shape.guided else 1
        noise = [[step[k] for _, step, _ in starts] for k in range(schedule.steps)]
        tensors = RequestTensors(
            prompts=join([plan.prompts for plan in plans], sides),
            control_images=[[fitted[i][c][0] for i, _ in images] for c in range(len(shape.controls))],
            table=plans[0].table,
            guidance_scales=[r.guidance_scale for _, r in images],
            residual_scales=[
                np.stack([self._scales(r, c, shape.guided) for _, r in images], -1) for c in range(len(shape.controls))
            ],
            latents=np.concatenate([latents for latents, _, _ in starts]),
            step_noise=[
                np.concatenate([part for part in parts if part is not None]) if needed else None
                for parts, needed in zip(noise, schedule.noisy, strict=True)
            ],
            timestep_cond=None
            if width is None
            else np.concatenate([guidance_embedding(r.guidance_scale, width) for _, r in images]),
        )
        program.fill(tensors)
        clock.mark("fill")
        program.encode(tensors, self.encodings, clock)
        return Prepared(
            recordings,
            tensors,
            clock,
            tuple(plans),
            tuple(tuple(pixels for pixels, _ in pairs) for pairs in fitted),
            tuple(
                (*plan.notes, *notes, *(note for _, more in pairs for note in more))
                for plan, (_, _, notes), pairs in zip(plans, starts, fitted, strict=True)
            ),
        )

    def _start(
        self, plan: Plan, shape: LoopShape
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32] | None], list[str]]:
        """The first x of a request, the noise of each step, and notes.

        All of image i is drawn from its seed's `torch.Generator("cpu")`, in the order that diffusers draws.
        """
        request, table = plan.request, plan.table
        size = latent_shape(self.bundle.manifest)
        generators = [TorchGenerator(seed) for seed in request.seeds]

        def draw() -> NDArray[np.float32]:
            return np.stack([g.randn(*size) for g in generators])

        notes: list[str] = []
        init_latents = None
        if request.init_image is not None:
            image, notes = fit_init_image(self.bundle, request.init_image)
            sample = draw() if draws_noise(self.bundle) else None
            init_latents, more = self.programs.retry_with_eviction(
                [shape, *graphs_of(shape, self.bundle)],
                lambda: encode_init_image(self.bundle, self.backend, image, sample, len(generators)),
            )
            notes = [*notes, *more]
        noise = draw()
        if init_latents is None:
            latents = noise * np.float32(table.init_noise_sigma)
        else:
            a, b = table.add_noise
            latents = np.float32(a) * init_latents + np.float32(b) * noise
        return latents, [draw() if needed else None for needed in plan.schedule.noisy], notes

    def require_readable(self, control: Control) -> None:
        """Checks that a control image in a GPU's memory can be read there.

        Raises:
            UserError: it cannot.
        """
        if not isinstance(control.image, DeviceImage):
            return
        m, what = self.bundle.manifest, f"the {control.condition} image"
        if not isinstance(self.backend, Cuda):
            raise UserError(
                f"{what} is in a GPU's memory, and {self.backend.name} runs on the CPU: give it as a NumPy array"
            )
        if control.image.shape != (m.height, m.width, 3):
            found = f"{control.image.width}x{control.image.height}"
            raise UserError(f"{what} on the GPU has {found} pixels, the bundle {m.width}x{m.height}: resize it there")

    def _control_image(self, control: Control) -> tuple[Pixels | DeviceImage, list[str]]:
        return (control.image, []) if isinstance(control.image, DeviceImage) else fit_control(self.bundle, control)

    def _scales(self, request: ResolvedRequest, control: int, guided: bool) -> NDArray[np.float32]:
        return residual_scales(
            request.controls[control].controlnet_conditioning_scale,
            len(self.bundle.graph(f"controlnet_{request.controls[control].condition}").outputs),
            guided=guided,
            guess_mode=request.guess_mode,
        )


def _on_host(backend: Backend, image: Pixels | DeviceImage) -> Pixels:
    if not isinstance(image, DeviceImage):
        return image
    return backend.download(Buffer(image.address, image.shape, np.dtype(np.uint8), image.owner))


def fit_control(bundle: Bundle, control: Control) -> tuple[Pixels, list[str]]:
    """The control image at the bundle's size, and a note where it was resized."""
    m = bundle.manifest
    what, resample = f"the {control.condition} image", CONDITIONS[control.condition].resample
    pixels, notes = to_size(control.pixels, what, m.width, m.height, resample)
    return (pixels if notes else pixels.copy()), notes  # the result's, which shares no memory with the request
