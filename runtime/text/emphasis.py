"""Emphasis in prompts, as AUTOMATIC1111's web UI reads and applies it.

`(word)` weighs a word 1.1 times, `[word]` 1/1.1 times, `(word:1.4)` 1.4 times; brackets may be nested, and a backslash
before a bracket or a backslash makes it an ordinary character. The text encoder reads the text without the brackets;
its result is multiplied by the weights afterwards.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ...messages import printable

Spans = list[tuple[str, float]]
"""Text and its weight, one after the other."""

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0
NO_MEAN = 4
"""A mean of so many roundings, relative to the mean magnitude, is none. That of CLIP's results is a tenth or so."""

MAX_NESTING = 64
"""Brackets that may be open at once: so the time to read a prompt is proportional to its length."""

_SPECIAL = frozenset("\\()[]:")
_ESCAPED = frozenset("\\()[]")
_EXTRA_NETWORKS = ("<lora:", "<lyco:", "<hypernet:")


def split_at_breaks(text: str) -> list[str]:
    r"""A prompt divided at every word `BREAK`, without the white space around it, as `\s*\bBREAK\b\s*` divides it.

    In linear time, which that regular expression does not take where there are many spaces.
    """
    parts = []
    start = 0
    position = text.find("BREAK")
    while position >= 0:
        end = position + len("BREAK")
        if not (_in_word(text[position - 1 : position]) or _in_word(text[end : end + 1])):
            parts.append(text[start:position])
            start = end
        position = text.find("BREAK", end)
    parts.append(text[start:])
    last = len(parts) - 1
    stripped = [part.lstrip() if i else part for i, part in enumerate(parts)]
    return [part.rstrip() if i < last else part for i, part in enumerate(stripped)]


def parse(text: str, breaks: bool) -> list[Spans]:
    """The spans of a prompt, in one list for each part between the words `BREAK`; one list where `breaks` is false.

    The rules are those of `parse_prompt_attention` in the web UI's `modules/prompt_parser.py`: what is not closed
    counts to the end, what closes nothing is text, a single backslash vanishes, neighbors of one weight are one text.
    `BREAK` divides inside brackets too, where the web UI takes it for a word with a negative weight.

    Raises:
        UserError: for a weight that is no number or too large, and for brackets nested too deeply.
    """
    spans: list[tuple[str | None, float]] = []  # None stands for BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(spans)):
            spans[i] = (spans[i][0], spans[i][1] * factor)

    position = 0
    while position < len(text):
        c = text[position]
        end = position + 1
        literal = c
        if c == "\\":
            escapes = text[end : end + 1] in _ESCAPED
            literal = text[end] if escapes else ""
            end += escapes
        elif c in opened:
            opened[c].append(len(spans))
            if len(opened["("]) + len(opened["["]) > MAX_NESTING:
                raise UserError(
                    f"the prompt has more than {MAX_NESTING} brackets open at character {position}: "
                    "close them, or write \\( and \\[ for the characters themselves"
                )
            position = end
            continue
        elif c == ":":
            number, end = _number(text, position)
            if number and opened["("]:
                close("(", _weight(number))
                position = end
                continue
            literal = text[position:end]
        elif c == ")" and opened["("]:
            close("(", ROUND)
            position = end
            continue
        elif c == "]" and opened["["]:
            close("[", SQUARE)
            position = end
            continue
        elif c not in _SPECIAL:
            while end < len(text) and text[end] not in _SPECIAL:
                end += 1
            literal = text[position:end]
        for i, part in enumerate(split_at_breaks(literal) if breaks and c not in _SPECIAL else [literal]):
            spans += [(None, 1.0)] * (i > 0)
            spans.append((part, 1.0))
        position = end
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)
    return _merged(spans)


