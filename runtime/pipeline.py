"""bundle + request → images, without PyTorch."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from ..bundles.bundle import Bundle
from ..bundles.defaults import SamplingDefaults
from ..errors import BackendError, Cancelled, UserError
from .backends.cuda import Cuda
from .backends.interface import Backend
from .backends.registry import open_backend
from .control.consistency import Score, graded_score
from .control.extraction import extract
from .finiteness import check_finite
from .images.image_files import WHITE, ImageLike, Pixels, to_pixels
from .init_image import ENCODER, encoder_bytes
from .loop import graphs_of, run
from .planning import Plan, launch_lists, open_tokenizer, plan_request, smallest_request
from .preparing import Preparation, Prepared, Ran, fit_control
from .profiling import profiled
from .result import Result, results_of
from .settings.options import OptionFields, RuntimeOptions
from .settings.preset import Preset, by_condition, resolve
from .settings.request import (
    MAX_IMAGES,
    Control,
    ControlImage,
    Request,
    ResolvedRequest,
    to_request,
    whole_number,
)
from .submission import Submission, Submissions
from .watching import OnProgress, OnStepEnd, Watcher
from .workspace import buffer_bytes

if TYPE_CHECKING:
    from .device_result import DeviceResult

T = TypeVar("T")


class Pipeline:
    """Runs requests on a bundle. Safe to call from several threads: requests run one after the other.

    As a context manager it is closed at the end.

    Attributes:
        reason: why this backend was chosen.
        presets: by the condition that they are for.
    """

    def __init__(self, bundle: Bundle, backend: Backend, reason: str = "", presets: Sequence[Preset] = ()) -> None:
        self.presets = by_condition(presets, bundle)
        self.bundle = bundle
        self.backend = backend
        self.reason = reason
        self.defaults = SamplingDefaults.of(bundle.manifest)
        self._tokenizer = open_tokenizer(bundle)
        self._preparation = Preparation(bundle, backend)
        self._lock = threading.RLock()  # a callback may extract while its own thread generates
        self._submissions = Submissions()
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
            warm: runs once, so that later requests of that shape (sizes, steps, guidance, conditions) load nothing:
                a request, or True for the model's first condition and defaults.
            **fields: of `RuntimeOptions`, over those of `options`.

        Raises:
            UserError: an option cannot be used.
            BundleError: the bundle is missing or damaged.
            BackendError: the backend does not work here.
        """
        base = RuntimeOptions(options) if isinstance(options, str) else options or RuntimeOptions()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        chosen = replace(base, **fields)
        by_condition(chosen.presets, opened)  # before a backend is opened, which takes longer
        pipeline = cls(opened, *open_backend(opened, chosen), chosen.presets)
        if warm:
            pipeline._warm_up(warm if isinstance(warm, Request) else smallest_request(opened))
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
            callback_on_step_end: gets the step k, its timestep and a copy of the latents [B,4,h,w] after it. On a GPU
                the next step runs meanwhile.
            on_progress: gets the number of steps that have ended and how many there are, after each one. It costs
                nothing but its own time. Not called where the whole loop is one CUDA graph.
            cancel: once another thread has set it, the request ends with `Cancelled` after its current step, on a GPU
                after one more; where the whole loop is one CUDA graph, after that. A callback cancels by raising
                `Cancelled`.
            **fields: of `Request`, for a prompt.

        Raises:
            UserError: the request asks for what this bundle does not have.
            Cancelled: it was cancelled.
            BackendError: a graph failed.
            DeviceMemoryError: it does not fit into device memory although everything that can be unloaded was.
        """
        plan = self._plan(self.resolve(to_request(request, controls, fields)))
        [result] = self._locked(lambda: self._generate([plan], callback_on_step_end, on_progress, cancel))
        return result

    def batch(
        self,
        requests: Sequence[Request],
        *,
        max_images: int = MAX_IMAGES,
        callback_on_step_end: OnStepEnd | None = None,
        on_progress: OnProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Result]:
        """Generates the images of several requests, together where their loop shape agrees.

        Requests run in one launch list where they have the same scheduler, number of steps, strength, use of guidance,
        conditions with their steps, and number of prompt chunks. Prompts, control images, seeds, guidance scales and
        conditioning scales may differ. Each result is the one that its request gives alone, but for rounding: kernels
        of other batch sizes add in another order.

        Args:
            requests: any number.
            max_images: of one launch list, 1 to 16. The backend `tensorrt` needs a plan for each number that occurs.
            callback_on_step_end: as in `__call__`; it gets the latents of all images of a launch list, those of the
                first request first.
            on_progress: gets the number of steps that were launched and how many there are for all requests.
            cancel: as in `__call__`.

        Returns:
            A result for each request, in their order.

        Raises:
            UserError, Cancelled, BackendError, DeviceMemoryError: as in `__call__`. All requests are checked before the
                first one runs.
        """
        max_images = whole_number("max_images", max_images, 1, MAX_IMAGES)
        plans = [self._plan(self.resolve(request)) for request in requests]
        launches = launch_lists(plans, max_images)
        total = sum(plans[indices[0]].schedule.steps for indices in launches)
        results: dict[int, Result] = {}
        done = 0
        for indices in launches:
            group = [plans[i] for i in indices]
            progress = None if on_progress is None else partial(_advance, on_progress, done, total)
            found = self._locked(partial(self._generate, group, callback_on_step_end, progress, cancel))
            results |= dict(zip(indices, found, strict=True))
            done += group[0].schedule.steps
        return [results[i] for i in range(len(plans))]

    def on_device(self, request: Request, *, cancel: threading.Event | None = None) -> "DeviceResult":
        """Generates the images of a request and leaves them in the GPU's memory, in memory of their own.

        Args:
            request: as in `__call__`.
            cancel: as in `__call__`.

        Raises:
            UserError: the pipeline runs on the CPU; also as `__call__`.
            Cancelled, BackendError, DeviceMemoryError: as in `__call__`.
        """
        from .device_result import DeviceResult

        backend = self.backend
        if not isinstance(backend, Cuda):
            raise UserError(f"{backend.name} runs on the CPU: call the pipeline for images on the host")
        plan = self._plan(self.resolve(request))
        return self._locked(lambda: DeviceResult.of(backend, self._run([plan], None, None, cancel)))

    def submit(self, request: Request) -> Submission[Result]:
        """Generates the images of a request in a thread of the pipeline's own, after those submitted before.

        Returns:
            A `concurrent.futures.Future`. Its `cancel` ends a request that runs after the current step.
        """
        self._require_open()
        return self._submissions.submit(lambda stop: self(request, cancel=stop))

    def submit_on_device(self, request: Request) -> "Submission[DeviceResult]":
        """As `submit`, what `on_device` gives."""
        self._require_open()
        return self._submissions.submit(lambda stop: self.on_device(request, cancel=stop))

    def resolve(self, request: Request) -> ResolvedRequest:
        """The request with every setting decided, as `__call__` runs it: a preset or the model decides the rest.

        Raises:
            UserError: it is no request.
        """
        if not isinstance(request, Request):
            raise UserError(f"give a Request, or a prompt and its controls, not {type(request).__name__}")
        return resolve(request, self.presets, self.defaults)

    def prepare(self, request: Request) -> Prepared:
        """Everything before the first step: the program is built, filled, and prompt and conditions are encoded.

        Not locked against other threads: for measuring and for stepping through a program by hand.
        """
        return self._preparation.prepare([self._plan(self.resolve(request))])

    def memory_needed(self, request: Request) -> dict[str, int]:
        """Bytes of device memory that a request would take beyond what is held, by part, before anything is loaded.

        Empty on a CPU. A request that does not fit raises DeviceMemoryError and loads nothing.
        """
        plan = self._plan(self.resolve(request))
        graphs, nbytes = graphs_of(plan.shape, self.bundle), buffer_bytes(self.bundle, plan.shape, plan.schedule)
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
        pixels = to_pixels(image, "the photo", background=WHITE)
        graph = f"extractor_{condition}"
        with self._lock:
            self._require_open()
            return self._preparation.programs.retry_with_eviction(
                [graph], lambda: extract(self.bundle, self.backend, condition, pixels)
            )

    def score(self, condition: str, control_image: ControlImage, image: ImageLike) -> Score:
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
        given = fit_control(self.bundle, Control(condition, control_image))[0]
        return graded_score(self.bundle, condition, given, extracted)

    def forget_encodings(self) -> None:
        """Forgets the prompts and control images that it keeps encoded: for measuring."""
        self._preparation.forget_encodings()

    def close(self) -> None:
        """Frees programs, recordings, engines and buffers. A closed pipeline runs nothing; what was submitted fails."""
        self._submissions.close()
        with self._lock:
            self._closed = True
            self._preparation.programs.clear()
            self._preparation.forget_encodings()
            for graph in self.bundle.manifest.graphs:
                self.backend.release(graph)

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def precision(self) -> str:
        """What the large networks compute in, as `--precision` takes it, as in `fp32`, `bf16` or `int8-bf16`."""
        m = self.bundle.manifest
        bf16 = "bf16" if m.quantization is None else f"{m.number_format}-bf16"
        return bf16 if self.backend.name.endswith("-bf16") else m.number_format

    def __repr__(self) -> str:
        m = self.bundle.manifest
        return f"<Pipeline: {m.model}, {m.number_format}, {m.width}x{m.height}, on {self.backend.name}>"

    def _locked(self, work: Callable[[], T]) -> T:
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

    def _generate(
        self,
        plans: Sequence[Plan],
        on_step_end: OnStepEnd | None,
        on_progress: OnProgress | None,
        cancel: threading.Event | None,
    ) -> list[Result]:
        return results_of(self, self._run(plans, on_step_end, on_progress, cancel))

    def _run(
        self,
        plans: Sequence[Plan],
        on_step_end: OnStepEnd | None,
        on_progress: OnProgress | None,
        cancel: threading.Event | None,
    ) -> Ran:
        """Everything up to the images in the program's buffers, which are checked to be finite."""
        start = time.perf_counter()
        if cancel is not None and cancel.is_set():
            raise Cancelled
        with profiled("prepare"):
            ready = self._preparation.prepare(plans)
        program, recordings, clock = ready.program, ready.recordings, ready.clock
        programs = self._preparation.programs
        if recordings.rung != "off":
            programs.record(recordings)
            clock.mark("record")
        watcher = Watcher(program, self.backend, clock, ready.tensors.table.timesteps, on_step_end, on_progress, cancel)
        loop = recordings.loop()
        if loop is not None and on_step_end is None:
            with profiled("loop"):
                loop()
            clock.mark("loop")
            watcher.require_not_cancelled()
        else:
            for k in range(program.schedule.steps):
                with profiled(f"step {k + 1}"):
                    run(recordings.step(k), clock)
                watcher.launched(k)
            run(recordings.decode(), clock)
            watcher.finish()
        try:
            remarks = programs.retry_with_eviction(  # it may load another decoder
                [program.shape, *graphs_of(program.shape, self.bundle)],
                lambda: check_finite(program, ready.tensors, self.backend, self.bundle),
            )
        except BackendError:
            self._preparation.forget_encodings()  # one of these may hold what is not finite
            raise
        recordings.ran()
        return Ran(ready, (*remarks, *([recordings.note] if recordings.note else [])), start)

    def _warm_up(self, request: Request) -> None:
        """Runs a request, and records what it launched."""
        self(request)
        with self._lock:
            ready = self.prepare(request)
            self._preparation.programs.record(ready.recordings)

    def _plan(self, request: ResolvedRequest) -> Plan:
        for control in request.controls:
            self._preparation.require_readable(control)
        return plan_request(self.bundle, self._tokenizer, request)


def _advance(on_progress: OnProgress, before: int, total: int, done: int, _: int) -> None:
    """Of a launch list that has `done` steps behind it, `before` of them in earlier lists."""
    on_progress(before + done, total)
