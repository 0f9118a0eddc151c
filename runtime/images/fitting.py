"""Pictures of another shape than the model's, as users know the choices: stretch, crop, pad."""

from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image, ImageOps

from .image_files import Pixels, resize

ResizeMode: TypeAlias = Literal["stretch", "crop", "pad"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
"""AUTOMATIC1111's `just resize`, `crop and resize`, `resize and fill`."""

_METHODS = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}
# Below this ratio of aspect ratios, what is squeezed cannot be seen: sides rounded to 8 pixels stay within it.
_NOTICEABLE = 1.03


def fit(
    pixels: Pixels,
    width: int,
    height: int,
    mode: ResizeMode,
    resample: Literal["nearest", "lanczos"],
    *,
    fill: Literal["black", "edge"] = "black",
) -> Pixels:
    """Brings uint8 [H,W,3] to [height,width,3].

    Args:
        mode: `stretch` resizes each side on its own; `crop` keeps the middle, as Pillow's `ImageOps.fit`; `pad` keeps
            all of the picture and fills two borders, as Pillow's `ImageOps.pad`.
        fill: with `pad`: `black` for control images, where black says "nothing here"; `edge` repeats the outermost
            pixels, so that no edge is found in a photo where it ends.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    method = _METHODS[resample]
    if mode == "crop":
        return np.array(ImageOps.fit(Image.fromarray(pixels), (width, height), method))
    if mode == "pad":
        whole = np.array(ImageOps.contain(Image.fromarray(pixels), (width, height), method))
        rows, columns = height - whole.shape[0], width - whole.shape[1]
        # As ImageOps.pad places it.
        top, left = round(rows * 0.5), round(columns * 0.5)
        borders = ((top, rows - top), (left, columns - left), (0, 0))
        return np.pad(whole, borders, mode="edge") if fill == "edge" else np.pad(whole, borders)
    return resize(pixels, width, height, resample)


def to_size(
    pixels: Pixels, what: str, width: int, height: int, resample: Literal["nearest", "lanczos"]
) -> tuple[Pixels, list[str]]:
    """The image at this size, resized as diffusers does it where it has another, and a note on that."""
    if pixels.shape[:2] == (height, width):
        return pixels, []
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    return resize(pixels, width, height, resample), [f"{what} was resized from {size} to {width}x{height} ({resample})"]


def aspect_note(what: str, pixels: Pixels, width: int, height: int) -> str | None:
    """A note where stretching `pixels` to this size changes its proportions by more than a few percent."""
    before, after = pixels.shape[1] / pixels.shape[0], width / height
    ratio = before / after
    if 1 / _NOTICEABLE <= ratio <= _NOTICEABLE:
        return None
    how = "narrower" if ratio > 1 else "flatter"
    return (
        f"{what} is {pixels.shape[1]}x{pixels.shape[0]}, squeezed to {width}x{height}: things come out "
        f"{max(ratio, 1 / ratio):.2f} times {how}; --resize-mode crop or pad keeps their shape"
    )
