"""What results hold, by kind. Seconds, bytes, and fractions of 1 throughout, unless said otherwise.

The annotations are the schema that files are read by (`result.read_result`): types, ranges and sizes.
"""

import sys
from typing import Annotated, Literal, NotRequired, TypedDict

from ..schema import Meta
from .statistics import Ratio, Seconds, Summary

# Stands for a difference that is not finite: JSON has no such number.
NOT_FINITE = sys.float_info.max

Text = Annotated[str, Meta(max_length=2_000)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Pixels = Annotated[int, Meta(ge=1, le=2**16)]
Levels = Annotated[int, Meta(ge=0, le=255)]
Guidance = Annotated[float, Meta(ge=-1e6, le=1e6)]
Rate = Annotated[float, Meta(ge=0, le=1e30)]
Error = Annotated[float, Meta(ge=0)]
Score = Annotated[float, Meta(ge=-1e9, le=1e9)]
Png = Annotated[str, Meta(max_length=8 << 20)]

# ---- bench


class CompetitorResult(TypedDict):
    """`reason` says why one that is not `available` could not run here, and is empty else."""

    name: Text
    title: Text
    precision: Text
    available: bool
    reason: Text


class Case(TypedDict):
    """One request's sizes. `base` marks the one that every contender takes part in; the others vary one thing of it."""

    width: Pixels
    height: Pixels
    images: Count
    steps: Count
    scheduler: Text
    guidance_scale: Guidance
    base: bool


class Timed(TypedDict):
    """Seconds of one contender in one case.

    stages: by stage, warm, each launched by itself; `host` is what no stage accounts for.
    ratio: how many times faster than the baseline, in the same rounds; absent for the baseline.
    max_difference, psnr: of its first image against the baseline's on the same request: levels of 255, and dB (None
        where they are equal).
    """

    whole: Summary
    stages: dict[Text, Summary]
    ratio: NotRequired[Ratio]
    max_difference: NotRequired[Levels]
    psnr: NotRequired[Score | None]


class TimedCase(TypedDict):
    """A case with the times of each competitor, by its name."""

    case: Case
    runs: dict[Text, Timed]


class Cold(TypedDict):
    """Whole processes, from their start to the first image. Bytes at the peak; device_bytes is None on a CPU."""

    seconds: Summary
    host_bytes: Count
    device_bytes: Count | None


class OpCount(TypedDict):
    """What one launch of a stage computes and moves at least.

    Floating-point operations (a multiply-add is two), and bytes: its weights once, its inputs and its outputs.
    """

    flop: Rate
    bytes: Rate


def roofline_seconds(ops: OpCount, flop_per_second: float, bytes_per_second: float) -> float:
    """The least that a launch can take: the longer of computing and moving (Williams et al., Roofline, CACM 2009)."""
    return max(ops["flop"] / flop_per_second, ops["bytes"] / bytes_per_second)


class Roofline(TypedDict):
    """What this machine can do, measured, and what the stages ask of it in the base case.

    flop_per_second: by precision (`fp32`, `bf16`, `fp16`, `int8`); bytes_per_second: read and written.
    op_counts: by stage; launches: how often the stage is launched for one request.
    """

    flop_per_second: dict[Text, Rate]
    bytes_per_second: Rate
    op_counts: dict[Text, OpCount]
    launches: dict[Text, Count]


class Bench(TypedDict):
    """A latency benchmark. The first contender is the baseline.

    `threads` is None on a GPU; `roofline` is None where it could not be measured, for `roofline_reason`.
    """

    model: Text
    condition: Text
    device: Literal["cpu", "gpu"]
    threads: Count | None
    contenders: list[CompetitorResult]
    cases: list[TimedCase]
    cold: dict[Text, Cold]
    roofline: Roofline | None
    roofline_reason: Text


# ---- waterfall


class OptimizationResult(TypedDict):
    """One bar: everything of the bars before, and this. Seconds of a whole denoising loop and decoding.

    difference: relative L2 of the final latents against the first bar's.
    reason: why it was not measured here; empty where it was.
    """

    name: Text
    title: Text
    seconds: NotRequired[Summary]
    ratio: NotRequired[Ratio]
    difference: NotRequired[Error]
    reason: Text


class Waterfall(TypedDict):
    """`ratio` of an optimization is how many times faster than the first one."""

    model: Text
    condition: Text
    case: Case
    optimizations: list[OptimizationResult]


# ---- sweep


class SweepRow(TypedDict):
    """TensorRT's plans with certain builder settings. Seconds of a whole request.

    build_seconds: of the plans that were not in the store yet.
    ratio: how many times faster than the default settings, round by round.
    difference: the largest of a pixel to the default settings' image, in levels of 255.
    reason: why it was not measured; empty where it was.
    """

    name: Text
    title: Text
    build_seconds: NotRequired[Error]
    seconds: NotRequired[Summary]
    ratio: NotRequired[Ratio]
    difference: NotRequired[Levels]
    reason: Text


class Sweep(TypedDict):
    """TensorRT's builder settings, one changed at a time. The first row has the default ones."""

    model: Text
    condition: Text
    case: Case
    rows: list[SweepRow]


# ---- parity


class GraphParity(TypedDict):
    """One graph on the inputs recorded from the reference's run, over all its launches and outputs.

    worst: the launch and tensor with the largest relative L2, as in `unet step 3: noise_pred`.
    """

    graph: Text
    launches: Count
    max_abs: Error
    relative_l2: Error
    cosine: Score
    worst: Text


class StepParity(TypedDict):
    """Relative L2 of the latents after each step against the reference's.

    free: the deployed loop by itself: error and what became of it.
    forced: each step started from the reference's own state: its error alone.
    """

    condition: Text
    free: list[Error]
    forced: list[Error]


class ImageParity(TypedDict):
    """Images of one condition against the reference's. One value an image; psnr is None where two are equal.

    lpips: None where it cannot be computed, for the reason in `Parity.unavailable`.
    """

    condition: Text
    max_difference: list[Levels]
    psnr: list[Score | None]
    ssim: list[Score]
    lpips: list[Error] | None


class Heatmap(TypedDict):
    """PNGs in base64, of one size; `difference` shows the largest channel's, `scale` levels of 255 as white."""

    condition: Text
    seed: Count
    reference: Png
    deployed: Png
    difference: Png
    scale: Levels


class Parity(TypedDict):
    """The deployed side against PyTorch in fp32; `half` is PyTorch's own fp16 against it, on the same requests.

    missed: the thresholds that were not met, one line each; `passed` is whether there are none.
    unavailable: what was not computed, and why.
    """

    model: Text
    backend: Text
    precision: Text
    reference: Text
    graphs: list[GraphParity]
    steps: list[StepParity]
    images: list[ImageParity]
    half: list[ImageParity]
    heatmaps: list[Heatmap]
    thresholds: dict[Text, Score]
    missed: list[Text]
    passed: bool
    unavailable: dict[Text, Text]


# ---- consistency


class Counts(TypedDict):
    """As `consistency.counts` has them: of label classes, or of edge pixels, or nothing."""

    classes: NotRequired[list[Annotated[int, Meta(ge=0, lt=150)]]]
    intersection: NotRequired[list[Count]]
    union: NotRequired[list[Count]]
    hits: NotRequired[list[Count]]
    marked: NotRequired[list[Count]]


class PromptRecord(TypedDict):
    """What one prompt leaves in a study's folder, of one side and condition; one value an image.

    counts: what of them is pooled.
    pixels: SHA-256 of each image, hexadecimal.
    """

    id: Annotated[str, Meta(max_length=200)]
    seeds: list[Annotated[int, Meta(ge=0)]]
    scores: Annotated[list[Score], Meta(min_length=1, max_length=16)]
    counts: Counts
    pixels: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=16)]


