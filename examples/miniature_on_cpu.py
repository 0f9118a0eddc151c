"""Draws the embedded miniature's own example on a CPU and prints how well the picture follows its control image.

    cnpp-trt export --model miniature --cond seg
    python examples/miniature_on_cpu.py [BUNDLE] [OUT]

BUNDLE is the folder of a bundle with the condition `seg`; by default the one that the command above made.
"""

import argparse
from pathlib import Path

from cnpp_trt import Bundle, Control, Pipeline


def main() -> None:
    """Reads the arguments, draws, writes the picture and its sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/miniature_on_cpu"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature")

    example = bundle.manifest.conditions["seg"]  # the model ships a control image, a prompt and a seed
    control = Control("seg", bundle.file(example.get("image", "")))
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        result = pipeline(example.get("prompt", ""), control, seed=example.get("seed"))
        score = pipeline.score("seg", control.image, result.images[0])
        written = result.save(arguments.out)  # image-0.png, and sheet.png with the condition beside the image
    print(f"{written.images[0]}: {score}, which is {score.grade} for this model")


if __name__ == "__main__":
    main()
