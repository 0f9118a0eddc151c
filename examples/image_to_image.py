"""Changes a picture by a new prompt: image-to-image, with the same control image.

    cnpp-trt export --model miniature --cond seg
    python examples/image_to_image.py [BUNDLE] [OUT]

BUNDLE is the folder of a bundle with the condition `seg`; by default the one that the command above made.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from cnpp_trt import Bundle, Control, Pipeline, Request

SCENE = "a white house and oak trees in a golden field by a road, snowy mountains"


def main() -> None:
    """Reads the arguments, draws a picture and its variation, writes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/image_to_image"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature")

    control = Control("seg", bundle.file(bundle.manifest.conditions["seg"].get("image", "")))
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        first = pipeline(Request(f"{SCENE}, at noon", controls=control, seed=1))
        # `strength` is the share of the schedule that runs: 1 would ignore the first picture.
        changed = replace(first.request, prompt=f"{SCENE}, at night", seed=2)
        variation = pipeline(replace(changed, init_image=first.images[0], strength=0.7))
        for name, result in (("first", first), ("variation", variation)):
            written = result.save(arguments.out / name)
            print(f"{written.images[0]}: {result.request.prompt}")


if __name__ == "__main__":
    main()
