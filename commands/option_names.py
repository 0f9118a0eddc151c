"""Messages of the package in the words of the command line."""

import re

# Fields of the Python interface → the options that set them.
_OPTIONS = {
    "num_inference_steps": "--steps",
    "num_images_per_prompt": "--num-images",
    "guidance_scale": "--guidance-scale",
    "negative_prompt": "--negative-prompt",
    "controlnet_conditioning_scale": "--control-scale",
    "control_guidance_start": "--control-start",
    "control_guidance_end": "--control-end",
    "timestep_spacing": "--timestep-spacing",
    "guidance_start": "--guidance-start",
    "guidance_end": "--guidance-end",
    "guidance_interval": "--guidance-interval",
    "controlnet_interval": "--controlnet-interval",
    "cache_interval": "--cache-interval",
    "init_image": "--init-image",
    "clip_skip": "--clip-skip",
    "long_prompt": "--long-prompt",
    "strength": "--strength",
    "seed": "--seed",
}


def in_options(message: str) -> str:
    """An error's message with the names of the command's options in place of those of the Python interface.

    A name inside of another word, a path or quotation marks is something else and stays.
    """
    return re.sub(rf"(?<![\w./\\'\"`-])({'|'.join(_OPTIONS)})(?![\w./\\'\"`])", lambda m: _OPTIONS[m[1]], message)
