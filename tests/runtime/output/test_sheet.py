"""The sheet of results."""

import itertools

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.control.consistency import Score
from cnpp_trt.runtime.output.sheet import SheetControl, draw_sheet
from cnpp_trt.runtime.output.sheet_text import wrap
from PIL import ImageFont

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


@pytest.mark.parametrize(("count", "side", "factor"), [(4, 128, 2), (3, 64, 4), (2, 256, 1)])
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


@pytest.mark.parametrize(("side", "factor"), [(128, 2), (512, 1)])
@pytest.mark.parametrize("photo", [False, True])
def test_one_image_lies_in_a_row(side: int, factor: int, photo: bool) -> None:
    """Photo, condition, image, what was found again: from left to right, a row for each control."""
    [image], source = pictures(1, side), pictures(1, side)[0]
    rows = [
        SheetControl(f"condition {i}", pictures(1, side)[0], pictures(1, side), ["F1 1.00"], source if photo else None)
        for i in range(2)
    ]
    sheet = draw_sheet([image], rows, prompt="a red house", captions=["seed 1"])

    def places(picture: np.ndarray) -> list[tuple[int, int]]:
        return find(sheet, picture.repeat(factor, 0).repeat(factor, 1))

    ys = [y for y, _ in places(image)]
    assert len(ys) == 2 and ys[0] + side * factor < ys[1]
    for row, y in zip(rows, ys, strict=True):
        [given], [found] = places(row.given), places(row.extracted[0])
        assert (given[0], found[0]) == (y, y)
        assert given[1] < places(image)[0][1] < found[1]
    assert places(source) == ([(y, min(x for _, x in places(source))) for y in ys] if photo else [])
    assert all(x < places(rows[0].given)[0][1] for _, x in places(source))


def test_photos_and_initial_images_of_any_size_are_shown_whole() -> None:
    """A photo of another shape is scaled by one factor: a red square stays a square."""
    control = SheetControl("depth", pictures(1, 64)[0], pictures(1, 64), photo=np.zeros((300, 600, 3), np.uint8))
    assert control.photo is not None
    control.photo[:] = (0, 0, 255)
    control.photo[100:200, 100:200] = (255, 0, 0)
    bare = draw_sheet(pictures(1, 64), [SheetControl("depth", control.given, control.extracted)])
    sheet = draw_sheet(pictures(1, 64), [control])
    assert sheet.shape[1] > bare.shape[1]
    rows, columns = np.nonzero((sheet == (255, 0, 0)).all(-1))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - width) <= 1 and height > 30
    blue = np.nonzero((sheet == (0, 0, 255)).all(-1))
    assert np.ptp(blue[1]) + 1 == 256 and np.ptp(blue[0]) + 1 == 128  # the tile's width, half its height
    several = draw_sheet(
        pictures(2, 64), [SheetControl("depth", pictures(1, 64)[0], pictures(2, 64), photo=control.photo)]
    )
    assert (several == (255, 0, 0)).all(-1).any()
    begun = draw_sheet(pictures(1, 64), [], init_image=control.photo)
    assert (begun == (255, 0, 0)).all(-1).any()


@pytest.mark.parametrize("size", [(128, 128), (768, 512), (256, 512)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_prompt_is_wrapped_and_nothing_leaves_the_page(count: int, size: tuple[int, int]) -> None:
    width, height = size
    images = [np.zeros((height, width, 3), np.uint8)] * count
    control = SheetControl("segmentation", images[0], images, ["mIoU 92.10 · good"] * count)
    short = draw_sheet(images, [control], prompt="a house")
    prompt = "a white house and oak trees in a golden field by a road, snowy mountains, at dusk, " * 3
    long = draw_sheet(images, [control], prompt=prompt)
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]
    assert (long[:, :16] == long[0, 0]).all() and (long[:, -16:] == long[0, 0]).all()
    # Each line's ink, by its font's height, is a line more of the page.
    assert draw_sheet(images, [control], prompt=prompt * 2).shape[0] > long.shape[0]
    assert draw_sheet(images, [control], prompt="word " * 5000).shape[0] < 4 * height + 3000  # bounded


def test_wrapping_breaks_between_words_and_keeps_all_of_them() -> None:
    font = ImageFont.load_default(20)
    text = "a white house and oak trees in a golden field by a road, snowy mountains, at dusk"
    lines = wrap(text, font, 200, 12)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(font.getlength(line) <= 200 for line in lines)
    # Greedy: no word would have fitted into the line before.
    for line, following in itertools.pairwise(lines):
        assert font.getlength(f"{line} {following.split()[0]}") > 200
    cut = wrap(text, font, 200, 2)
    assert len(cut) == 2 and cut[1].endswith("…") and all(font.getlength(line) <= 200 for line in cut)
    assert wrap("", font, 200, 2) == [] and len(wrap("x" * 500, font, 200, 3)) == 1


def test_text_is_drawn_and_stays_inside() -> None:
    images, control = pictures(2, 64), SheetControl("depth", pictures(1, 64)[0], pictures(2, 64))
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
    images, control = pictures(2, 32), SheetControl("depth", pictures(1, 32)[0], pictures(2, 32))
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
