"""The page in headless Chromium: photos of the camera, images to begin with, and two models beside each other."""

import io
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control
from PIL import Image

pytestmark = pytest.mark.slow


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_photo_of_the_camera_gives_the_condition(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    tool.locator("#tab-depth").click()
    tool.locator("#camera").click()
    page.after(lambda: tool.locator("#camera-view button", has_text="Take").click())
    assert tool.locator('input[name="source"][value="photo"]').is_checked()
    taken = bytes(tool.evaluate("Array.from(demoState.tabs.depth.image)"))
    photo = np.asarray(Image.open(io.BytesIO(taken)).convert("RGB"))
    assert photo.std() > 1
    assert (page.row("Condition")[0] == demo.few.extract("depth", photo)).all()
    assert tool.evaluate("document.getElementById('camera-video').srcObject") is None  # the camera is off
    before = page.asked
    tool.locator("#camera").click()
    tool.locator("#camera-view button", has_text="Close").click()
    assert page.asked == before


def test_a_picture_begins_with_an_image_and_restores_it(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    begin = demo.many("a red barn", seed=8, num_inference_steps=5).images[0]
    file = {"name": "barn.png", "mimeType": "image/png", "buffer": png(begin)}
    page.after(lambda: tool.locator("#begin-file").set_input_files(file))
    page.after(lambda: tool.locator("#amount").fill("0.5"))
    seg = demo.few.bundle.manifest.conditions["seg"]
    control = Control("seg", page.canvas())
    drawn = demo.few(seg["prompt"], control, seed=seg["seed"], init_image=begin, strength=0.5).images
    assert (page.pictures() == drawn).all()
    saved = page.save()
    tool.locator("#amount").fill("2")
    assert "Strength" in page.error()
    tool.locator("#amount").fill("0.5")
    page.after(lambda: tool.locator("#begin-remove").click())
    assert (page.pictures() == demo.few(seg["prompt"], control, seed=seg["seed"]).images).all()
    other = visit()
    other.drop(saved)
    other.page.wait_for_selector("body[data-restored]")
    assert other.page.locator("#amount").input_value() == "0.5"
    other.generate()
    assert other.save() == saved
    page.after(lambda: tool.locator("#begin-drawn").click())
    assert tool.locator("#begin-name").text_content() == f"picture of seed {seg['seed']}"


def test_two_models_lie_over_each_other(demo: Any, visit: Any) -> None:
    page = visit()
    tool = page.page
    assert tool.locator("#split-line").is_hidden()
    page.after(lambda: tool.locator("#compare").select_option("miniature"))
    seg = demo.few.bundle.manifest.conditions["seg"]
    control = Control("seg", page.canvas())
    few, many = (p(seg["prompt"], control, seed=seg["seed"]).images[0] for p in (demo.few, demo.many))
    assert (page.pictures() == np.stack([few, many])).all()
    assert str(demo.many.score("seg", control.image, many)) in tool.locator("#split-right").text_content()
    for share in ("0", "100", "30"):
        tool.locator("#split").fill(share)
        clip = tool.locator("#images .other").evaluate("(e) => getComputedStyle(e).clipPath")
        assert f"{share}%" in clip or share == "0"
    box = tool.locator("#images").bounding_box()
    tool.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 20)
    tool.mouse.down()
    tool.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 20)
    tool.mouse.up()
    assert abs(int(tool.locator("#split").input_value()) - 75) <= 1
    page.after(lambda: tool.locator("#compare").select_option(""))
    assert tool.locator("#split-line").is_hidden()
    assert (page.pictures() == few[None]).all()
