"""Settings drawn and judged on the same prompts and seeds as the exact one, a record for each prompt."""

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..benchmarks.consistency.dataset import Data
from ..benchmarks.consistency.scores import score_systems
from ..benchmarks.consistency.shards import Shard, appending, read_records
from ..benchmarks.consistency.study import counts
from ..benchmarks.image_metrics import psnr
from ..benchmarks.records import Interval
from ..benchmarks.systems import title_of
from ..benchmarks.tuning_records import TrialRecord
from ..conditions import CONDITIONS
from ..files import replace_file
from ..runtime.control.consistency import score
from ..runtime.images.image_files import read_image
from ..runtime.images.png_files import encode_png
from ..runtime.output.metadata import pixels_sha256
from ..runtime.pipeline import Pipeline
from ..runtime.settings.preset import Levers
from ..runtime.settings.request import Control, Request, ResolvedRequest
from ..schema import builtins, to_json
from ..versions import RUNTIME_PACKAGES, installed

# SSIM lies between 0 and 1: the papers count it in hundredths.
_POINTS = {"SSIM": 100.0}
_TOGETHER = 8
_REMEMBERED = 256  # control images, of 0.75 MiB each at 512x512
_SMALL = 128 * 128  # pixels

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Compared:
    """A setting against the exact one on the same prompts.

    Attributes:
        loss: points that it loses, with the paired interval.
        exact, tuned: scores of both, in the metric's own unit.
        psnr: dB between their images, the median; None where all are equal.
    """

    loss: Interval
    exact: float
    tuned: float
    psnr: float | None
    prompts: int


