"""The sheet: a request's pictures with the conditions given and found again, on one page.

As the official ControlNet++ demo arranges them: the conditions, the generated images, the conditions re-extracted from
these, with the consistency score under each. A column is one image and reads from top to bottom.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER = (252, 252, 250)
_INK = (32, 33, 36)
_FAINT = (112, 117, 122)
_RULE = (226, 226, 222)
# Pictures smaller than this are enlarged by a whole factor, so that their pixels stay square and sharp.
_READABLE_SIDE = 256


@dataclass(frozen=True)
class SheetControl:
    """One control on the sheet.

    Attributes:
        title: of its condition, e.g. 'segmentation'.
        given: the condition image, uint8 [H, W, 3].
        extracted: per image, the condition re-extracted from it, uint8 [H, W, 3].
        scores: per image, the text under it, e.g. 'mIoU 84.47'; a `consistency.Score` will do. Empty for none.
    """

    title: str
    given: NDArray[np.uint8]
    extracted: Sequence[NDArray[np.uint8]]
    scores: Sequence[object] = ()


def draw_sheet(
    images: Sequence[NDArray[np.uint8]],
    controls: Sequence[SheetControl],
    *,
    prompt: str = "",
    details: str = "",
    captions: Sequence[object] = (),
) -> NDArray[np.uint8]:
    """Draw the sheet.

    Args:
        images: the generated images, at least one, uint8 [H, W, 3], all of one size.
        controls: the conditions; their images have that size too.
        prompt: headline, shortened to fit.
        details: smaller line under it, such as 'UniPC · 20 steps · guidance 7.5'.
        captions: per image, the text under it, such as 'seed 1'. Empty for none.

    Returns:
        uint8 [sheet height, sheet width, 3]. Images below 256 pixels are enlarged by a whole factor.

    Raises:
        UserError: no images, or sizes or numbers that do not match.
    """
    rows = _rows(images, controls, captions)
    height, width = images[0].shape[:2]
    for row in rows:
        for picture in row.pictures:
            if picture.shape != (height, width, 3):
                raise UserError(f"a sheet needs pictures of one size, not {picture.shape} beside {(height, width, 3)}")
        if len(row.pictures) != len(images) or len(row.captions) not in (0, len(images)):
            raise UserError(f"a sheet of {len(images)} images needs as many pictures and captions in each row")

    factor = max(1, -(-_READABLE_SIDE // max(height, width)))
    tile_width, tile_height = width * factor, height * factor
    unit = max(8, max(tile_width, tile_height) // 32)  # all spacing and type grow with the pictures
    label_font, small_font, head_font = (
        ImageFont.load_default(size) for size in (1.75 * unit, 1.5 * unit, 2.25 * unit)
    )
    margin, gap = 3 * unit, unit
    row_gap, caption_height = 2 * unit, round(2.5 * unit)

    def text_width(text: str, font: _Font) -> float:
        return float(font.getlength(text))

    label_width = round(max(text_width(line, label_font) for row in rows for line in row.label)) + 2 * unit
    columns = len(images)
    left = margin + label_width
    sheet_width = left + columns * tile_width + (columns - 1) * gap + margin
    head_height = (round(3.25 * unit) if prompt.strip() else 0) + (round(2.25 * unit) if details.strip() else 0)
    head_height += round(1.5 * unit) if head_height else 0
    row_heights = [tile_height + (caption_height if row.captions else 0) for row in rows]
    sheet_height = 2 * margin + head_height + sum(row_heights) + row_gap * (len(rows) - 1)

    sheet = Image.new("RGB", (sheet_width, sheet_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin
    if prompt.strip():
        room = sheet_width - 2 * margin
        draw.text((margin, y), _elide(prompt, head_font, room), _INK, head_font)
        y += round(3.25 * unit)
    if details.strip():
        draw.text((margin, y), _elide(details, small_font, sheet_width - 2 * margin), _FAINT, small_font)
    y = margin + head_height
    for row, row_height in zip(rows, row_heights, strict=True):
        middle = y + tile_height / 2
        draw.text((margin, middle), row.label[0], _INK, label_font, anchor="ls")
        draw.text((margin, middle + 0.75 * unit), row.label[1], _FAINT, small_font, anchor="lt")
        for column, picture in enumerate(row.pictures):
            x = left + column * (tile_width + gap)
            tile = Image.fromarray(picture).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            # A hairline, or white line art would run into the paper.
            draw.rectangle((x - 1, y - 1, x + tile_width, y + tile_height), outline=_RULE)
            sheet.paste(tile, (x, y))
            if row.captions:
                caption = _elide(str(row.captions[column]), small_font, tile_width)
                place = (x + tile_width / 2, y + tile_height + 0.8 * unit)
                draw.text(place, caption, _INK if row.is_score else _FAINT, small_font, anchor="mt")
        y += row_height + row_gap
    return np.asarray(sheet)


@dataclass(frozen=True)
class _Row:
    label: tuple[str, str]
    pictures: Sequence[NDArray[np.uint8]]
    captions: Sequence[object]
    is_score: bool = False


def _rows(
    images: Sequence[NDArray[np.uint8]], controls: Sequence[SheetControl], captions: Sequence[object]
) -> list[_Row]:
    if not images:
        raise UserError("a sheet needs at least one image")
    given = [_Row((_title(c), "given"), [c.given] * len(images), ()) for c in controls]
    found = [_Row((_title(c), "re-extracted"), c.extracted, c.scores, is_score=True) for c in controls]
    return [*given, _Row(("Images" if len(images) > 1 else "Image", "generated"), images, captions), *found]


def _title(control: SheetControl) -> str:
    return control.title[:1].upper() + control.title[1:]


def _printable(text: str) -> str:
    """The text in the characters that Pillow's built-in font has: ASCII and a few signs."""
    folded = unicodedata.normalize("NFKD", text.translate({ord("×"): "x", ord("–"): "-", ord("—"): "-"}))
    kept = "".join(c for c in folded if not unicodedata.combining(c))  # é → e
    return "".join(c if (c.isascii() and c.isprintable()) or c in "·…“”’" else "?" for c in kept)


def _elide(text: str, font: _Font, room: float) -> str:
    """One line of text, cut with an ellipsis where it would be wider than the room, in pixels."""
    line = _printable(" ".join(text[:2000].split()))
    if font.getlength(line) <= room:
        return line
    low, high = 0, len(line)  # the longest prefix that fits, by bisection
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(line[:middle].rstrip() + "…") <= room else (low, middle - 1)
    return line[:low].rstrip(" ,;") + "…"
