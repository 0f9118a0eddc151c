"""What results of checks hold: of a GPU's first contact, and of attempts to break the program."""

from typing import TypedDict

from .records import Count, Text
from .statistics import Seconds

# ---- first contact


class StageFinding(TypedDict):
    """What one stage found on this machine.

    verdict: `ok`, `degraded`, `refused`, `failed`, `skipped` or `timed out`; words: why.
    numbers: what was measured, by name with its unit.
    said: the last lines that its process printed.
    """

    name: Text
    title: Text
    verdict: Text
    words: Text
    numbers: dict[Text, float | int | Text]
    seconds: Seconds
    said: list[Text]


class FirstContact(TypedDict):
    """What a GPU does with this package. mode: `quick` or `full`."""

    mode: Text
    condition: Text
    stages: list[StageFinding]


# ---- reliability


class Attempts(TypedDict):
    """Alike attempts to break something.

    outcomes: how many ended in each way that is right; wrong: in each way that is not, also where none did.
    reason: why they were not made; empty where they were.
    """

    what: Text
    tried: Count
    outcomes: dict[Text, Count]
    wrong: dict[Text, Count]
    seconds: Seconds
    reason: Text


class ReliabilityPart(TypedDict):
    """measured: ISO 8601, UTC; parts may be measured one by one."""

    name: Text
    title: Text
    command: Text
    measured: Text
    rows: list[Attempts]


class Reliability(TypedDict):
    """What was tried to break the program, and what came of it."""

    parts: list[ReliabilityPart]
