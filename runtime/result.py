"""What a request gives: images, and how they were made."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UserError
from .images.image_files import Pixels
from .settings.request import ResolvedRequest

if TYPE_CHECKING:
    from .generate import GenerateResult
    from .pipeline import Pipeline
    from .preparing import Ran


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The images of a request.

    Attributes:
        images: uint8 [B,H,W,3].
        latents: float32 [B,4,h,w], what the decoder was given (not divided by the scaling factor).
        request: as it was run: with every setting and seed.
        timings: seconds by stage, `total` included; of a batch, those of all requests that ran together. Where the
            steps were recorded, `denoise` stands for their stages; where the whole loop was, `loop`.
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


def results_of(pipeline: "Pipeline", ran: "Ran") -> list[Result]:
    """What a program has made for each of its requests."""
    ready, backend = ran.ready, pipeline.backend
    images, latents = backend.download(ready.program.workspace.image), backend.download(ready.program.workspace.latents)
    timings = ran.timings()
    results, first = [], 0
    for plan, controls, notes in zip(ready.plans, ready.host_control_images(backend), ready.notes, strict=True):
        own = slice(first, first + plan.shape.images)
        first = own.stop
        # Copies, so that a result keeps its own images alive and not those of the whole batch.
        parts = (images, latents) if len(ready.plans) == 1 else (images[own].copy(), latents[own].copy())
        results.append(Result(*parts, plan.request, dict(timings), controls, (*notes, *ran.remarks), pipeline))
    return results
