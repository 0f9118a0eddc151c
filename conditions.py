"""The one table of conditions: what each is called, how it is scored, where its ControlNet++ weights are.

Nothing here needs more than the standard library, so every room may import it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Condition:
    """One kind of control image.

    Attributes:
        name: what users type, and the suffix of the condition's graphs.
        title: for people.
        metric: consistency metric of the ControlNet++ paper (arXiv 2404.07987, section 4.1).
        higher_is_better: direction of the metric.
        resample: how a control image of another size is brought to the bundle's: as diffusers' `VaeImageProcessor`
            does by default (Lanczos), or `nearest` where blending two colors would invent a third class.
        extractor_graph: whether the condition is extracted by a graph of the bundle; canny is an algorithm instead.
        checkpoint: subfolder of the hub repository `limingcv/reward_controlnet` that holds the ControlNet++ weights.
    """

    name: str
    title: str
    metric: Literal["mIoU", "F1", "SSIM", "RMSE"]
    higher_is_better: bool
    resample: Literal["nearest", "lanczos"]
    extractor_graph: bool
    checkpoint: str


CONDITIONS: dict[str, Condition] = {
    c.name: c
    for c in (
        Condition(
            "seg",
            "segmentation",
            "mIoU",
            True,
            "nearest",
            True,
            "checkpoints/ade20k_reward-model-UperNet-R50/checkpoint-5000/controlnet",
        ),
        Condition("canny", "canny edges", "F1", True, "lanczos", False, "checkpoints/canny"),
        Condition("hed", "soft edges", "SSIM", True, "lanczos", True, "checkpoints/hed"),
        Condition("lineart", "line art", "SSIM", True, "lanczos", True, "checkpoints/lineart"),
        Condition("depth", "depth", "RMSE", False, "lanczos", True, "checkpoints/depth"),
    )
}

REWARD_CONTROLNET_REPOSITORY = "limingcv/reward_controlnet"

# ADE20K's colors by label, 0 = wall … 149 = flag, as transformers' UPerNet examples and the official ControlNet++
# demo paint them. Labels 6 (road) and 48 (skyscraper) share one color: read back, it counts as road.
# fmt: off
ADE20K_PALETTE: tuple[tuple[int, int, int], ...] = (
    (120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50), (4, 200, 3), (120, 120, 80),
    (140, 140, 140), (204, 5, 255), (230, 230, 230), (4, 250, 7), (224, 5, 255), (235, 255, 7),
    (150, 5, 61), (120, 120, 70), (8, 255, 51), (255, 6, 82), (143, 255, 140), (204, 255, 4),
    (255, 51, 7), (204, 70, 3), (0, 102, 200), (61, 230, 250), (255, 6, 51), (11, 102, 255),
    (255, 7, 71), (255, 9, 224), (9, 7, 230), (220, 220, 220), (255, 9, 92), (112, 9, 255),
    (8, 255, 214), (7, 255, 224), (255, 184, 6), (10, 255, 71), (255, 41, 10), (7, 255, 255),
    (224, 255, 8), (102, 8, 255), (255, 61, 6), (255, 194, 7), (255, 122, 8), (0, 255, 20),
    (255, 8, 41), (255, 5, 153), (6, 51, 255), (235, 12, 255), (160, 150, 20), (0, 163, 255),
    (140, 140, 140), (250, 10, 15), (20, 255, 0), (31, 255, 0), (255, 31, 0), (255, 224, 0),
    (153, 255, 0), (0, 0, 255), (255, 71, 0), (0, 235, 255), (0, 173, 255), (31, 0, 255),
    (11, 200, 200), (255, 82, 0), (0, 255, 245), (0, 61, 255), (0, 255, 112), (0, 255, 133),
    (255, 0, 0), (255, 163, 0), (255, 102, 0), (194, 255, 0), (0, 143, 255), (51, 255, 0),
    (0, 82, 255), (0, 255, 41), (0, 255, 173), (10, 0, 255), (173, 255, 0), (0, 255, 153),
    (255, 92, 0), (255, 0, 255), (255, 0, 245), (255, 0, 102), (255, 173, 0), (255, 0, 20),
    (255, 184, 184), (0, 31, 255), (0, 255, 61), (0, 71, 255), (255, 0, 204), (0, 255, 194),
    (0, 255, 82), (0, 10, 255), (0, 112, 255), (51, 0, 255), (0, 194, 255), (0, 122, 255),
    (0, 255, 163), (255, 153, 0), (0, 255, 10), (255, 112, 0), (143, 255, 0), (82, 0, 255),
    (163, 255, 0), (255, 235, 0), (8, 184, 170), (133, 0, 255), (0, 255, 92), (184, 0, 255),
    (255, 0, 31), (0, 184, 255), (0, 214, 255), (255, 0, 112), (92, 255, 0), (0, 224, 255),
    (112, 224, 255), (70, 184, 160), (163, 0, 255), (153, 0, 255), (71, 255, 0), (255, 0, 163),
    (255, 204, 0), (255, 0, 143), (0, 255, 235), (133, 255, 0), (255, 0, 235), (245, 0, 255),
    (255, 0, 122), (255, 245, 0), (10, 190, 212), (214, 255, 0), (0, 204, 255), (20, 0, 255),
    (255, 255, 0), (0, 153, 255), (0, 41, 255), (0, 255, 204), (41, 0, 255), (41, 255, 0),
    (173, 0, 255), (0, 245, 255), (71, 0, 255), (122, 0, 255), (0, 255, 184), (0, 92, 255),
    (184, 255, 0), (0, 133, 255), (255, 214, 0), (25, 194, 194), (102, 255, 0), (92, 0, 255),
)
# fmt: on
