"""What a report is made of, whichever page it is written to."""

from dataclasses import dataclass
from typing import ClassVar

from .table import Table


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    block: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Figure:
    """`svg` is a whole document in the colors of `figures`; `name` becomes a file's."""

    block: ClassVar[str] = "figure"
    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        share: of the longest bar, 0–1; None where nothing was measured.
        low, high: of the same scale.
        color: of `figures.COLORS`.
        note: small, after the value; a reason where nothing was measured.
    """

    label: str
    value: str
    share: float | None
    low: float
    high: float
    color: int
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Markdown leaves them out: their figures are those of the table beside them."""

    block: ClassVar[str] = "bars"
    title: str
    caption: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Picture:
    """`png` in base64."""

    name: str
    png: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Images side by side.

    Attributes:
        pixels: three beside each other, each pixel sharp when enlarged.
    """

    block: ClassVar[str] = "pictures"
    title: str
    caption: str
    pictures: tuple[Picture, ...]
    pixels: bool = False


Block = Text | Table | Figure | Bars | Pictures


@dataclass(frozen=True)
class Section:
    """A part of a document under a heading."""

    title: str
    anchor: str
    lead: str
    blocks: tuple[Block, ...]
    command: str = ""


@dataclass(frozen=True)
class Answer:
    """`figure` is what to remember, `line` says what of; `good` is None where it is neither."""

    question: str
    figure: str
    line: str
    good: bool | None = None


@dataclass(frozen=True)
class Document:
    """A report before it is written: its head, its answers and its sections."""

    title: str
    lead: str
    answers: tuple[Answer, ...]
    sections: tuple[Section, ...]
