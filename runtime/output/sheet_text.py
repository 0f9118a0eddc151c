"""Lines of text of a given width on a sheet, in the characters that Pillow's built-in font has."""

import unicodedata

from PIL import ImageFont

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LONGEST = 4000  # more of a text is not looked at


def wrap(text: str, font: _Font, room: float, most: int) -> list[str]:
    """The text in lines of at most `room` pixels, broken between words; what goes beyond `most` lines is elided."""
    words = _plain(text).split(" ")
    lines: list[str] = []
    line = ""
    for i, word in enumerate(words):
        longer = f"{line} {word}" if line else word
        if not line or font.getlength(longer) <= room:
            line = longer
            continue
        if len(lines) == most - 1:
            line = " ".join([line, *words[i:]])
            break
        lines.append(elide(line, font, room))
        line = word
    return [*lines, elide(line, font, room)] if line else lines


def elide(text: str, font: _Font, room: float) -> str:
    """One line of text, cut with an ellipsis where it would be wider than the room, in pixels."""
    line = _plain(text)
    if font.getlength(line) <= room:
        return line
    low, high = 0, len(line)  # the longest prefix that fits, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(line[:middle].rstrip() + "…") <= room else (low, middle - 1)
    return line[:low].rstrip(" ,;") + "…"


def _plain(text: str) -> str:
    """One line in ASCII and a few signs."""
    line = " ".join(text[:_LONGEST].split())
    folded = unicodedata.normalize("NFKD", line.translate({ord("×"): "x", ord("–"): "-", ord("—"): "-"}))
    kept = "".join(c for c in folded if not unicodedata.combining(c))  # é → e
    return "".join(c if (c.isascii() and c.isprintable()) or c in "·…“”’" else "?" for c in kept)
