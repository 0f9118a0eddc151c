"""Runs several requests together that differ in their prompts, seeds and scales.

    cnpp-trt export --model miniature --cond seg
    python examples/batch_of_requests.py [BUNDLE] [OUT]

BUNDLE is the folder of a bundle with the condition `seg`; by default the one that the command above made.
"""

import argparse
from pathlib import Path

from cnpp_trt import Bundle, Control, Pipeline, Request

SCENE = "a white house and oak trees in a golden field by a road, snowy mountains"
TIMES = ("at dawn", "at noon", "at dusk", "at night")


def main() -> None:
    """Reads the arguments, draws a picture for each time of day, writes each to a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/batch_of_requests"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature")

    control = Control("seg", bundle.file(bundle.manifest.conditions["seg"].get("image", "")))
    requests = [
        Request(f"{SCENE}, {time}", controls=control, seed=seed, guidance_scale=2 + seed / 2)
        for seed, time in enumerate(TIMES)
    ]
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        # Requests of one structure (steps, scheduler, conditions, use of guidance) share their launches.
        results = pipeline.batch(requests, on_progress=lambda done, total: print(f"\rstep {done} of {total}", end=""))
        print()
        for result in results:
            score = pipeline.score("seg", control.image, result.images[0])
            written = result.save(arguments.out / result.request.prompt.rpartition(" ")[2])
            print(f"{written.images[0]}: {score}")


if __name__ == "__main__":
    main()
