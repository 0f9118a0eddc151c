"""photo → control image, by the bundle's extractor graph (canny: by the algorithm)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundles.bundle import Bundle
from ...conditions import CONDITIONS
from ...errors import UserError
from ..backends.interface import Backend, aligned


def extract(bundle: Bundle, backend: Backend, condition: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The control image uint8 [H,W,3] of `image` uint8 [*,*,3], at the bundle's size.

    An image of another size is brought to the bundle's first, as the official demo's `resize_image` does it: by OpenCV,
    Lanczos where it grows and area where it shrinks. The demo keeps the aspect ratio up to multiples of 64 pixels; a
    bundle has one size, so an image of another shape is distorted here.

    Raises:
        UserError: the bundle has no extractor for the condition.
    """
    m = bundle.manifest
    image = fit_photo(image, m.width, m.height)
    if not CONDITIONS[condition].extractor_graph:
        from .canny import canny

        return _gray(canny(image))
    graph = f"extractor_{condition}"
    if graph not in m.graphs:
        raise UserError(
            f"the bundle {bundle.folder} has no extractor for {condition!r}: "
            "give the control image itself, without --extract"
        )
    pixels = m.height * m.width
    nbytes = aligned(3 * pixels) + aligned(pixels)
    backend.reserve([graph], nbytes)
    allocate = backend.arena(nbytes)
    source = allocate((1, m.height, m.width, 3), "uint8")
    found = allocate((1, m.height, m.width), "uint8")
    launch = backend.load(graph).bind({"image": source, "map": found})
    backend.upload(source, image[None])
    launch()
    values = backend.download(found)[0]
    if condition == "seg":
        from .palette import colors_from_labels

        return colors_from_labels(values)
    return _gray(values)


def can_extract(bundle: Bundle, condition: str) -> bool:
    """Whether `extract` works for this condition."""
    return not CONDITIONS[condition].extractor_graph or f"extractor_{condition}" in bundle.manifest.graphs


def fit_photo(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """A photo uint8 [*,*,3] as `extract` brings it to the bundle's size, [height,width,3]."""
    if image.shape[:2] == (height, width):
        return image
    import cv2

    grows = max(width, height) > max(image.shape[:2])
    method = cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8)


def _gray(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.repeat(values[:, :, None], 3, axis=2)
