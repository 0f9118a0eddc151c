"""The brushes: which classes of ADE20K a segmentation is painted with."""

from typing import TYPE_CHECKING

from ..conditions import ADE20K_PALETTE
from ..miniature import EMBEDDED
from ..miniature.scenes import LABELS
from ..runtime.control.palette import UNLABELED

if TYPE_CHECKING:
    from ..service.models import ServedModel

_COMMON = {
    "sky": 2, "tree": 4, "grass": 9, "mountain": 16, "water": 21, "sea": 26, "river": 60, "earth": 13, "sand": 46,
    "rock": 34, "field": 29, "hill": 68, "plant": 17, "flower": 66, "road": 6, "sidewalk": 11, "path": 52,
    "bridge": 61, "building": 1, "house": 25, "fence": 32, "person": 12, "car": 20, "wall": 0, "floor": 3,
    "ceiling": 5, "window": 8, "door": 14, "bed": 7, "table": 15, "chair": 19, "sofa": 23, "lamp": 36,
}  # fmt: skip
"""Those of ADE20K's 150 that pictures are mostly made of."""


def brushes_of(model: "ServedModel") -> list[dict[str, object]]:
    """Name, label and color of each brush; none where the model has no segmentation in ADE20K's colors."""
    conditions = model.bundle.manifest.conditions
    if "seg" not in conditions or "palette" in conditions["seg"]:
        return []
    if model.bundle.manifest.model in EMBEDDED:
        return [_brush(name, label) for name, label in LABELS.items()]
    found = [_brush(name, label) for name, label in _COMMON.items()]
    return [*found, {"name": "nothing", "label": UNLABELED, "color": [0, 0, 0]}]


def _brush(name: str, label: int) -> dict[str, object]:
    return {"name": name, "label": label, "color": list(ADE20K_PALETTE[label])}
