"""The sheet of results."""

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.consistency import Score
from cnpp_trt.runtime.sheet import SheetControl, draw_sheet

RNG = np.random.default_rng(0)


def pictures(count: int, side: int) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def find(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where the picture stands on the sheet, pixel for pixel: all (y, x) of its top left corner."""
    height, width = picture.shape[:2]
    places = []
    candidates = (sheet[: 1 - height or None, : 1 - width or None] == picture[0, 0]).all(-1)
    for y, x in zip(*np.nonzero(candidates), strict=True):
        if (sheet[y, x : x + width] == picture[0]).all() and (sheet[y : y + height, x : x + width] == picture).all():
            places.append((int(y), int(x)))
    return places


@pytest.mark.parametrize(("count", "side", "factor"), [(1, 128, 2), (4, 128, 2), (3, 64, 4), (2, 256, 1), (1, 512, 1)])
@pytest.mark.parametrize("controls", [1, 2])
def test_rows_and_columns(count: int, side: int, factor: int, controls: int) -> None:
    images = pictures(count, side)
    rows = [
        SheetControl(f"condition {i}", pictures(1, side)[0], pictures(count, side), [Score("F1", 1.0, True)] * count)
        for i in range(controls)
    ]
    sheet = draw_sheet(images, rows, prompt="a red house", details="20 steps", captions=range(count))
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3

    def enlarged(picture: np.ndarray) -> np.ndarray:
        return picture.repeat(factor, 0).repeat(factor, 1)

    columns = [find(sheet, enlarged(image)) for image in images]
    assert all(len(places) == 1 for places in columns)
    image_y, xs = columns[0][0][0], [places[0][1] for places in columns]
    assert {places[0][0] for places in columns} == {image_y} and xs == sorted(xs)
    order = []
    for row in rows:
        given = find(sheet, enlarged(row.given))
        assert [x for _, x in given] == xs and len({y for y, _ in given}) == 1
        order.append(given[0][0])
    order.append(image_y)
    for row in rows:
        places = [find(sheet, enlarged(picture)) for picture in row.extracted]
        assert [p[0][1] for p in places] == xs and all(p[0][0] == places[0][0][0] for p in places)
        order.append(places[0][0][0])
    assert order == sorted(order)


def test_text_is_drawn_and_stays_inside() -> None:
    images, control = pictures(2, 64), SheetControl("depth", *pictures(1, 64), pictures(2, 64))
    bare = draw_sheet(images, [control])
    scored = draw_sheet(images, [SheetControl("depth", control.given, control.extracted, ["RMSE 1.00", "RMSE 2.00"])])
    assert scored.shape[0] > bare.shape[0] and scored.shape[1] == bare.shape[1]
    titled = draw_sheet(images, [control], prompt="a red house")
    assert titled.shape[0] > bare.shape[0]
    other = draw_sheet(images, [control], prompt="a blue house")
    assert titled.shape == other.shape and (titled != other).any()
    long = draw_sheet(images, [control], prompt="word " * 5000, details="détails × 猫\n" * 99)
    paper = long[0, 0]
    assert (long[:, :16] == paper).all() and (long[:, -16:] == paper).all()  # the margins stay empty
    assert long.shape[1] == bare.shape[1]


def test_inputs_are_not_changed_and_the_sheet_repeats() -> None:
    images, control = pictures(2, 32), SheetControl("depth", *pictures(1, 32), pictures(2, 32))
    before = [image.copy() for image in images]
    np.testing.assert_array_equal(draw_sheet(images, [control]), draw_sheet(images, [control]))
    np.testing.assert_array_equal(images, before)


def test_refusals() -> None:
    images, given = pictures(2, 32), pictures(1, 32)[0]
    with pytest.raises(UserError, match="at least one image"):
        draw_sheet([], [])
    with pytest.raises(UserError, match="one size"):
        draw_sheet(images, [SheetControl("depth", pictures(1, 16)[0], images)])
    with pytest.raises(UserError, match="as many pictures"):
        draw_sheet(images, [SheetControl("depth", given, images[:1])])
    with pytest.raises(UserError, match="as many pictures"):
        draw_sheet(images, [SheetControl("depth", given, images, ["one"])])