class Interval(TypedDict):
    """A value with its 95 % bootstrap interval over prompts."""

    value: Score
    low: Score
    high: Score


class PairedDifference(TypedDict):
    """Paired: both sides had the same prompts, seeds and conditions. `value` is `of` minus `minus`."""

    of: Text
    minus: Text
    value: Score
    low: Score
    high: Score


class ConditionScores(TypedDict):
    """scores: by side. differences: of the first side against each of the others."""

    condition: Text
    metric: Text
    higher_is_better: bool
    prompts: Count
    images: Count
    scores: dict[Text, Interval]
    differences: list[PairedDifference]


class Sheet(TypedDict):
    """The three rows of one prompt: given, generated, re-extracted. `png` is base64."""

    condition: Text
    png: Png


class Consistency(TypedDict):
    """systems: titles by name, the deployed one first. quality: FID and CLIP scores by system and name, if asked."""

    model: Text
    data: Text
    images_per_prompt: Count
    systems: dict[Text, Text]
    conditions: list[ConditionScores]
    sheets: list[Sheet]
    quality: dict[Text, dict[Text, Score]]


# ---- full size


class PlanRow(TypedDict):
    """A plan: what building it took, and what was fused in it."""

    graph: Text
    seconds: Seconds
    bytes: Count
    kernels: Count
    attentions: Count
    attentions_fused: Count
    norms: Count
    norms_fused: Count


class Plans(TypedDict):
    """Building every plan anew; `seconds` and `peak_bytes` are the whole command's."""

    model: Text
    flavor: Text
    width: Pixels
    height: Pixels
    plans: list[PlanRow]
    seconds: Seconds
    peak_bytes: Count


class StageRow(TypedDict):
    """A command, as a process of its own."""

    stage: Text
    seconds: Seconds
    peak_bytes: Count


class PictureRow(TypedDict):
    """A picture of one condition and diffusers' of the same; `differing` is the share of values that differ at all."""

    condition: Text
    seconds: Seconds
    peak_bytes: Count
    max_difference: Levels
    differing: Annotated[float, Meta(ge=0, le=1)]
    reference_seconds: Seconds
    reference_peak_bytes: Count


class EndToEnd(TypedDict):
    """A named model, from its repositories to plans and pictures."""

    model: Text
    width: Pixels
    height: Pixels
    steps: Count
    stages: list[StageRow]
    pictures: list[PictureRow]
