"""Draws a control image with NumPy, then a picture of it with each of two schedulers.

    cnpp-trt export --model miniature --cond seg
    python examples/own_condition_and_scheduler.py [BUNDLE] [OUT]

BUNDLE is the folder of a bundle with the condition `seg`; by default the one that the command above made.
"""

import argparse
from pathlib import Path

import numpy as np
from cnpp_trt import Bundle, Control, Pipeline
from PIL import Image

# A segmentation map has ADE20K's colors, one for each class.
SKY, MOUNTAIN, GRASS, HOUSE, TREE = (6, 230, 230), (143, 255, 140), (4, 250, 7), (255, 9, 224), (4, 200, 3)
# The name here, and the scheduler of diffusers that gives the same picture.
SCHEDULERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
PROMPT = "a red house and an oak tree in a green meadow, snowy mountains, at noon"


def draw_map(size: int = 128) -> np.ndarray:
    """A house and a tree in a meadow before mountains: uint8 [size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    labels = np.empty((size, size, 3), np.uint8)
    labels[:] = SKY
    labels[y > 0.42 - 0.06 * np.sin(12 * x)] = MOUNTAIN
    labels[y > 0.55] = GRASS
    labels[(x > 0.15) & (x < 0.47) & (y > 0.62) & (y < 0.78)] = HOUSE
    labels[(y > 0.52) & (y < 0.62) & (np.abs(x - 0.31) < 0.08 + y - 0.52)] = HOUSE  # its roof
    labels[np.hypot(x - 0.75, y - 0.6) < 0.1] = TREE
    labels[(np.abs(x - 0.75) < 0.015) & (y > 0.6) & (y < 0.8)] = TREE  # its trunk
    return labels


def main() -> None:
    """Reads the arguments, draws the map and the pictures, writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/own_condition_and_scheduler"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature")

    control = Control("seg", draw_map())
    arguments.out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(control.pixels).save(arguments.out / "map.png")
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        for name, in_diffusers in SCHEDULERS.items():
            result = pipeline(PROMPT, control, scheduler=name, seed=3)
            score = pipeline.score("seg", control.pixels, result.images[0])
            written = result.save(arguments.out / name)
            print(f"{written.images[0]}: {name}, in diffusers {in_diffusers}: {score}, {score.grade}")


if __name__ == "__main__":
    main()
