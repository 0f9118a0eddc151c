"""Whether a picture looks like a control image of its condition at all: the commonest mistake is to give a photo.

The limits lie between what real control images have (the miniature's of all five conditions, its extractors' of photos,
a true disparity map) and what photos have; tests/runtime/control/test_plausibility.py holds both sides.
"""

from dataclasses import dataclass

from ...conditions import CONDITIONS
from ..images.image_files import ImageFile, Pixels
from .palette import palette_distance

# Of 255 levels: a gray picture's channels differ by less even after JPEG.
_COLORFUL = 32
_DARK, _WHITE = 32, 223
# Lossy compression and resampling leave most pixels of a label map this near to their colors (Euclidean, in RGB).
_NEAR = 16
_SIDE = 512  # larger pictures are looked at every few pixels


@dataclass(frozen=True)
class _Shares:
    """Shares of the pixels, 0 to 1: colorful, nearly black, nearly white."""

    colorful: float
    dark: float
    white: float

    @property
    def middle(self) -> float:
        return 1 - self.dark - self.white


def control_image_note(condition: str, file: ImageFile, *, ade20k: bool = True, extractable: bool = True) -> str | None:
    """A note where the file does not look like a control image of the condition; None where it does.

    Args:
        ade20k: whether the model's label maps are painted in ADE20K's colors; others are not looked at.
        extractable: whether the model can extract the condition from a photo.
    """
    step = max(1, -(-max(file.pixels.shape[:2]) // _SIDE))
    pixels = file.pixels[::step, ::step]
    photo = f"is it a photo? {_what_to_do(condition, extractable)}"
    if condition == "seg":
        return _label_map_note(file, pixels, photo) if ade20k else None
    found, title = _shares(pixels), CONDITIONS[condition].title
    if found.colorful > 0.02:
        return f"{file.path} is in color, a control image of {title} is gray: {photo}"
    if condition == "depth":
        return None
    if found.white > 0.5:
        return f"{file.path} has dark lines on white, {title} here are white on black: invert it"
    # A photo has grays nearly everywhere. Canny's edges have none, line art few, soft edges many.
    no_lines = {
        "canny": found.middle > 0.4,
        "lineart": found.middle > 0.6 and found.dark < 0.35,
        "hed": found.middle > 0.7 and found.dark < 0.15,
    }
    return f"{file.path} shows no white lines on black, as {title} do: {photo}" if no_lines[condition] else None


def _label_map_note(file: ImageFile, pixels: Pixels, photo: str) -> str | None:
    distance = palette_distance(pixels)
    exact, near = float((distance == 0).mean()), float((distance <= _NEAR).mean())
    if near < 0.75:
        return f"only {near:.0%} of {file.path} is in ADE20K's colors, in which segmentation maps are painted: {photo}"
    if file.lossy:
        return (
            f"{file.path} is a {file.format}: its compression changed the segmentation colors of {1 - exact:.0%}; "
            "save it as PNG where it is made"
        )
    if exact < 0.99:
        return (
            f"{1 - exact:.0%} of {file.path} is in none of ADE20K's colors: it was resized with blending or compressed "
            "once; make it anew, resized with nearest"
        )
    return None


def _what_to_do(condition: str, extractable: bool) -> str:
    if extractable:
        return f"--extract finds its {CONDITIONS[condition].title} first"
    return f"give its {CONDITIONS[condition].title} instead: this model extracts none"


def _shares(pixels: Pixels) -> _Shares:
    spread = pixels.max(-1) - pixels.min(-1)
    gray = pixels.mean(-1)
    return _Shares(float((spread > _COLORFUL).mean()), float((gray < _DARK).mean()), float((gray > _WHITE).mean()))
