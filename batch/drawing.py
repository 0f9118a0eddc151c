"""One batch: requests of one loop shape drawn together, scored, drawn again where the filter asks for it, and written.

What a batch writes follows from its jobs and the settings alone: not from what ran before, in which process, or how
often it was broken off. Kernels of other batch sizes add in another order, so an image may differ by 1 of 255 between
batches of other sizes; therefore a batch is drawn whole even where some of it is there already.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..bundles.bundle import Bundle
from ..errors import CnppError
from ..messages import one_line
from ..runtime.control.consistency import score
from ..runtime.control.extraction import can_extract
from ..runtime.generate import picture_records
from ..runtime.isolation import isolated
from ..runtime.output import metadata
from ..runtime.output.metadata import PictureRecord, pixels_sha256
from ..runtime.pipeline import Pipeline
from ..runtime.settings.options import RuntimeOptions
from ..runtime.settings.request import Request
from .filters import Filter
from .outputs import ImageOfRecord, Outputs, RequestOfRecord, worst
from .rows import Job, request_of

if TYPE_CHECKING:
    from ..runtime.images.image_files import Pixels
    from ..runtime.result import Result


@dataclass(frozen=True)
class DrawingSettings:
    """How requests are drawn, beside what they say themselves.

    Attributes:
        batch_size: images of one list of launches, 1 to 16.
        keep: which images are good enough.
        tries: seeds that are drawn for one image at most.
        scored: whether images are scored; a filter needs it.
    """

    batch_size: int = 1
    keep: Filter = field(default_factory=Filter)
    tries: int = 1
    scored: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a request: written, or why not.

    Attributes:
        key: of the request.
        error: why it could not be drawn; empty where it was.
        images: how many it has.
        scores: (condition, score) of each image that was kept.
        new: whether it was not there before.
    """

    key: str
    error: str
    images: int
    scores: tuple[tuple[str, float], ...] = ()
    new: bool = False


@dataclass
class _Kept:
    """The image that is kept so far of one of a request's seeds."""

    pixels: "Pixels"
    record: PictureRecord
    seed: int
    scores: dict[str, float]
    tries: int
    passed: bool


