"""bundle + request → images, without PyTorch."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundles.bundle import Bundle
from ..bundles.defaults import SamplingDefaults
from ..conditions import CONDITIONS
from ..errors import BackendError, BundleError, Cancelled, UserError
from .backends.interface import Backend, Stopwatch
from .backends.registry import open_backend
from .control.consistency import Score, graded, score
from .control.extraction import extract
from .control.scales import residual_scales
from .encoding_cache import EncodingCache
from .finiteness import check_finite
from .images.fitting import to_size
from .images.image_files import ImageLike, Pixels, to_pixels
from .init_image import ENCODER, draws_noise, encode_init_image, encoder_bytes, first_step, fit_init_image
from .loop import Program, Structure, Values, graphs_of, latent_shape, run, workspace_bytes
from .options import OptionFields, RuntimeOptions
from .program_cache import ProgramCache
from .request import MAX_IMAGES, Control, Request, ResolvedRequest
from .sampling.guidance import guidance_embedding, is_guided
from .sampling.noise import TorchGenerator
from .sampling.schedulers import UNLIMITED, SamplerTable, build_table
from .text.prompts import Prompts, join, read_prompts
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .generate import GenerateResult

OnStepEnd = Callable[[int, float, NDArray[np.float32]], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The images of a request.

    Attributes:
        images: uint8 [B,H,W,3].
        latents: float32 [B,4,h,w], what the decoder was given (not divided by the scaling factor).
        request: as it was run: with every setting and seed.
        timings: seconds by stage, `total` included; of a batch, those of all requests that ran together. Where the
            whole loop ran as one recording, `loop` stands for its stages.
        control_images: as they were used, uint8 [H,W,3] each. Like every array here they share no memory with the
            request or the pipeline.
        notes: what was changed or dropped (resized images, truncated prompts), one line each.
    """

    images: Pixels
    latents: NDArray[np.float32]
    request: ResolvedRequest
    timings: dict[str, float]
    control_images: tuple[Pixels, ...]
    notes: tuple[str, ...]
    _pipeline: "Pipeline | None" = field(default=None)

    @property
    def seed(self) -> int:
        """Of image 0."""
        return self.request.seeds[0]

    def pil(self) -> list[Image.Image]:
        """The images as Pillow's."""
        return [Image.fromarray(image) for image in self.images]

    def save(self, folder: str | Path) -> "GenerateResult":
        """Writes `image-0.png`, … with the metadata that repeats them, and `sheet.png` with the scores.

        Args:
            folder: is created where it is missing. A file that exists is not overwritten.

        Returns:
            The paths of what was written, and the scores.

        Raises:
            UserError: a file exists already.
            CnppError: a file cannot be written, or the pipeline is closed, which makes the sheet.
        """
        from .generate import save_result

        if self._pipeline is None:
            raise UserError("a result that came from another process has no pipeline to make its sheet: save it there")
        return save_result(self._pipeline, self, Path(folder))

    def __repr__(self) -> str:
        count, height, width = self.images.shape[:3]
        images = f"{count} image{'s' * (count > 1)} of {width}x{height}"
        return f"<Result: {images}, seed {self.seed}, {self.timings['total']:.2f} s>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}  # a result travels between processes, its pipeline does not


