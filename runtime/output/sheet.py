"""The sheet: a request's pictures with the conditions given and found again, on one page.

Several images stand as in the official ControlNet++ demo: the conditions, the generated images, the conditions
re-extracted from these, with the consistency score under each; a column is one image. One image stands in a row
between its condition and what is found in it, a row for each condition. Where the condition was extracted from a photo,
or drawing began with an image, that comes first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ...errors import UserError
from .sheet_text import elide, wrap

_PAPER = (252, 252, 250)
_INK = (32, 33, 36)
_FAINT = (112, 117, 122)
_RULE = (226, 226, 222)
# Pictures smaller than this are enlarged by a whole factor, so that their pixels stay square and sharp.
_READABLE_SIDE = 256
_PROMPT_LINES = 12


@dataclass(frozen=True)
class SheetControl:
    """One control on the sheet.

    Attributes:
        title: of its condition, e.g. 'segmentation'.
        given: the condition image, uint8 [H, W, 3].
        extracted: per image, the condition re-extracted from it, uint8 [H, W, 3].
        scores: per image, the text under it, e.g. 'mIoU 84.47'; a `consistency.Score` will do. Empty for none.
        photo: what the condition was extracted from, uint8 [*, *, 3] of any size, or None.
    """

    title: str
    given: NDArray[np.uint8]
    extracted: Sequence[NDArray[np.uint8]]
    scores: Sequence[object] = ()
    photo: NDArray[np.uint8] | None = None


def draw_sheet(
    images: Sequence[NDArray[np.uint8]],
    controls: Sequence[SheetControl],
    *,
    prompt: str = "",
    details: str = "",
    captions: Sequence[object] = (),
    init_image: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Draw the sheet.

    Args:
        images: the generated images, at least one, uint8 [H, W, 3], all of one size.
        controls: the conditions; their images have that size too.
        prompt: headline, wrapped.
        details: smaller line under it, such as 'UniPC · 20 steps · guidance 7.5'.
        captions: per image, the text under it, such as 'seed 1'. Empty for none.
        init_image: what drawing began with, uint8 [*, *, 3] of any size, or None.

    Returns:
        uint8 [sheet height, sheet width, 3]. Images below 256 pixels are enlarged by a whole factor.

    Raises:
        UserError: no images, or sizes or numbers that do not match.
    """
    _check(images, controls, captions)
    if len(images) == 1:
        rows = _side_by_side(images[0], controls, captions, init_image)
    else:
        rows = _by_image(images, controls, captions, init_image)
    return _Page(rows, images[0].shape[1], images[0].shape[0]).draw(prompt, details)


def _check(images: Sequence[NDArray[np.uint8]], controls: Sequence[SheetControl], captions: Sequence[object]) -> None:
    if not images:
        raise UserError("a sheet needs at least one image")
    height, width = images[0].shape[:2]
    for picture in (*images, *(p for c in controls for p in (c.given, *c.extracted))):
        if picture.shape != (height, width, 3):
            raise UserError(f"a sheet needs pictures of one size, not {picture.shape} beside {(height, width, 3)}")
    for control in controls:
        if len(control.extracted) != len(images) or len(control.scores) not in (0, len(images)):
            raise UserError(f"a sheet of {len(images)} images needs as many pictures and captions in each row")
    if len(captions) not in (0, len(images)):
        raise UserError(f"a sheet of {len(images)} images needs as many pictures and captions in each row")


@dataclass(frozen=True)
class _Tile:
    """A picture with the text under it; one of another size is fitted into the tile."""

    picture: NDArray[np.uint8]
    caption: str = ""
    ink: tuple[int, int, int] = _FAINT


@dataclass(frozen=True)
class _Row:
    """label: two lines on the left, or none."""

    tiles: Sequence[_Tile]
    label: tuple[str, str] | None = None


def _side_by_side(
    image: NDArray[np.uint8],
    controls: Sequence[SheetControl],
    captions: Sequence[object],
    init_image: NDArray[np.uint8] | None,
) -> list[_Row]:
    """Photo | condition | image | found again: a row for each control."""
    seed = " · ".join(("image", *(str(c) for c in captions)))
    generated = _Tile(image, seed)
    before = [] if init_image is None else [_Tile(init_image, "initial image")]
    if not controls:
        return [_Row([*before, generated])]
    rows = []
    for control in controls:
        photo = [] if control.photo is None else [_Tile(control.photo, "photo")]
        score = f" · {control.scores[0]}" if control.scores else ""
        found = _Tile(control.extracted[0], f"re-extracted{score}", _INK if score else _FAINT)
        rows.append(_Row([*photo, _Tile(control.given, f"{control.title}, given"), *before, generated, found]))
    return rows