def literal_emphasis(text: str) -> str:
    """The first part of a prompt that the web UI's users mean as emphasis, `(red:1.4)` or `((red))`; empty if none.

    `(red)` alone is not taken for it: it is common in plain text.
    """
    opened: list[int] = []
    doubled = ""
    for position, c in enumerate(text):
        if c in "([":
            opened.append(position)
        elif c in ")]" and opened:
            start = opened.pop()
            if not doubled and opened and opened[-1] == start - 1 and text[position + 1 : position + 2] == c:
                doubled = text[start - 1 : position + 2]
        elif c == ":" and opened and text[opened[-1]] == "(":
            number, end = _number(text, position)
            if number:
                return text[opened[-1] : end]
    return doubled


def extra_network(text: str) -> str:
    """The first `<lora:…>` of a prompt (`<lyco:…>`, `<hypernet:…>`), which only the web UI loads; empty if none."""
    lower = text.lower()
    found = [position for tag in _EXTRA_NETWORKS if (position := lower.find(tag)) >= 0]
    if not found:
        return ""
    end = text.find(">", min(found))
    return text[min(found) : end + 1 if end >= 0 else len(text)]


def emphasize(embeds: NDArray[np.floating], weights: NDArray[np.float32]) -> NDArray[np.floating]:
    """The text encoder's result [P,T,D] with every token's vector times its weight [P,T], in the type it has.

    A row is scaled afterwards so that its mean is what it was: the web UI's emphasis "Original"
    (`modules/sd_emphasis.py`), there and here for each chunk of 77 tokens alone. Rows of weights 1 are left alone, and
    a mean that is rounding alone is not restored: its factor would be noise.

    Raises:
        UserError: the weights cancel each other, so that no factor restores the mean.
    """
    found = embeds.copy()
    for row in np.flatnonzero((weights != 1).any(axis=1)):
        z = embeds[row].astype(np.float32)
        weighted = z * weights[row, :, None]
        mean, spread = z.mean(dtype=np.float64), np.abs(z).mean(dtype=np.float64)
        with np.errstate(all="ignore"):
            scaled = weighted.astype(embeds.dtype)
            if abs(mean) > NO_MEAN * np.finfo(embeds.dtype).eps * spread:
                scaled = (weighted * (mean / weighted.mean(dtype=np.float64))).astype(embeds.dtype)
        if np.isfinite(z).all() and not np.isfinite(scaled).all():
            raise UserError("the weights in the prompt cancel each other: bring them closer to 1")
        found[row] = scaled
    return found


def _number(text: str, colon: int) -> tuple[str, int]:
    """The number in `: 1.4 )` at this colon and the position after the bracket; or "" and that after the colon."""
    position = colon + 1
    while text[position : position + 1].isspace():
        position += 1
    start = position
    if text[position : position + 1] in ("+", "-"):
        position += 1
    digits = position
    while text[position : position + 1] == "." or text[position : position + 1].isdecimal():
        position += 1
    number = text[start:position]
    if position == digits:
        return "", colon + 1
    while text[position : position + 1].isspace():
        position += 1
    return (number, position + 1) if text[position : position + 1] == ")" else ("", colon + 1)


def _weight(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MAX_WEIGHT:
        raise UserError(
            f"the weight {printable(number, 40)} in the prompt must be a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return weight


def _merged(spans: list[tuple[str | None, float]]) -> list[Spans]:
    parts: list[list[tuple[list[str], float]]] = [[]]
    for text, weight in spans:
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1][1] == weight:
            parts[-1][-1][0].append(text)
        else:
            parts[-1].append(([text], weight))
    merged = [[("".join(texts), weight) for texts, weight in part] for part in parts]
    for text, weight in (span for part in merged for span in part):
        if not abs(weight) <= MAX_WEIGHT:
            raise UserError(
                f"brackets give {printable(repr(text), 40)} in the prompt the weight {weight:.4g}: "
                f"at most {MAX_WEIGHT:g}"
            )
    return [[(text, weight) for text, weight in part if text] for part in merged]


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