@dataclass(frozen=True, eq=False)
class Plan:
    """A request with all that follows from it before anything is computed.

    Attributes:
        structure: of this request alone.
    """

    request: ResolvedRequest
    prompts: Prompts
    table: SamplerTable
    structure: Structure
    notes: tuple[str, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Requests that share it can run in one launch list: they have one structure and one table."""
        r = self.request
        return replace(self.structure, images=0), r.scheduler, r.num_inference_steps, first_step(r)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A program that is ready for its first step.

    Attributes:
        plans: of the requests whose images it makes.
        control_images: for each request, those of its controls.
        notes: for each request.
    """

    program: Program
    values: Values
    clock: Stopwatch
    plans: tuple[Plan, ...]
    control_images: tuple[tuple[Pixels, ...], ...]
    notes: tuple[tuple[str, ...], ...]


class Pipeline:
    """Runs requests on a bundle. Safe to call from several threads: requests run one after the other.

    As a context manager it is closed at the end.

    Attributes:
        reason: why this backend was chosen.
    """

    def __init__(self, bundle: Bundle, backend: Backend, reason: str = "") -> None:
        self.bundle = bundle
        self.backend = backend
        self.reason = reason
        self.defaults = SamplingDefaults.of(bundle.manifest)
        self._tokenizer = _tokenizer(bundle)
        self._encodings = EncodingCache(backend)
        self._programs = ProgramCache(backend, bundle)
        self._lock = threading.RLock()  # a callback may extract while its own thread generates
        self._running = False
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        options: RuntimeOptions | str | None = None,
        *,
        warm: bool | Request = False,
        **fields: Unpack[OptionFields],
    ) -> "Pipeline":
        """Opens a bundle on a backend. Graphs are loaded when a request first needs them.

        Args:
            bundle: its folder.
            options: where and how graphs run; a string is the name of a backend.
            warm: runs once, so that later requests of that structure (sizes, steps, guidance, conditions) load nothing:
                a request, or True for the model's first condition and defaults.
            **fields: of `RuntimeOptions`, over those of `options`.

        Raises:
            UserError: an option cannot be used.
            BundleError: the bundle is missing or damaged.
            BackendError: the backend does not work here.
        """
        base = RuntimeOptions(options) if isinstance(options, str) else options or RuntimeOptions()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        pipeline = cls(opened, *open_backend(opened, replace(base, **fields)))
        if warm:
            pipeline(warm if isinstance(warm, Request) else pipeline._smallest_request())
        return pipeline

    def __call__(
        self,
        request: Request | str,
        controls: Control | Sequence[Control] = (),
        *,
        callback_on_step_end: OnStepEnd | None = None,
        on_progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
        **fields: Any,
    ) -> Result:
        """Generates the images of a request.

        Args:
            request: a request, or its prompt with its other fields as arguments:
                `pipeline("a red house", Control("seg", "map.png"), seed=3)`.
            controls: of a prompt's request.
            callback_on_step_end: gets the step k, its timestep and a copy of the latents [B,4,h,w] after it.
            on_progress: gets the number of steps that were launched and how many there are, after each one. It costs
                nothing but its own time. Not called where the whole loop runs as one recording.
            cancel: once another thread has set it, the request ends with `Cancelled` after its current step; where the
                whole loop runs as one recording, after that. A callback cancels by raising `Cancelled`.
            **fields: of `Request`, for a prompt.

        Raises:
            UserError: the request asks for what this bundle does not have.
            Cancelled: it was cancelled.
            BackendError: a graph failed.
            DeviceMemoryError: it does not fit into device memory although everything that can be unloaded was.
        """
        if isinstance(request, str):
            request = _request_of(request, controls, fields)
        elif not isinstance(request, Request):
            raise UserError(f"give a Request, or a prompt and its controls, not {type(request).__name__}")
        elif controls or fields:
            raise UserError("a Request has its own controls and settings: give them there")
        plan = self._plan(self.resolve(request))
        [result] = self._locked(lambda: self._generate([plan], callback_on_step_end, on_progress, cancel))
        return result

    def batch(
        self,
        requests: Sequence[Request],
        *,
        max_images: int = MAX_IMAGES,
        on_progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Result]:
        """Generates the images of several requests, together where their structure agrees.

        Requests run in one launch list where they have the same scheduler, number of steps, strength, use of guidance,
        conditions with their steps, and number of prompt chunks. Prompts, control images, seeds, guidance scales and
        conditioning scales may differ. Each result is the one that its request gives alone, but for rounding: kernels
        of other batch sizes add in another order.

        Args:
            requests: any number.
            max_images: of one launch list, 1 to 16. The backend `tensorrt` needs a plan for each number that occurs.
            on_progress: gets the number of steps that were launched and how many there are for all requests.
            cancel: as in `__call__`.

        Returns:
            A result for each request, in their order.

        Raises:
            UserError, Cancelled, BackendError, DeviceMemoryError: as in `__call__`. All requests are checked before the
                first one runs.
        """
        if not 1 <= max_images <= MAX_IMAGES:
            raise UserError(f"max_images must be a whole number from 1 to {MAX_IMAGES}, not {max_images!r}")
        plans = [self._plan(self.resolve(request)) for request in requests]
        launches = _launch_lists(plans, max_images)
        total = sum(plans[indices[0]].structure.steps for indices in launches)
        results: dict[int, Result] = {}
        done = 0
        for indices in launches:
            group = [plans[i] for i in indices]

            progress = None if on_progress is None else partial(_advance, on_progress, done, total)
            found = self._locked(partial(self._generate, group, None, progress, cancel))
            results |= dict(zip(indices, found, strict=True))
            done += group[0].structure.steps
        return [results[i] for i in range(len(plans))]

    def resolve(self, request: Request) -> ResolvedRequest:
        """The request with every setting decided, as `__call__` runs it: the model's own where it says nothing."""
        return request.resolve(self.defaults)

    def prepare(self, request: Request) -> Prepared:
        """Everything before the first step: the program is built, filled, and prompt and conditions are encoded.

        Not locked against other threads: for measuring and for stepping through a program by hand.
        """
        return self._prepare([self._plan(self.resolve(request))])

    def memory_needed(self, request: Request) -> dict[str, int]:
        """Bytes of device memory that a request would take beyond what is held, by part, before anything is loaded.

        Empty on a CPU. A request that does not fit raises DeviceMemoryError and loads nothing.
        """
        structure = self._plan(self.resolve(request)).structure
        graphs, nbytes = graphs_of(structure), workspace_bytes(self.bundle, structure)
        if request.init_image is not None:
            graphs, nbytes = [*graphs, ENCODER], nbytes + encoder_bytes(self.bundle)
        with self._lock:
            return self.backend.needed(graphs, nbytes)

    def extract(self, condition: str, image: ImageLike) -> Pixels:
        """The control image [H,W,3] of a photo, at the bundle's size.

        Args:
            condition: `seg`, `canny`, `hed`, `lineart` or `depth`.
            image: uint8 [*,*,3], an image of Pillow's or the path of a file.

        Raises:
            UserError: the bundle has no extractor for the condition.
        """
        self.bundle.require_condition(condition)
        pixels = to_pixels(image, "the photo", background=(255, 255, 255))
        graph = f"extractor_{condition}"
        with self._lock:
            self._require_open()
            return self._programs.retry_with_eviction(
                [graph], lambda: extract(self.bundle, self.backend, condition, pixels)
            )

    def score(self, condition: str, control_image: ImageLike, image: ImageLike) -> Score:
        """How well an image follows its control image: the condition is extracted from it and compared.

        Args:
            condition: `seg`, `canny`, `hed`, `lineart` or `depth`.
            control_image: as in `Control`; resized to the bundle's size.
            image: as a result has it; also an image of Pillow's or the path of a file.

        Returns:
            The score, with a grade where the model knows its own typical scores.

        Raises:
            UserError: the bundle has no extractor for the condition.
        """
        extracted = self.extract(condition, image)
        given = self._fit(Control(condition, control_image))[0]
        typical = self.bundle.manifest.conditions[condition].get("typical_score")
        return graded(score(condition, given, extracted), typical)

    def close(self) -> None:
        """Frees programs, recordings, engines and buffers. A closed pipeline runs nothing."""
        with self._lock:
            self._closed = True
            self._programs.clear()
            self._encodings = EncodingCache(self.backend)
            for graph in self.bundle.manifest.graphs:
                self.backend.release(graph)

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        m = self.bundle.manifest
        return f"<Pipeline: {m.model}, {m.precision}, {m.width}x{m.height}, on {self.backend.name}>"

    def _locked(self, work: Callable[[], list[Result]]) -> list[Result]:
        with self._lock:
            if self._running:
                raise UserError(
                    "a pipeline cannot be called from its own callback: it would overwrite the image that it generates"
                )
            self._require_open()
            self._running = True
            try:
                return work()
            finally:
                self._running = False

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("the pipeline is closed: open it again")

    def _plan(self, request: ResolvedRequest) -> Plan:
        m = self.bundle.manifest
        for control in request.controls:
            self.bundle.require_condition(control.condition)
        if request.clip_skip >= m.text_encoder_layers:
            raise UserError(f"clip_skip must be from 0 to {m.text_encoder_layers - 1}, not {request.clip_skip}")
        table = build_table(request.scheduler, m.scheduler_config, request.num_inference_steps, first_step(request))
        notes = []
        if table.x0_limit < UNLIMITED:
            notes.append(
                f"{request.scheduler} clips what each step predicts to ±{table.x0_limit:g}: clip_sample in the model's "
                "scheduler config, or diffusers' default where it is not there"
            )
        prompts, remarks = read_prompts(self._tokenizer, request, is_guided(self.bundle, request))
        structure = structure_of(self.bundle, request, table, prompts.chunks)
        return Plan(request, prompts, table, structure, (*notes, *remarks))

    def _prepare(self, plans: Sequence[Plan]) -> Prepared:
        clock = self.backend.stopwatch()
        requests = [plan.request for plan in plans]
        structure = replace(plans[0].structure, images=sum(plan.structure.images for plan in plans))
        program = self._programs.program(structure)
        clock.mark("load")
        fitted = [[self._fit(control) for control in request.controls] for request in requests]
        starts = [self._start(plan, structure) for plan in plans]
        images = [(i, r) for i, r in enumerate(requests) for _ in range(r.num_images_per_prompt)]
        width, sides = self.bundle.guidance_width, 2 if structure.guided else 1
        noise = [[step[k] for _, step, _ in starts] for k in range(structure.steps)]
        values = Values(
            prompts=join([plan.prompts for plan in plans], sides),
            control_images=[[fitted[i][c][0] for i, _ in images] for c in range(len(structure.controls))],
            table=plans[0].table,
            guidance_scales=[r.guidance_scale for _, r in images],
            residual_scales=[
                np.stack([self._residual_scales(r, c, structure.guided) for _, r in images], -1)
                for c in range(len(structure.controls))
            ],
            latents=np.concatenate([latents for latents, _, _ in starts]),
            step_noise=[
                np.concatenate([part for part in parts if part is not None]) if needed else None
                for parts, needed in zip(noise, structure.noisy, strict=True)
            ],
            timestep_cond=None
            if width is None
            else np.concatenate([guidance_embedding(r.guidance_scale, width) for _, r in images]),
        )
        program.fill(values)
        clock.mark("fill")
        program.encode(values, self._encodings, clock)
        return Prepared(
            program,
            values,
            clock,
            tuple(plans),
            tuple(tuple(pixels for pixels, _ in pairs) for pairs in fitted),
            tuple(
                (*plan.notes, *notes, *(note for _, more in pairs for note in more))
                for plan, (_, _, notes), pairs in zip(plans, starts, fitted, strict=True)
            ),
        )

    def _generate(
        self,
        plans: Sequence[Plan],
        on_step_end: OnStepEnd | None,
        on_progress: OnProgress | None,
        cancel: threading.Event | None,
    ) -> list[Result]:
        start = time.perf_counter()
        _require_not_cancelled(cancel)
        ready = self._prepare(plans)
        program, clock = ready.program, ready.clock
        steps = ready.values.table.timesteps

        def progress(k: int) -> None:
            if on_progress is not None:
                on_progress(k + 1, len(steps))
            _require_not_cancelled(cancel)

        if on_step_end is not None:
            run(program.denoise, clock, lambda k: on_step_end(k, float(steps[k]), program.latents_after(k)), progress)
            run(program.decode, clock)
        elif program.recording is not None:
            program.recording()
            clock.mark("loop")
            _require_not_cancelled(cancel)
        else:
            run([*program.denoise, *program.decode], clock, on_progress=progress)
        try:
            remarks = self._programs.retry_with_eviction(  # it may load another decoder
                [program.structure, *graphs_of(program.structure)],
                lambda: check_finite(program, ready.values, self.backend, self.bundle),
            )
        except BackendError:
            self._encodings = EncodingCache(self.backend)  # one of these may hold what is not finite
            raise
        images = self.backend.download(program.workspace.image)
        latents = self.backend.download(program.workspace.latents)
        timings = clock.seconds()
        if on_step_end is None:
            program.record()  # everything in it has run now; the next request of this structure replays it
        if program.unrecordable:
            remarks = [*remarks, f"the loop runs launch by launch: {program.unrecordable}"]
        timings["total"] = time.perf_counter() - start
        results, first = [], 0
        for plan, controls, notes in zip(plans, ready.control_images, ready.notes, strict=True):
            own = slice(first, first + plan.structure.images)
            first = own.stop
            # Copies, so that a result keeps its own images alive and not those of the whole batch.
            parts = (images, latents) if len(plans) == 1 else (images[own].copy(), latents[own].copy())
            results.append(Result(*parts, plan.request, dict(timings), controls, (*notes, *remarks), self))
        return results

    def _start(
        self, plan: Plan, structure: Structure
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32] | None], list[str]]:
        """The first x of a request, the noise of each step, and notes.

        All of image i is drawn from its seed's `torch.Generator("cpu")`, in the order that diffusers draws.
        """
        request, table = plan.request, plan.table
        shape = latent_shape(self.bundle.manifest)
        generators = [TorchGenerator(seed) for seed in request.seeds]

        def draw() -> NDArray[np.float32]:
            return np.stack([g.randn(*shape) for g in generators])

        notes: list[str] = []
        init_latents = None
        if request.init_image is not None:
            image, notes = fit_init_image(self.bundle, request.init_image)
            sample = draw() if draws_noise(self.bundle) else None
            init_latents, more = self._programs.retry_with_eviction(
                [structure, *graphs_of(structure)],
                lambda: encode_init_image(self.bundle, self.backend, image, sample, len(generators)),
            )
            notes = [*notes, *more]
        noise = draw()
        if init_latents is None:
            latents = noise * np.float32(table.init_noise_sigma)
        else:
            a, b = table.add_noise
            latents = np.float32(a) * init_latents + np.float32(b) * noise
        return latents, [draw() if needed else None for needed in structure.noisy], notes

    def _residual_scales(self, request: ResolvedRequest, control: int, guided: bool) -> NDArray[np.float32]:
        return residual_scales(
            request.controls[control].controlnet_conditioning_scale,
            len(self.bundle.graph(f"controlnet_{request.controls[control].condition}").outputs),
            guided=guided,
            guess_mode=request.guess_mode,
        )

    def _fit(self, control: Control) -> tuple[Pixels, list[str]]:
        """The control image at the bundle's size, and a note where it was resized."""
        m = self.bundle.manifest
        what, resample = f"the {control.condition} image", CONDITIONS[control.condition].resample
        pixels, notes = to_size(control.pixels, what, m.width, m.height, resample)
        return (pixels if notes else pixels.copy()), notes  # the result's, which shares no memory with the request

    def _smallest_request(self) -> Request:
        """The bundle's first condition, with the model's defaults, on an empty control image."""
        m = self.bundle.manifest
        blank = np.zeros((m.height, m.width, 3), np.uint8)
        return Request(controls=[Control(c, blank) for c in list(m.conditions)[:1]], seed=0)