def _by_image(
    images: Sequence[NDArray[np.uint8]],
    controls: Sequence[SheetControl],
    captions: Sequence[object],
    init_image: NDArray[np.uint8] | None,
) -> list[_Row]:
    """A column for each image: what came first, the conditions, the images, the conditions found again."""
    photos = [c.photo for c in controls if c.photo is not None]
    first = [p for i, p in enumerate(photos) if not any(np.array_equal(p, other) for other in photos[:i])]
    rows = [_Row([_Tile(photo)], ("Photo", "extracted from")) for photo in first]
    rows += [_Row([_Tile(c.given)] * len(images), (_title(c), "given")) for c in controls]
    if init_image is not None:
        rows.append(_Row([_Tile(init_image)], ("Image", "begun with")))
    under = [str(c) for c in captions] or [""] * len(images)
    rows.append(_Row([_Tile(i, c) for i, c in zip(images, under, strict=True)], ("Images", "generated")))
    for c in controls:
        scores = [str(s) for s in c.scores] or [""] * len(images)
        found = [_Tile(e, s, _INK) for e, s in zip(c.extracted, scores, strict=True)]
        rows.append(_Row(found, (_title(c), "re-extracted")))
    return rows


def _title(control: SheetControl) -> str:
    return control.title[:1].upper() + control.title[1:]


class _Page:
    """Rows of tiles of one size, laid out and drawn."""

    def __init__(self, rows: Sequence[_Row], width: int, height: int) -> None:
        self._rows = rows
        factor = max(1, -(-_READABLE_SIDE // max(height, width)))
        self._tile = (width * factor, height * factor)
        self._unit = unit = max(
            8, isqrt(self._tile[0] * self._tile[1]) // 32
        )  # spacing and type grow with the pictures
        sizes = (1.75, 1.5, 2.25)
        self._label_font, self._small_font, self._head_font = (ImageFont.load_default(s * unit) for s in sizes)
        self._margin, self._gap = 3 * unit, unit
        labels = [line for row in rows for line in row.label or ()]
        widest = max((self._label_font.getlength(line) for line in labels), default=0)
        self._left = self._margin + (round(widest) + 2 * unit if labels else 0)
        columns = max(len(row.tiles) for row in rows)
        self._width = self._left + columns * self._tile[0] + (columns - 1) * self._gap + self._margin

    def draw(self, prompt: str, details: str) -> NDArray[np.uint8]:
        unit, margin, (tile_width, tile_height) = self._unit, self._margin, self._tile
        room = self._width - 2 * margin
        head = wrap(prompt, self._head_font, room, _PROMPT_LINES)
        small = wrap(details, self._small_font, room, _PROMPT_LINES)
        head_height = round(3.25 * unit) * len(head) + round(2.25 * unit) * len(small)
        head_height += round(1.5 * unit) if head_height else 0
        # Small tiles leave too little room for a caption beside others: it goes on in a second line.
        captions = [[wrap(t.caption, self._small_font, tile_width, 3) for t in row.tiles] for row in self._rows]
        lines = [max(map(len, of_row)) for of_row in captions]
        heights = [tile_height + (unit + round(1.75 * unit) * n if n else 0) for n in lines]
        height = 2 * margin + head_height + sum(heights) + 2 * unit * (len(heights) - 1)
        sheet = Image.new("RGB", (self._width, height), _PAPER)
        pen = ImageDraw.Draw(sheet)
        y = margin
        for line in head:
            pen.text((margin, y), line, _INK, self._head_font)
            y += round(3.25 * unit)
        for line in small:
            pen.text((margin, y), line, _FAINT, self._small_font)
            y += round(2.25 * unit)
        y = margin + head_height
        for row, row_height, texts in zip(self._rows, heights, captions, strict=True):
            if row.label:
                middle = y + tile_height / 2
                pen.text((margin, middle), row.label[0], _INK, self._label_font, anchor="ls")
                pen.text((margin, middle + 0.75 * unit), row.label[1], _FAINT, self._small_font, anchor="lt")
            for column, (tile, text) in enumerate(zip(row.tiles, texts, strict=True)):
                x = self._left + column * (tile_width + self._gap)
                # A hairline, or white line art would run into the paper.
                pen.rectangle((x - 1, y - 1, x + tile_width, y + tile_height), outline=_RULE)
                self._paste(sheet, tile.picture, x, y)
                for i, line in enumerate(text):
                    place = (x + tile_width / 2, y + tile_height + (0.8 + 1.75 * i) * unit)
                    pen.text(place, elide(line, self._small_font, tile_width), tile.ink, self._small_font, anchor="mt")
            y += row_height + 2 * unit
        return np.asarray(sheet)

    def _paste(self, sheet: Image.Image, picture: NDArray[np.uint8], x: int, y: int) -> None:
        width, height = self._tile
        tile = Image.fromarray(picture)
        if width * picture.shape[0] == height * picture.shape[1] and width % picture.shape[1] == 0:
            tile = tile.resize(self._tile, Image.Resampling.NEAREST)
        else:
            scale = min(width / tile.width, height / tile.height)
            size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
            tile = tile.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
