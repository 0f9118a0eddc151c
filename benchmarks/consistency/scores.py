"""From the records of a study to its scores: one number a side and condition, with its interval, and differences.

Over the data set, as the ControlNet++ paper has it:
- mIoU is that of all images' pixels together (mmsegmentation's `IoUMetric`);
- F1 is that of the pixels of a prompt's images together, averaged over prompts (`eval/eval_edge.py`);
- SSIM and RMSE are averaged over images.

Intervals are percentile bootstraps over prompts: the images of a prompt are resampled together, and a pooled metric is
computed anew from pooled counts. Two sides have the same prompts in every resample, so that differences are paired.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...conditions import CONDITIONS
from ...runtime.control.consistency import f1_of_counts, mean_iou_of_counts
from ...runtime.control.palette import CLASSES
from ..records import ConditionScores, Consistency, Difference, Interval
from ..statistics import percentile_interval, resampling_weights
from .study import Report, Study, read_pictures, read_sheets

if TYPE_CHECKING:
    from .quality import ClipScore, Fid  # they import PyTorch

Record = Mapping[str, Any]


def summarize(study: Study, report: Report = lambda line: None) -> Consistency:
    """Of every record there is, whichever process made it; says which are still missing."""
    conditions = [scores for c in study.conditions if (scores := _condition(study, c, report))]
    return Consistency(
        model=study.deployed.bundle.manifest.model,
        data=study.data.title,
        images_per_prompt=study.protocol.images,
        sides={side.name: side.title for side in study.sides},
        conditions=conditions,
        sheets=read_sheets(study),
        quality={},
    )


def measure_quality(
    study: Study, fid: "Fid | None", clip_score: "ClipScore | None", report: Report = lambda line: None
) -> dict[str, dict[str, float]]:
    """FID and CLIP score of each side and condition, from the pictures that were kept, once all of them are there.

    FID is the mean over groups, of which each holds one image of every prompt, as in the paper.
    """
    found: dict[str, dict[str, float]] = {}
    for side, condition in study.parts():
        if fid is None and clip_score is None:
            continue
        if study.pending(side, condition):
            report(f"{side.name}, {condition}: FID and CLIP score wait for the missing prompts")
            continue
        of_side = found.setdefault(side.name, {})
        if fid is not None:
            of_side[f"FID, {condition}"] = fid(
                (images[0] for _, images in read_pictures(study, side, condition, slice(i, i + 1)))
                for i in range(study.protocol.images)
            )
        if clip_score is not None:
            of_side[f"CLIP score, {condition}"] = clip_score(
                (images, study.data.prompt(index)) for index, images in read_pictures(study, side, condition)
            )
    return found


def _condition(study: Study, condition: str, report: Report) -> ConditionScores | None:
    """None where nothing was drawn yet. Sides are compared on the prompts that all of them have drawn."""
    found = {s.name: study.records(s, condition) for s in study.sides if condition in s.conditions}
    total = len(study.data.ids)
    for name, of_side in found.items():
        if len(of_side) < total:
            report(f"{name}, {condition}: {total - len(of_side)} of {total} prompts are still missing")
    found = {name: of_side for name, of_side in found.items() if of_side}
    common = [id_ for id_ in study.data.ids if found and all(id_ in of_side for of_side in found.values())]
    if not common:
        return None
    sides = {name: [of_side[id_] for id_ in common] for name, of_side in found.items()}
    scores, differences = compare(CONDITIONS[condition].metric, sides)
    return ConditionScores(
        condition=condition,
        metric=CONDITIONS[condition].metric,
        higher_is_better=CONDITIONS[condition].higher_is_better,
        prompts=len(common),
        images=len(common) * study.protocol.images,
        scores=scores,
        differences=differences,
    )


def compare(metric: str, sides: Mapping[str, Sequence[Record]]) -> tuple[dict[str, Interval], list[Difference]]:
    """Every side's score, and the first side minus each other. Records are of the same prompts, in one order."""
    weights = _weights(len(next(iter(sides.values()))))
    values = {name: scores(metric, found, weights) for name, found in sides.items()}
    first = next(iter(values))
    intervals = {name: _interval(found) for name, found in values.items()}
    differences = [
        Difference(of=first, minus=name, **_interval(values[first] - found))
        for name, found in values.items()
        if name != first
    ]
    return intervals, differences


def scores(metric: str, found: Sequence[Record], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The metric over a data set, once for each row of weights.

    Args:
        metric: `mIoU`, `F1`, `SSIM` or `RMSE`.
        found: records of P prompts, with as many images each.
        weights: [R, P], how often each prompt counts.
    Returns: float64 [R].
    """
    if metric == "mIoU":
        pooled = weights @ _class_counts(found)
        return mean_iou_of_counts(pooled[:, :CLASSES], pooled[:, CLASSES:])
    if metric == "F1":
        of_prompts = [f1_of_counts(r["counts"]["hits"][0], r["counts"]["marked"][0]) for r in found]
    else:
        of_prompts = [float(np.mean(r["scores"])) for r in found]
    averaged: NDArray[np.float64] = weights @ np.array(of_prompts) / weights.sum(1)
    return averaged


def _class_counts(found: Sequence[Record]) -> NDArray[np.float64]:
    """[P, 2 * CLASSES]: intersections, then unions. Sums of pixels are exact in float64, whose products are fast."""
    dense = np.zeros((len(found), 2, CLASSES))
    for row, record in zip(dense, found, strict=True):
        row[:, record["counts"]["classes"]] = record["counts"]["intersection"], record["counts"]["union"]
    return dense.reshape(len(found), 2 * CLASSES)


@lru_cache(maxsize=1)
def _weights(prompts: int) -> NDArray[np.float64]:
    """[1 + resamples, prompts]: every prompt once, then the resamples."""
    return np.concatenate([np.ones((1, prompts)), resampling_weights(prompts)])


def _interval(values: NDArray[np.float64]) -> Interval:
    """Of `values` [1 + resamples], the first of all prompts."""
    low, high = percentile_interval(values[1:])
    return Interval(value=float(values[0]), low=low, high=high)