def structure_of(bundle: Bundle, request: ResolvedRequest, table: SamplerTable, chunks: int = 1) -> Structure:
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


def _launch_lists(plans: Sequence[Plan], max_images: int) -> list[list[int]]:
    """The indices of the plans that run together, each list of at most `max_images` images, or of one request."""
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for i, plan in enumerate(plans):
        lists = groups.setdefault(plan.key, [[]])
        images = sum(plans[j].structure.images for j in lists[-1]) + plan.structure.images
        if lists[-1] and images > max_images:
            lists.append([])
        lists[-1].append(i)
    return [indices for lists in groups.values() for indices in lists]


def _request_of(prompt: str, controls: Control | Sequence[Control], fields: dict[str, Any]) -> Request:
    try:
        return Request(prompt, controls=controls, **fields)
    except TypeError as e:
        raise UserError(f"a request has no such field ({e}): its fields are those of cnpp_trt.Request") from None


def _advance(on_progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    """Of a launch list that has `done` steps behind it, `before` of them in earlier lists."""
    on_progress(before + done, total)


def _require_not_cancelled(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled


def _tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        BundleError: it cannot be read, or makes prompts that the text encoder does not take.
    """
    m = bundle.manifest
    tokenizer = Tokenizer(bundle.tokenizer_folder(), m.embeddings, m.vocabulary or None)
    positions = int(bundle.graph("text_encoder").outputs[0].shape[1])
    if tokenizer.model_max_length != positions:
        raise BundleError(
            f"the tokenizer of {bundle.folder} makes prompts of {tokenizer.model_max_length} tokens, its text encoder "
            f"reads {positions}: export the bundle anew"
        )
    return tokenizer
