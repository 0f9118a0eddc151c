"""What results hold, by kind. Seconds, bytes, and fractions of 1 throughout, unless said otherwise."""

import sys
from typing import Literal, NotRequired, TypedDict

from .statistics import Ratio, Summary

# Stands for a difference that is not finite: JSON has no such number.
NOT_FINITE = sys.float_info.max

# ---- bench


class Contender(TypedDict):
    """`reason` says why one that is not `available` could not run here, and is empty else."""

    name: str
    title: str
    precision: str
    available: bool
    reason: str


class Case(TypedDict):
    """One request's sizes. `base` marks the one that every contender takes part in; the others vary one thing of it."""

    width: int
    height: int
    images: int
    steps: int
    scheduler: str
    guidance_scale: float
    base: bool


class Timed(TypedDict):
    """Seconds of one contender in one case.

    stages: by stage, warm, each launched by itself; `host` is what no stage accounts for.
    ratio: how many times faster than the baseline, in the same rounds; absent for the baseline.
    max_difference, psnr: of its first image against the baseline's on the same request: levels of 255, and dB (None
        where they are equal).
    """

    whole: Summary
    stages: dict[str, Summary]
    ratio: NotRequired[Ratio]
    max_difference: NotRequired[int]
    psnr: NotRequired[float | None]


class TimedCase(TypedDict):
    case: Case
    runs: dict[str, Timed]


class Cold(TypedDict):
    """Whole processes, from their start to the first image. Bytes at the peak; device_bytes is None on a CPU."""

    seconds: Summary
    host_bytes: int
    device_bytes: int | None


class Work(TypedDict):
    """Of one launch of a stage: floating-point operations (a multiply-add is two), and the bytes that must move at
    least: its weights once, its inputs and its outputs."""

    flop: float
    bytes: float


class Floor(TypedDict):
    """What this machine can do, measured, and what the stages ask of it in the base case.

    flop_per_second: by precision (`fp32`, `bf16`, `fp16`); bytes_per_second: read and written.
    work: by stage; launches: how often the stage is launched for one request.
    """

    flop_per_second: dict[str, float]
    bytes_per_second: float
    work: dict[str, Work]
    launches: dict[str, int]


class Bench(TypedDict):
    """The first contender is the baseline; `threads` is None on a GPU. `floor` is None where it could not be measured,
    for `floor_reason`."""

    model: str
    condition: str
    device: Literal["cpu", "gpu"]
    threads: int | None
    contenders: list[Contender]
    cases: list[TimedCase]
    cold: dict[str, Cold]
    floor: Floor | None
    floor_reason: str


# ---- waterfall


class Technique(TypedDict):
    """One bar: everything of the bars before, and this. Seconds of a whole denoising loop and decoding.

    difference: relative L2 of the final latents against the first bar's.
    reason: why it was not measured here; empty where it was.
    """

    name: str
    title: str
    seconds: NotRequired[Summary]
    ratio: NotRequired[Ratio]
    difference: NotRequired[float]
    reason: str


class Waterfall(TypedDict):
    """`ratio` of a technique is how many times faster than the first bar."""

    model: str
    condition: str
    case: Case
    techniques: list[Technique]


# ---- parity


class GraphParity(TypedDict):
    """One graph on the inputs recorded from the reference's run, over all its launches and outputs.

    worst: the launch and tensor with the largest relative L2, as in `unet step 3: noise_pred`.
    """

    graph: str
    launches: int
    max_abs: float
    relative_l2: float
    cosine: float
    worst: str


class StepParity(TypedDict):
    """Relative L2 of the latents after each step against the reference's.

    free: the deployed loop by itself: error and what became of it.
    forced: each step started from the reference's own state: its error alone.
    """

    condition: str
    free: list[float]
    forced: list[float]


class ImageParity(TypedDict):
    """Images of one condition against the reference's. One value an image; psnr is None where two are equal.

    lpips: None where it cannot be computed, for the reason in `Parity.unavailable`.
    """

    condition: str
    max_difference: list[int]
    psnr: list[float | None]
    ssim: list[float]
    lpips: list[float] | None


class Heatmap(TypedDict):
    """PNGs in base64, of one size; `difference` shows the largest channel's, `scale` levels of 255 as white."""

    condition: str
    seed: int
    reference: str
    deployed: str
    difference: str
    scale: int


class Parity(TypedDict):
    """The deployed side against PyTorch in fp32; `half` is PyTorch's own fp16 against it, on the same requests.

    missed: the thresholds that were not met, one line each; `passed` is whether there are none.
    unavailable: what was not computed, and why.
    """

    model: str
    backend: str
    precision: str
    reference: str
    graphs: list[GraphParity]
    steps: list[StepParity]
    images: list[ImageParity]
    half: list[ImageParity]
    heatmaps: list[Heatmap]
    thresholds: dict[str, float]
    missed: list[str]
    passed: bool
    unavailable: dict[str, str]


# ---- consistency


class Interval(TypedDict):
    """A value with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


class Difference(TypedDict):
    """Paired: both sides had the same prompts, seeds and conditions. `value` is `of` minus `minus`."""

    of: str
    minus: str
    value: float
    low: float
    high: float


class ConditionScores(TypedDict):
    """scores: by side. differences: of the first side against each of the others."""

    condition: str
    metric: str
    higher_is_better: bool
    prompts: int
    images: int
    scores: dict[str, Interval]
    differences: list[Difference]


class Sheet(TypedDict):
    """The three rows of one prompt: given, generated, re-extracted. `png` is base64."""

    condition: str
    png: str


class Consistency(TypedDict):
    """sides: titles by name, the deployed one first. quality: FID and CLIP scores by side and name, where asked for."""

    model: str
    data: str
    images_per_prompt: int
    sides: dict[str, str]
    conditions: list[ConditionScores]
    sheets: list[Sheet]
    quality: dict[str, dict[str, float]]


# ---- full size


class PlanRow(TypedDict):
    graph: str
    seconds: float
    bytes: int
    kernels: int
    attentions: int
    attentions_fused: int
    norms: int
    norms_fused: int


class Plans(TypedDict):
    """Building every plan anew; `seconds` and `peak_bytes` are the whole command's."""

    model: str
    flavor: str
    width: int
    height: int
    plans: list[PlanRow]
    seconds: float
    peak_bytes: int


class Export(TypedDict):
    """Exporting anew; `seconds` and `peak_bytes` are the whole command's."""

    model: str
    precision: str
    width: int
    height: int
    graphs: list[str]
    seconds: float
    peak_bytes: int


class StageRow(TypedDict):
    """A command, as a process of its own."""

    stage: str
    seconds: float
    peak_bytes: int


class PictureRow(TypedDict):
    """A picture of one condition and diffusers' of the same; `differing` is the share of values that differ at all."""

    condition: str
    seconds: float
    peak_bytes: int
    max_difference: int
    differing: float
    reference_seconds: float
    reference_peak_bytes: int


class Whole(TypedDict):
    """A named model, from its repositories to plans and pictures."""

    model: str
    width: int
    height: int
    steps: int
    stages: list[StageRow]
    pictures: list[PictureRow]
