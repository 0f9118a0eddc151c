"""From the records of a study to its scores: one number a system and condition, with its interval, and differences.

Over the data set, as the ControlNet++ paper has it:
- mIoU is that of all images' pixels together (mmsegmentation's `IoUMetric`);
- F1 is that of the pixels of a prompt's images together, averaged over prompts (`eval/eval_edge.py`);
- SSIM and RMSE are averaged over images.

Intervals are percentile bootstraps over prompts: the images of a prompt are resampled together, and a pooled metric is
computed anew from pooled counts. Two systems have the same prompts in every resample, so that differences are paired.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...conditions import CONDITIONS
from ...runtime.control.consistency import f1_of_counts, mean_iou_of_counts
from ...runtime.control.palette import CLASSES
from ..records import ConditionScores, Consistency, Interval, PairedDifference
from ..statistics import percentile_interval, resampling_weights
from .study import Study, read_pictures, read_sheets

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .quality import ClipScore, Fid  # they import PyTorch

Record = Mapping[str, Any]


def summarize(study: Study) -> Consistency:
    """Of every record there is, whichever process made it; says which are still missing."""
    conditions = [scores for c in study.conditions if (scores := _condition(study, c))]
    return Consistency(
        model=study.deployed.bundle.manifest.model,
        data=study.data.title,
        images_per_prompt=study.sampling.images,
        systems={system.name: system.title for system in study.systems},
        conditions=conditions,
        sheets=read_sheets(study),
        quality={},
    )


def measure_quality(study: Study, fid: "Fid | None", clip_score: "ClipScore | None") -> dict[str, dict[str, float]]:
    """FID and CLIP score of each system and condition, from the pictures that were kept, once all of them are there.

    FID is the mean over groups, of which each holds one image of every prompt, as in the paper.
    """
    found: dict[str, dict[str, float]] = {}
    for system, condition in study.parts():
        if fid is None and clip_score is None:
            continue
        if study.pending(system, condition):
            logger.info(f"{system.name}, {condition}: FID and CLIP score wait for the missing prompts")
            continue
        of_system = found.setdefault(system.name, {})
        if fid is not None:
            of_system[f"FID, {condition}"] = fid(
                (images[0] for _, images in read_pictures(study, system, condition, slice(i, i + 1)))
                for i in range(study.sampling.images)
            )
        if clip_score is not None:
            of_system[f"CLIP score, {condition}"] = clip_score(
                (images, study.data.prompt(index)) for index, images in read_pictures(study, system, condition)
            )
    return found


def _condition(study: Study, condition: str) -> ConditionScores | None:
    """None where no image was generated yet. Systems are compared on the prompts that all of them have images of."""
    found = {s.name: study.records(s, condition) for s in study.systems if condition in s.conditions}
    total = len(study.data.ids)
    for name, of_system in found.items():
        if len(of_system) < total:
            logger.info(f"{name}, {condition}: {total - len(of_system)} of {total} prompts are still missing")
    found = {name: of_system for name, of_system in found.items() if of_system}
    common = [id_ for id_ in study.data.ids if found and all(id_ in of_system for of_system in found.values())]
    if not common:
        return None
    systems = {name: [of_system[id_] for id_ in common] for name, of_system in found.items()}
    scores, differences = score_systems(CONDITIONS[condition].metric, systems)
    return ConditionScores(
        condition=condition,
        metric=CONDITIONS[condition].metric,
        higher_is_better=CONDITIONS[condition].higher_is_better,
        prompts=len(common),
        images=len(common) * study.sampling.images,
        scores=scores,
        differences=differences,
    )


def score_systems(
    metric: str, systems: Mapping[str, Sequence[Record]]
) -> tuple[dict[str, Interval], list[PairedDifference]]:
    """Every system's score, and the first system minus each other. Records are of the same prompts, in one order."""
    weights = _weights(len(next(iter(systems.values()))))
    values = {name: scores(metric, found, weights) for name, found in systems.items()}
    first = next(iter(values))
    intervals = {name: _interval(found) for name, found in values.items()}
    differences = [
        PairedDifference(of=first, minus=name, **_interval(values[first] - found))
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

    Returns:
        Float64 [R].
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
    return np.concatenate([np.ones((1, prompts)), resampling_weights(prompts)], dtype=np.float64)


def _interval(values: NDArray[np.float64]) -> Interval:
    """Of `values` [1 + resamples], the first of all prompts."""
    low, high = percentile_interval(values[1:])
    return Interval(value=float(values[0]), low=low, high=high)
