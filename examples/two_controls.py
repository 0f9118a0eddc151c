"""Draws one picture with two control images: a segmentation map, and the depth of a picture that was drawn before.

    cnpp-trt export --model miniature --cond seg --cond depth
    python examples/two_controls.py [BUNDLE] [OUT]

BUNDLE is the folder of a bundle with the conditions `seg` and `depth`; by default the one that the command above made.
"""

import argparse
from pathlib import Path

from cnpp_trt import Bundle, Control, Pipeline, Request


def main() -> None:
    """Reads the arguments, draws, writes the picture and prints the score of each condition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/two_controls"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature")

    example = bundle.manifest.conditions["seg"]
    labels = Control("seg", bundle.file(example.get("image", "")))
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        before = pipeline(example.get("prompt", ""), labels, seed=example.get("seed"))
        # An extractor of the bundle reads the depth of any photo, here of the picture.
        depth = Control("depth", pipeline.extract("depth", before.images[0]), control_guidance_end=0.8)
        prompt = "a red house and autumn trees in a golden field by a road, snowy mountains, at noon"
        request = Request(prompt, controls=[labels, depth], seed=5)
        result = pipeline(request)
        written = result.save(arguments.out)
        for control in (labels, depth):
            score = pipeline.score(control.condition, control.image, result.images[0])
            print(f"{written.images[0]}: {control.condition}: {score}, {score.grade}")


if __name__ == "__main__":
    main()
