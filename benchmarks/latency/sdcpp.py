"""stable-diffusion.cpp as a contender of `cnpp-trt bench`: the same checkpoint, written as the files that it reads.

It takes UNet, VAE and text encoder under diffusers' names with prefixes (src/name_conversion.cpp), and a ControlNet
under the names of the original repository alone (src/control.hpp, after ControlNet's cldm/cldm.py). Only SD 1.5's
sizes are built into it.
"""

import importlib
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import BackendError
from ...export.checkpoint import Checkpoint
from ...runtime.settings.request import ResolvedRequest

# Our samplers' names → its own. It has no UniPC and no DDIM with leading time steps.
SAMPLERS = {"euler": ("euler", "discrete"), "dpmpp_2m": ("dpm++2m", "discrete"), "lcm": ("lcm", "lcm")}

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
}
_NETWORKS = {"unet": "unet.", "vae": "vae.", "text_encoder": "te."}


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
        _save(base_weights(checkpoint), self._base)

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
        _save(original_names(self._checkpoint.controlnet(condition, torch.float16).state_dict()), file)
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


def base_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """UNet, VAE and text encoder in float16, under the prefixes that stable-diffusion.cpp looks for."""
    found: dict[str, torch.Tensor] = {}
    for name, prefix in _NETWORKS.items():
        for key, tensor in getattr(checkpoint, name)(torch.float16).state_dict().items():
            # transformers 5 has left the text model's own name out.
            inside = "text_model." if name == "text_encoder" and not key.startswith("text_model.") else ""
            found[f"{prefix}{inside}{key}"] = tensor
    return found


def original_names(controlnet: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ControlNet of SD 1.5's structure (two layers to a block) under the original repository's names."""
    return {_original(key): tensor for key, tensor in controlnet.items()}


def _original(key: str) -> str:
    module, kind = key.rsplit(".", 1)
    if module in _FIXED:
        return f"{_FIXED[module]}.{kind}"
    if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
        return f"zero_convs.{found[1]}.0.{kind}"
    if found := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", module):
        return f"input_hint_block.{2 * int(found[1]) + 2}.{kind}"
    if module == "controlnet_cond_embedding.conv_out":
        return f"input_hint_block.14.{kind}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op.{kind}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", module):
        block, part, layer, inner = found.groups()
        place = f"input_blocks.{3 * int(block) + int(layer) + 1}"
        return f"{place}.0.{_RESNET[inner]}.{kind}" if part == "resnets" else f"{place}.1.{inner}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module):
        part, layer, inner = found.groups()
        if part == "attentions":
            return f"middle_block.1.{inner}.{kind}"
        return f"middle_block.{2 * int(layer)}.{_RESNET[inner]}.{kind}"
    raise ValueError(f"no ControlNet of SD 1.5 has {key}")


def _save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