class Trials:
    """Draws what is missing, and compares.

    Args:
        pipeline: that draws and judges; without presets.
        condition: of the control images.
        data: prompts; each has one image, and its index as the seed.
        folder: of the records: `<digest of the setting>/records-1of1.jsonl`.
        exact: what settings are compared with.
        reference: the pipeline that draws the exact setting, of the same size: a few-step model's or an int8 bundle's
            original. None: `pipeline`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        condition: str,
        data: Data,
        folder: Path,
        exact: Levers,
        reference: Pipeline | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.reference = reference or pipeline
        self.condition = condition
        self.exact = exact
        self._data = data
        self._folder = folder
        self._drawn = 0
        # Every setting asks for the same control images, which are extracted from photos as a rule.
        self._asked = lru_cache(_REMEMBERED)(self._request)

    @property
    def drawn(self) -> int:
        """Images that this process drew."""
        return self._drawn

    @cached_property
    def _together(self) -> int:
        """Images that are drawn together: several small ones keep a CPU busier; TensorRT has plans for some numbers."""
        m = self.pipeline.bundle.manifest
        small = self.pipeline.backend.name.startswith(("onnxruntime-cpu", "openvino"))
        return max(1, min(_TOGETHER, _TOGETHER * _SMALL // (m.width * m.height))) if small else 1

    @property
    def exact_bundle(self) -> str:
        """Whose setting the exact one is, as in `miniature, fp32 on onnxruntime-cpu`; empty for the pipeline's own."""
        return "" if self.reference is self.pipeline else title_of(self.reference)

    @cached_property
    def _versions(self) -> dict[str, str]:
        return installed(RUNTIME_PACKAGES)

    def request(self, levers: Levers, index: int) -> ResolvedRequest:
        """The request of a prompt with these levers."""
        return levers.apply(self._asked(index), self.pipeline.defaults)

    def exact_request(self, index: int) -> ResolvedRequest:
        """The request of a prompt that settings are compared with."""
        return self.exact.apply(self._asked(index), self.reference.defaults)

    def _request(self, index: int) -> Request:
        control = Control(self.condition, self._data.control(index, self.condition))
        return Request(self._data.prompt(index), controls=control, seed=index)

    def compare(self, levers: Levers, indices: Sequence[int]) -> Compared:
        """A setting on these prompts; what has no record yet is drawn.

        Raises:
            UserError: earlier records are of other data or of another bundle.
        """
        exact = self._records(None, indices)
        tuned = exact if levers == self.exact and not self.exact_bundle else self._records(levers, indices)
        metric = CONDITIONS[self.condition]
        scores, differences = score_systems(metric.metric, {"tuned": tuned, "exact": exact})
        points = _POINTS.get(metric.metric, 1.0)
        gain = differences[0]
        value, low, high = (points * v for v in (gain["value"], gain["low"], gain["high"]))
        loss = (
            Interval(value=-value, low=-high, high=-low)
            if metric.higher_is_better
            else Interval(value=value, low=low, high=high)
        )
        # Equal images are infinitely close: where most are, the median has no number.
        distances = [float("inf") if r["psnr"] is None else r["psnr"] for r in tuned]
        distance = statistics.median(distances)
        return Compared(
            loss=loss,
            exact=scores["exact"]["value"],
            tuned=scores["tuned"]["value"],
            psnr=distance if np.isfinite(distance) else None,
            prompts=len(indices),
        )

    def _records(self, levers: Levers | None, indices: Sequence[int]) -> list[TrialRecord]:
        """Of a setting, or of the exact one."""
        place = self._exact_folder if levers is None else self._folder / _digest(levers)
        pipeline = self.reference if levers is None else self.pipeline
        header: dict[str, Any] = {
            "condition": self.condition,
            "bundle": pipeline.bundle.digest,
            "backend": pipeline.backend.name,
            "data": self._data.digest,
            "versions": self._versions,
            "levers": builtins(levers or self.exact),
        }
        if pipeline is not self.reference:
            header["exact"] = self.reference.bundle.digest
        found = cast(dict[str, TrialRecord], read_records(place, header, TrialRecord))
        missing = [index for index in indices if self._data.ids[index] not in found]
        if missing:
            with appending(place, Shard(), header) as append:
                for first in range(0, len(missing), self._together):
                    for record in self._draw(levers, missing[first : first + self._together]):
                        append(record)
                        found[record["id"]] = record
        return [found[self._data.ids[index]] for index in indices]

    def _draw(self, levers: Levers | None, indices: Sequence[int]) -> Iterator[TrialRecord]:
        pipeline = self.reference if levers is None else self.pipeline
        requests = [self.exact_request(i) if levers is None else self.request(levers, i) for i in indices]
        results = pipeline.batch(requests, max_images=self._together)
        self._drawn += len(results)
        for index, request, result in zip(indices, requests, results, strict=True):
            yield self._judge(levers, index, request, result.images[0])

    def _judge(self, levers: Levers | None, index: int, request: ResolvedRequest, image: Picture) -> TrialRecord:
        given = request.controls[0].pixels
        extracted = self.pipeline.extract(self.condition, image)
        if levers is None:
            path = self._exact_image(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, encode_png(image))
            distance = None
        else:
            distance = psnr(self._exact(index), image)
        return TrialRecord(
            id=self._data.ids[index],
            seeds=list(request.seeds),
            scores=[score(self.condition, given, extracted).value],
            counts=counts(self.condition, given, [extracted]),  # type: ignore[typeddict-item]
            pixels=[pixels_sha256(image)],
            psnr=distance,
        )

    def _exact(self, index: int) -> Picture:
        """The exact setting's image, drawn again where its file is gone."""
        path = self._exact_image(index)
        if not path.is_file():
            drawn: Picture = self.reference(self.exact_request(index)).images[0]
            return drawn
        return read_image(path).pixels

    @property
    def _exact_folder(self) -> Path:
        return self._folder / f"{'exact-' if self.exact_bundle else ''}{_digest(self.exact)}"

    def _exact_image(self, index: int) -> Path:
        return self._exact_folder / f"{index}.png"


def _digest(levers: Levers) -> str:
    return hashlib.sha256(to_json(levers).encode()).hexdigest()[:16]
