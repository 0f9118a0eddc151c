"""The requests that ranges and effects are measured with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.consistency.dataset import Folder
from ..benchmarks.requests import control
from ..miniature import EMBEDDED
from ..runtime.pipeline import Pipeline
from ..runtime.settings.request import Control, Request, ResolvedRequest

# Scenes far from those that `consistency` and `parity` draw: nothing is tuned on what is reported.
_FIRST = 100_000


class CalibrationData:
    """Prompts with control images: a user's folder, scenes for an embedded model, random blocks for any other.

    Args:
        pipeline: whose requests they are.
        folder: of the user's own, as `cnpp-trt consistency --data` takes it; None for the others.
        conditions: of the requests.
        steps: of each request; None for the model's own number.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(
        self, pipeline: Pipeline, folder: Path | None, conditions: Sequence[str], steps: int | None = None
    ) -> None:
        self._fields: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        self._pipeline = pipeline
        self._folder = None if folder is None else Folder(folder, pipeline, conditions)
        self.meaningful = folder is not None or pipeline.bundle.manifest.model in EMBEDDED
        kind = "scenes" if self.meaningful else "random blocks"
        self.title = self._folder.title if self._folder else f"{kind} from number {_FIRST}"

    def requests(self, condition: str, count: int, skip: int = 0) -> Iterator[ResolvedRequest]:
        """The first `count` requests of a condition after `skip`; a folder's begin anew where it has no more."""
        for i in range(skip, skip + count):
            if self._folder is None:
                image, prompt = control(self._pipeline, condition, _FIRST + i)
            else:
                k = i % len(self._folder.ids)
                image, prompt = self._folder.control(k, condition), self._folder.prompt(k)
            controls = (Control(condition, image),)
            yield self._pipeline.resolve(Request(prompt, controls=controls, seed=_FIRST + i, **self._fields))
