"""What a stage is told, and what it finds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...bundles.bundle import Bundle
from ...errors import CnppError
from ...runtime.pipeline import Pipeline
from ...runtime.settings.request import ResolvedRequest
from ..requests import make_requests

Verdict = Literal["ok", "degraded", "refused", "failed", "skipped", "timed out"]
WORKS: tuple[Verdict, ...] = ("ok", "degraded")
"""With these a stage that needs it is run."""


@dataclass(frozen=True)
class Setup:
    """What every stage is told.

    Attributes:
        work: a folder for the bundle, the plans and what stages leave for each other.
        bundle: an fp16 bundle; None takes what the stage `bundle` puts into `work`.
        condition: that is drawn.
        device: the index of the GPU.
        full: whether stages take their time.
    """

    work: Path
    bundle: Path | None = None
    condition: str = "seg"
    device: int = 0
    full: bool = False

    @property
    def plans(self) -> Path:
        """The plan store's folder."""
        return self.work / "plans"

    def open_bundle(self) -> Bundle:
        """The bundle, fp16."""
        return Bundle.open(self.bundle or self.work / "bundle")

    def pipeline(self, backend: str = "tensorrt", **options: Any) -> Pipeline:
        """The bundle on a backend of this GPU."""
        return Pipeline.open(self.open_bundle(), backend, plans=self.plans, device=self.device, **options)

    def request(self, pipeline: Pipeline, index: int = 0, **fields: Any) -> ResolvedRequest:
        """A request of the condition, with its own prompt, control image and seed."""
        return next(make_requests(pipeline, self.condition, [index], **fields))


@dataclass
class Finding:
    """What a stage found.

    Attributes:
        verdict: `ok`; `degraded` where something works in a lesser way; the other ones are made by what it raises.
        words: why it is not `ok`, or what is worth knowing, in one line.
        numbers: what was measured, by name with its unit.
    """

    verdict: Verdict = "ok"
    words: str = ""
    numbers: dict[str, float | str] = field(default_factory=dict)

    def degrade(self, words: str) -> None:
        """Something works in a lesser way."""
        self.verdict = "degraded"
        self.words = f"{self.words}; {words}" if self.words else words


class WrongResult(CnppError):
    """Something ran and gave a wrong result."""
