"""What does not look like a control image: photos of scikit-image on one side, real control images on the other."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from cnpp_trt.conditions import CONDITIONS
from cnpp_trt.miniature import MODEL_FOLDER as MINIATURE
from cnpp_trt.runtime.control.palette import palette_distance
from cnpp_trt.runtime.control.plausibility import control_image_note
from cnpp_trt.runtime.images.image_files import ImageFile, read_image
from PIL import Image

PHOTOS = Path(skimage.__file__).parent / "data"
COLOR = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "ihc.png")
GRAY = ("brick.png", "coins.png", "grass.png", "gravel.png", "moon.png", "cell.png")


def as_file(pixels: np.ndarray, kind: str = "PNG", lossy: bool = False) -> ImageFile:
    return ImageFile(np.ascontiguousarray(pixels), kind, Path("x.png"), lossy)


def encoded(path: Path, picture: Image.Image, kind: str, **options: Any) -> ImageFile:
    picture.save(path, kind, **options)
    return read_image(path)


@pytest.mark.parametrize("photo", [p for p in COLOR if (PHOTOS / p).is_file()])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_photo_is_noticed(photo: str, condition: str) -> None:
    found = control_image_note(condition, read_image(PHOTOS / photo))
    assert found and "--extract" in found and photo in found
    assert "--extract" not in str(control_image_note(condition, read_image(PHOTOS / photo), extractable=False))


@pytest.mark.parametrize("photo", [p for p in GRAY if (PHOTOS / p).is_file()])
@pytest.mark.parametrize("condition", ["seg", "canny", "lineart", "hed"])
def test_a_gray_photo_is_noticed_where_that_can_be(photo: str, condition: str) -> None:
    assert "--extract" in str(control_image_note(condition, read_image(PHOTOS / photo)))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_miniatures_control_images_are_not(condition: str, tmp_path: Path) -> None:
    example = MINIATURE / "examples" / f"{condition}.png"
    assert control_image_note(condition, read_image(example)) is None
    from cnpp_trt.developer.miniature.data import Conditions, make_scenes

    scenes = make_scenes(range(1_000_000, 1_000_020))
    for image in (Conditions()(condition, scenes, slice(None)) * 255).round().byte().permute(0, 2, 3, 1).numpy():
        assert control_image_note(condition, as_file(image)) is None
    if condition != "seg":  # compression and resampling change no gray picture's kind
        with Image.open(example) as picture:
            big = picture.convert("RGB").resize((400, 300), Image.Resampling.LANCZOS)
        assert control_image_note(condition, encoded(tmp_path / "x.jpg", big, "JPEG", quality=60)) is None


@pytest.mark.parametrize("condition", ["canny", "seg", "depth"])
@pytest.mark.parametrize("photo", ["astronaut.png", "coffee.png", "camera.png", "motorcycle_left.png"])
def test_what_is_extracted_from_photos_is_not(miniature: Any, condition: str, photo: str) -> None:
    if not (PHOTOS / photo).is_file():
        pytest.skip("this scikit-image has no such photo")
    extracted = miniature.pipeline.extract(
        condition if condition != "canny" else "seg", read_image(PHOTOS / photo).pixels
    )
    if condition == "canny":
        from cnpp_trt.runtime.control.canny import canny

        extracted = np.repeat(canny(read_image(PHOTOS / photo).pixels)[..., None], 3, 2)
    assert control_image_note(condition, as_file(extracted)) is None


def test_a_true_depth_map_is_not() -> None:
    disparity = next(iter(np.load(PHOTOS / "motorcycle_disp.npz").values()))
    depth = np.nan_to_num(disparity, posinf=0)
    gray = (depth / depth.max() * 255).astype(np.uint8)
    assert control_image_note("depth", as_file(np.repeat(gray[..., None], 3, 2))) is None


@pytest.mark.parametrize("condition", ["canny", "lineart", "hed"])
def test_lines_the_other_way_round(condition: str) -> None:
    inverted = 255 - read_image(MINIATURE / "examples" / f"{condition}.png").pixels
    assert "invert it" in str(control_image_note(condition, as_file(inverted)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 30}), ("JPEG", {"quality": 95}), ("WEBP", {"quality": 80}), ("AVIF", {"quality": 60})],
)
def test_a_compressed_label_map_is_told_from_a_photo(tmp_path: Path, kind: str, options: dict[str, int]) -> None:
    with Image.open(MINIATURE / "examples" / "seg.png") as picture:
        found = control_image_note("seg", encoded(tmp_path / "map", picture.convert("RGB"), kind, **options))
        blended = picture.convert("RGB").resize((200, 200), Image.Resampling.LANCZOS)
    assert found and f"is a {kind}: its compression" in found and "PNG" in found and "--extract" not in found
    assert "nearest" in str(control_image_note("seg", as_file(np.asarray(blended))))
    # A JPEG photo is a photo first.
    coffee = Image.open(PHOTOS / "coffee.png").convert("RGB")
    found = control_image_note("seg", encoded(tmp_path / "photo", coffee, kind, **options))
    assert found and "--extract" in found and "compression" not in found


def test_another_palette_is_not_judged() -> None:
    assert control_image_note("seg", as_file(np.full((32, 32, 3), 201, np.uint8)), ade20k=False) is None


def test_distance_to_the_palette() -> None:
    """Against every color of it, one by one."""
    from cnpp_trt.conditions import ADE20K_PALETTE

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    pixels[0, 0], pixels[0, 1] = ADE20K_PALETTE[3], (0, 0, 0)
    colors = np.array([*ADE20K_PALETTE, (0, 0, 0)], float)
    expected = [[min(np.linalg.norm(colors - pixel, axis=1)) for pixel in row] for row in pixels.astype(float)]
    np.testing.assert_allclose(palette_distance(pixels), expected)
    assert palette_distance(pixels)[0, 0] == palette_distance(pixels)[0, 1] == 0


def test_formats_are_known_from_the_bytes(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (120, 120, 120)).save(buffer, "WEBP", lossless=True)
    (tmp_path / "x.webp").write_bytes(buffer.getvalue())
    assert control_image_note("seg", read_image(tmp_path / "x.webp")) is None
