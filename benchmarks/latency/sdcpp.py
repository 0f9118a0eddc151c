"""stable-diffusion.cpp as a contender of `cnpp-trt bench`: the same checkpoint, written under the original names.

It reads a ControlNet under no others (src/control.hpp). Only SD 1.5's sizes are built into it.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ...errors import BackendError
from ...export.checkpoint import Checkpoint
from ...export.original_layout import original_controlnet, original_layout
from ...runtime.settings.request import ResolvedRequest

# Our samplers' names → its own. It has no UniPC and no DDIM with leading time steps.
SAMPLERS = {"euler": ("euler", "discrete"), "dpmpp_2m": ("dpm++2m", "discrete"), "lcm": ("lcm", "lcm")}


class StableDiffusionCpp:
    """Its Python package `stable-diffusion-cpp-python`, with weights in float16 and diffusers' noise.

    As it comes, without `diffusion_flash_attn`, which takes less memory and nearly twice as long on a CPU. A cold start
    includes writing its files, with PyTorch in this process.

    Args:
        checkpoint: of SD 1.5's sizes; its files are written to a temporary folder that goes with this object.
        threads: of the CPU; None is its own default.

    Raises:
        BackendError: it cannot load them.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None) -> None:
        self._checkpoint = checkpoint
        self._threads = -1 if threads is None else threads
        self._folder = tempfile.TemporaryDirectory(prefix="stable-diffusion-cpp-")
        self._base = Path(self._folder.name) / "base.safetensors"
        self._model: Any = None
        self._condition = ""
        save_file(_base_weights(checkpoint), self._base)

    def generate(self, request: ResolvedRequest) -> NDArray[np.uint8]:
        """uint8 [B,H,W,3].

        Raises:
            BackendError: it has no such sampler, or fails.
        """
        from PIL import Image

        if request.scheduler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise BackendError(f"stable-diffusion.cpp has no {request.scheduler}: give --scheduler, one of {known}")
        method, scheduler = SAMPLERS[request.scheduler]
        (control,) = request.controls
        height, width = control.pixels.shape[:2]
        images = self._of(control.condition).generate_image(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=width,
            height=height,
            cfg_scale=request.guidance_scale,
            sample_method=method,
            scheduler=scheduler,
            sample_steps=request.num_inference_steps,
            seed=request.seed,
            batch_count=request.num_images_per_prompt,
            control_image=Image.fromarray(control.pixels),
            control_strength=float(control.controlnet_conditioning_scale),
        )
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    def stages(self, request: ResolvedRequest) -> dict[str, float]:
        """Nothing: it does not tell them apart."""
        return {}

    def extract(self, condition: str, image: NDArray[np.uint8]) -> float | None:
        """None: its own extractor is canny alone, and not the model's."""
        return None

    def _of(self, condition: str) -> Any:
        if condition == self._condition:
            return self._model
        # Not by `import`: it is no dependency of any extra, and a type checker would look for it.
        package = importlib.import_module("stable_diffusion_cpp")
        file = self._base.with_name("controlnet.safetensors")
        save_file(original_controlnet(self._checkpoint.controlnet(condition, torch.float16)), file)
        try:
            self._model = package.StableDiffusion(
                model_path=str(self._base),
                control_net_path=str(file),
                n_threads=self._threads,
                vae_decode_only=True,
                rng_type="cpu",  # torch's generator on a CPU
                verbose=False,
            )
        except ValueError as e:
            raise BackendError(f"stable-diffusion.cpp cannot load the checkpoint: {e}") from None
        self._condition = condition
        return self._model


def _base_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    text_encoder = checkpoint.text_encoder(torch.float16).state_dict()
    # transformers 5 has left the text model's own name out.
    named = {key if key.startswith("text_model.") else f"text_model.{key}": t for key, t in text_encoder.items()}
    return original_layout(checkpoint.unet(torch.float16), checkpoint.vae(torch.float16), named)
