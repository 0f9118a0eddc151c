"""The page in headless Chromium: what it shows is what the pipeline draws, and every control does what it says."""

import io
import os
import time
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control
from cnpp_trt.conditions import ADE20K_PALETTE
from cnpp_trt.miniature.scenes import LABELS
from cnpp_trt.runtime.control.palette import colors_from_labels
from PIL import Image

pytestmark = pytest.mark.slow

PALETTE = np.array(ADE20K_PALETTE, np.uint8)
FULL = bool(os.environ.get("CNPP_TRT_FULL"))  # as often as docs/demo.md says


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_it_opens_with_the_example_drawn_in_three_rows(demo: Any, visit: Any) -> None:
    page = visit()
    seg = demo.few.bundle.manifest.conditions["seg"]
    given = np.asarray(Image.open(demo.few.bundle.file(seg["image"])).convert("RGB"))
    drawn = demo.few(seg["prompt"], Control("seg", given), seed=seg["seed"]).images
    assert (page.pictures() == drawn).all()
    assert (page.canvas() == given).all()
    assert (page.row("Condition") == given[None]).all()
    assert (page.row("Image") == drawn).all()
    extracted = demo.few.extract("seg", drawn[0])
    assert (page.row("Extracted") == extracted[None]).all()
    score = demo.few.score("seg", given, drawn[0])
    assert f"{score} · {score.grade}" in page.page.locator("#rows").text_content()
    assert f"{score}" in page.page.locator("#caption").text_content()
    assert "unet" in page.page.locator("#stages").text_content()
    assert {url.split("/")[2] for url in page.hosts if not url.startswith("blob:")} == {f"127.0.0.1:{demo.port}"}