class Drawer:
    """Draws batches on a pipeline and writes what they give."""

    def __init__(self, pipeline: Pipeline, outputs: Outputs, settings: DrawingSettings) -> None:
        self._pipeline = pipeline
        self._outputs = outputs
        self._settings = settings

    def draw(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Draws the requests of one batch, and writes the images and records of those that have none.

        A request that fails costs nobody else's image: the batch is halved until it is alone.

        Raises:
            CnppError: a file cannot be written.
            BundleError: the bundle is damaged.
        """
        outcomes: dict[str, Outcome] = {}
        ready: list[tuple[Job, Request]] = []
        for job in jobs:
            try:
                ready.append((job, request_of(job, self._pipeline.extract)))
            except CnppError as e:
                outcomes[job.key] = _failed(job, e)
        for (job, _), found in zip(ready, isolated([request for _, request in ready], self._compute), strict=True):
            if isinstance(found, CnppError):
                outcomes[job.key] = _failed(job, found)
            else:
                outcomes[job.key] = self._write(job, *found)
        return [outcomes[job.key] for job in jobs]

    def _compute(self, requests: Sequence[Request]) -> list[tuple[list[_Kept], "Result"]]:
        """The images of each request, and its first result, which has the control images and notes."""
        first = self._pipeline.batch(requests, max_images=self._settings.batch_size)
        kept = [self._judge(result, 1) for result in first]
        for number in range(2, self._settings.tries + 1):
            missed = [(i, [k for k, one in enumerate(of) if not one.passed]) for i, of in enumerate(kept)]
            missed = [(i, images) for i, images in missed if images]
            if not missed:
                break
            again = [
                replace(
                    requests[i],
                    seed=tuple(further_seed(first[i].request.seeds[k], number) for k in images),
                    num_images_per_prompt=len(images),
                )
                for i, images in missed
            ]
            results = self._pipeline.batch(again, max_images=self._settings.batch_size)
            for (i, images), result in zip(missed, results, strict=True):
                for k, one in zip(images, self._judge(result, number), strict=True):
                    kept[i][k] = self._better(kept[i][k], one)
        return list(zip(kept, first, strict=True))

    def _judge(self, result: "Result", tries: int) -> list[_Kept]:
        records = picture_records(self._pipeline, result)
        kept = []
        for image, record, seed in zip(result.images, records, result.request.seeds, strict=True):
            scores = self._scores(result, image) if self._settings.scored else {}
            kept.append(_Kept(image, record, seed, scores, tries, self._settings.keep.passes(scores)))
        return kept

    def _scores(self, result: "Result", image: "Pixels") -> dict[str, float]:
        found = []
        for control, given in zip(result.request.controls, result.control_images, strict=True):
            if can_extract(self._pipeline.bundle, control.condition):
                one = score(control.condition, given, self._pipeline.extract(control.condition, image))
                found.append((control.condition, one.value, one.higher_is_better))
        return worst(found)

    def _better(self, before: _Kept, after: _Kept) -> _Kept:
        """The better of two images; it counts all the seeds that were drawn."""
        rank = self._settings.keep.rank
        chosen = after if after.passed or rank(after.scores) > rank(before.scores) else before
        return replace(chosen, tries=after.tries)

    def _write(self, job: Job, kept: list[_Kept], result: "Result") -> Outcome:
        scores = tuple(pair for one in kept for pair in sorted(one.scores.items()))
        if self._outputs.read(job.key) is not None:
            return Outcome(job.key, "", len(kept), scores)
        images = []
        for index, one in enumerate(kept):
            content = self._outputs.encode(one.pixels, metadata.pack(one.record))
            file = self._outputs.image(job.key, index)
            self._outputs.write(file, content)
            images.append(
                ImageOfRecord(
                    file=file,
                    size=len(content),
                    pixels_sha256=pixels_sha256(one.pixels),
                    seed=one.seed,
                    scores=one.scores,
                    tries=one.tries,
                    passed=one.passed,
                )
            )
        controls = [
            self._outputs.write_control(control.condition, pixels)
            for control, pixels in zip(result.request.controls, result.control_images, strict=True)
        ]
        self._outputs.write_record(
            RequestOfRecord(
                key=job.key,
                prompt=result.request.prompt,
                images=images,
                controls=controls,
                notes=list(result.notes),
            )
        )
        return Outcome(job.key, "", len(kept), scores, new=True)


def further_seed(seed: int, number: int) -> int:
    """The seed of try `number`, from 2 on, of an image whose first seed is `seed`: 32 bits, the same everywhere."""
    return int.from_bytes(hashlib.sha256(f"cnpp-trt {seed} {number}".encode()).digest()[:4])


class LocalTeam:
    """This process alone.

    Args:
        bundle: that draws.
        options: where and how its graphs run.
    """

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self._bundle = bundle
        self._options = options
        self._pipeline: Pipeline | None = None

    def open(self) -> str:
        """Opens the bundle. Returns the name of the backend."""
        self._pipeline = Pipeline.open(self._bundle, self._options)
        return self._pipeline.backend.name

    def draw(
        self, batches: Iterable[list[Job]], outputs: Outputs, settings: DrawingSettings
    ) -> Iterator[tuple[list[Outcome], float]]:
        """Draws all batches in their order. Yields the outcomes of each and its seconds."""
        assert self._pipeline is not None
        drawer = Drawer(self._pipeline, outputs, settings)
        for jobs in batches:
            start = time.perf_counter()
            outcomes = drawer.draw(jobs)
            yield outcomes, time.perf_counter() - start

    def close(self) -> None:
        """Closes the pipeline."""
        if self._pipeline is not None:
            self._pipeline.close()


def _failed(job: Job, error: CnppError) -> Outcome:
    return Outcome(job.key, one_line(error), job.images)
