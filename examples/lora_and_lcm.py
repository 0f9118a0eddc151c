"""Draws in four steps without guidance, by a LoRA that was fused into the model when it was exported.

    cnpp-trt export --model miniature-lcm --cond seg
    python examples/lora_and_lcm.py [BUNDLE] [OUT]

`miniature-lcm` is the miniature with its own few-step LoRA, as `sd15-lcm` is Stable Diffusion 1.5 with the published
one; any other LoRA is fused by `cnpp-trt export --lora FILE:0.8`. BUNDLE is the folder of a bundle with the condition
`seg`; by default the one that the command above made.
"""

import argparse
from pathlib import Path

from cnpp_trt import Bundle, Control, Pipeline


def main() -> None:
    """Reads the arguments, draws two pictures at once, writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path("example-pictures/lora_and_lcm"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle) if arguments.bundle else Bundle.find("miniature-lcm")

    example = bundle.manifest.conditions["seg"]
    control = Control("seg", bundle.file(example.get("image", "")))
    with Pipeline.open(bundle, "onnxruntime-cpu") as pipeline:
        # The LoRA brought its scheduler, number of steps and guidance along: nothing of them is set here.
        result = pipeline(example.get("prompt", ""), control, seed=example.get("seed"), num_images_per_prompt=2)
        scores = [pipeline.score("seg", control.image, image) for image in result.images]
        written = result.save(arguments.out)
    used = result.request
    print(f"{used.scheduler}, {used.num_inference_steps} steps, guidance {used.guidance_scale:g}")
    for path, score in zip(written.images, scores, strict=True):
        print(f"{path}: {score}, {score.grade}")


if __name__ == "__main__":
    main()