def test_settings_reach_the_picture(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#model").select_option("miniature")
    assert not tool.locator("#live").is_checked()
    tool.locator("#prompt").fill("a red house in a green meadow")
    tool.locator("#added").fill("at noon")
    tool.locator("#negative").fill("trees")
    tool.locator("#counts label").nth(2).click()
    tool.locator("#steps").fill("7")
    tool.locator("#guidance").fill("2.5")
    tool.locator("#scheduler").select_option("ddim")
    tool.locator("#seed").fill("18446744073709551610")  # JavaScript's numbers end before
    tool.locator("#strength summary").click()
    tool.locator("#scale").fill("0.8")
    tool.locator("#start").fill("0.1")
    tool.locator("#end").fill("0.9")
    page.generate()
    control = Control("seg", page.canvas(), 0.8, 0.1, 0.9)
    drawn = demo.many(
        "a red house in a green meadow, at noon",
        control,
        negative_prompt="trees",
        num_images_per_prompt=3,
        num_inference_steps=7,
        guidance_scale=2.5,
        scheduler="ddim",
        seed=18446744073709551610,
    ).images
    assert (page.pictures() == drawn).all()
    assert page.row("Extracted").shape == drawn.shape
    assert "seed 18446744073709551612" in tool.locator("#rows").text_content()


def test_several_conditions_and_a_photo(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#strength summary").click()
    tool.locator("#pinned").check()
    page.settled()
    tool.locator("#tab-depth").click()
    photo = demo.many("a blue house", seed=3).images[0]
    tool.locator('input[name="source"][value="photo"]').check(force=True)
    assert tool.locator("#error").is_hidden()
    tool.locator("#generate").click()
    assert "Depth has no image" in page.error()
    page.after(lambda: tool.locator("#file").set_input_files({"name": "a.png", "mimeType": "x", "buffer": png(photo)}))
    depth = demo.few.extract("depth", photo)
    controls = [Control("seg", page.canvas()), Control("depth", depth)]
    seg = demo.few.bundle.manifest.conditions["seg"]
    assert (page.pictures() == demo.few(seg["prompt"], controls, seed=seg["seed"]).images).all()
    assert (page.row("Condition")[1] == depth).all()


def test_a_stroke_changes_labels_and_picture(demo: Any, visit: Any) -> None:
    page = visit()
    before, labels = page.pictures(), page.labels()
    page.brush("water")
    page.after(lambda: page.stroke((0.1, 0.8), (0.5, 0.85), (0.9, 0.7)))
    after = page.labels()
    assert set(np.unique(after[after != labels])) == {LABELS["water"]}
    assert (page.canvas() == colors_from_labels(after)).all()
    assert (page.row("Condition")[0] == page.canvas()).all()
    assert (page.pictures() != before).any()
    seg = demo.few.bundle.manifest.conditions["seg"]
    drawn = demo.few(seg["prompt"], Control("seg", page.canvas()), seed=seg["seed"]).images
    assert (page.pictures() == drawn).all()
    page.after(lambda: page.page.locator("#undo").click())
    assert (page.labels() == labels).all()
    assert (page.pictures() == before).all()


def test_random_drawings_hold_no_color_outside_the_palette(visit: Any) -> None:
    page = visit()
    page.page.locator("#live").uncheck()
    rng = np.random.default_rng(7)
    names = list(LABELS)
    allowed = {tuple(PALETTE[label]) for label in LABELS.values()}
    for i in range(200 if FULL else 25):
        page.brush(names[rng.integers(len(names))])
        page.page.locator("#width").evaluate("(e, v) => { e.value = v; e.oninput(); }", int(rng.integers(1, 41)))
        if i % 5 == 4:
            page.page.locator("#fill").click()
        page.stroke(*rng.uniform(-0.1, 1.1, (3, 2)).clip(0.001, 0.999).tolist(), steps=int(rng.integers(1, 8)))
        if i % 5 == 4:
            page.page.locator("#fill").click()
        canvas = page.canvas()
        assert {tuple(color) for color in np.unique(canvas.reshape(-1, 3), axis=0)} <= allowed
        assert (canvas == colors_from_labels(page.labels())).all()


def test_fast_strokes_leave_no_stale_picture(demo: Any, visit: Any) -> None:
    page = visit()
    strokes, began = 100 if FULL else 30, time.monotonic()
    page.page.locator("#canvas").scroll_into_view_if_needed()
    box = page.page.locator("#canvas").bounding_box()
    for i in range(strokes):
        page.page.evaluate("(label) => { painting.brush = label; }", list(LABELS.values())[i % len(LABELS)])
        page.stroke_in(box, (0.1, i / strokes), (0.9, 1 - i / strokes), steps=2)
        time.sleep(max(0.0, began + (i + 1) / 10 - time.monotonic()))
    assert not FULL or time.monotonic() - began < 11
    page.settled()
    assert (page.row("Condition")[0] == colors_from_labels(page.labels())).all()
    seg = demo.few.bundle.manifest.conditions["seg"]
    drawn = demo.few(seg["prompt"], Control("seg", page.canvas()), seed=seg["seed"]).images
    assert (page.pictures() == drawn).all()
    assert demo.service.idle


def test_dice_change_the_seed_and_the_same_seed_the_picture_back(visit: Any) -> None:
    page = visit()
    before, seed = page.pictures(), page.page.locator("#seed").input_value()
    page.after(lambda: page.page.locator("#dice").click())
    assert page.page.locator("#seed").input_value() != seed
    assert (page.pictures() != before).any()
    page.after(lambda: page.page.locator("#seed").fill(seed))
    assert (page.pictures() == before).all()


def test_stop_ends_it_and_the_next_one_is_drawn(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    before = page.pictures()
    tool.locator("#model").select_option("miniature")
    tool.locator("#steps").fill("120")
    tool.locator("#counts label").nth(3).click()
    tool.locator("#generate").click()
    tool.wait_for_selector("#preview:not([hidden])")  # what it looks like on the way
    assert "of 120" in tool.locator("#status").text_content()
    tool.locator("#stop").click()
    tool.wait_for_selector("#stop[disabled]")
    assert tool.locator("#status").text_content() == "stopped"
    end = time.monotonic() + 10
    while not demo.service.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert demo.service.idle
    assert (page.pictures() == before).all()
    tool.locator("#steps").fill("3")
    page.generate()
    assert len(page.pictures()) == 4


def test_a_saved_picture_dropped_back_restores_its_settings(visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#model").select_option("miniature")
    page.brush("house")
    page.stroke((0.2, 0.5), (0.4, 0.6))
    tool.locator("#prompt").fill("a yellow house, in the desert")
    tool.locator("#negative").fill("water")
    tool.locator("#counts label").nth(1).click()
    tool.locator("#steps").fill("5")
    tool.locator("#seed").fill("77")
    tool.locator("#strength summary").click()
    tool.locator("#scale").fill("0.75")
    page.generate()
    saved, labels = [page.save(0), page.save(1)], page.labels()
    other = visit()
    for number in range(100 if FULL else 2):
        other.drop(saved[number % 2])
        other.page.wait_for_selector("body[data-restored]")
        assert other.page.locator("#model").input_value() == "miniature"
        assert other.page.locator("#prompt").input_value() == "a yellow house, in the desert"
        assert other.page.locator("#steps").input_value() == "5"
        assert (other.labels() == labels).all()
        other.generate()
        assert [other.save(0), other.save(1)] == saved
        other.page.evaluate("delete document.body.dataset.restored")
        other.page.locator("#prompt").fill("something else")
        other.page.locator("#clear").click()


def test_errors_are_shown_at_the_picture_and_at_the_field(visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#live").uncheck()
    tool.locator("#scheduler").select_option("unipc")
    for field, value, words in (
        ("steps", "0", "Steps must be"),
        ("steps", "121", "at most 120"),
        ("seed", "x", "Seed"),
    ):
        before = tool.locator(f"#{field}").input_value()
        tool.locator(f"#{field}").fill(value)
        tool.locator("#generate").click()
        assert words in page.error()
        assert tool.locator(f"#{field}").get_attribute("aria-invalid") == "true"
        described = tool.locator(f"#{field}").get_attribute("aria-describedby")
        assert words in tool.locator(f"#{described}").text_content()
        tool.locator(f"#{field}").fill(before)
        page.generate()
        assert tool.locator("#error").is_hidden()
    page.drop(b"no image at all", "text.png")
    assert "cannot" in page.error() or "not" in page.error()
    page.generate()


def test_two_visitors_at_once_get_their_own_pictures(demo: Any, visit: Any) -> None:
    pages = [visit(), visit()]
    seg = demo.few.bundle.manifest.conditions["seg"]
    for page in pages:
        page.page.locator("#live").uncheck()
    for number in range(20 if FULL else 4):
        before = [page.asked for page in pages]
        for i, page in enumerate(pages):
            page.page.locator("#seed").fill(str(100 * i + number))
            page.page.locator("#steps").fill(str(2 + (number + i) % 4))
            page.page.locator("#counts label").nth((number * (i + 1)) % 3).click()
            page.page.locator("#generate").click()
        for i, page in enumerate(pages):
            page.settled(at_least=before[i] + 1)
            fields = {"num_inference_steps": 2 + (number + i) % 4, "num_images_per_prompt": 1 + (number * (i + 1)) % 3}
            drawn = demo.few(seg["prompt"], Control("seg", page.canvas()), seed=100 * i + number, **fields).images
            assert (page.pictures() == drawn).all()


def test_a_browser_asks_for_the_token_as_a_password(chromium: Any, protected: str) -> None:
    for password, opens in (("secret", True), ("wrong", False)):
        context = chromium.new_context(http_credentials={"username": "anybody", "password": password})
        page = context.new_page()
        page.goto(protected)
        if opens:
            page.wait_for_selector("body[data-shown]")
        else:
            assert "token is missing or wrong" in page.content()
        context.close()


def test_it_is_used_by_keys_alone(visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#canvas").focus()
    for key in ("4", "ArrowUp", "ArrowLeft"):
        tool.keyboard.press(key)
    before = page.labels()
    page.after(lambda: tool.keyboard.press(" "))
    after = page.labels()
    assert set(np.unique(after[after != before])) <= {list(LABELS.values())[3]}
    assert (after != before).any()
    page.after(lambda: tool.keyboard.press("Control+z"))
    assert (page.labels() == before).all()
    tool.locator("#tab-seg").focus()
    tool.keyboard.press("ArrowRight")
    assert tool.evaluate("document.activeElement.id") == "tab-canny"
    assert tool.locator("#tab-canny").get_attribute("aria-selected") == "true"
    assert tool.locator("#brushes").is_hidden()


def test_every_control_has_a_name_and_nothing_is_wider_than_a_phone(visit: Any) -> None:
    page = visit(390, 844)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 390
    unnamed = page.page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, canvas')].filter((e) => "
        "!(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert not unnamed
    assert not page.page.evaluate("[...document.images].filter((e) => !e.hasAttribute('alt')).length")
