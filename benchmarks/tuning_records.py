"""What a search for a faster setting leaves: of each prompt, of each setting, and as a result."""

from typing import TypedDict

from .records import Count, Interval, PromptRecord, Score, Text
from .statistics import Ratio, Seconds, Times


class TrialRecord(PromptRecord):
    """What one prompt leaves of a setting. psnr: dB from the exact setting's image; None where they are equal."""

    psnr: Score | None


class Tried(TypedDict):
    """A setting on so many prompts.

    setting: in words.
    seconds: of a request, by the cost model.
    speedup: the exact setting's seconds over these.
    loss: points that it loses against the exact setting, paired; below 0 it gains.
    psnr: the median over prompts, dB from the exact setting's images; None where they are equal.
    """

    setting: Text
    seconds: Seconds
    speedup: Times
    loss: Interval
    psnr: Score | None
    prompts: Count


class Confirmed(Tried):
    """On prompts that nothing was chosen on. measured: how many times faster it was, in turn with the exact setting."""

    measured: Ratio


class Tuning(TypedDict):
    """A search. Points are of the metric's own unit, hundredths for SSIM.

    exact: the setting that all others are compared with; exact_score: its score on the confirmation's prompts.
    trials: every setting that was tried, with the most prompts that it had.
    attempts: those that were confirmed or refused, in their order; the last one is what the preset holds.
    ablation: levers one by one, on prompts of their own; empty where that was not asked for.
    against: how many times faster the preset was than other systems with the exact setting, by their titles, in turn.
    """

    model: Text
    condition: Text
    metric: Text
    higher_is_better: bool
    budget: Score
    exact: Text
    exact_seconds: Seconds
    exact_score: Score
    trials: list[Tried]
    attempts: list[Confirmed]
    ablation: list[Tried]
    against: dict[Text, Ratio]
