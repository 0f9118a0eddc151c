"""A LoRA file fused into a module: W + B·A for every layer it names (arXiv 2106.09685, equation 3)."""

from pathlib import Path

import torch
from torch import nn

from ..errors import UserError


def fuse_lora(module: nn.Module, file: Path, prefix: str = "unet.") -> None:
    """Adds a LoRA in diffusers' format, `<prefix><layer>.lora_A.weight` and `….lora_B.weight`, to linear layers and
    convolutions. Its scale is 1: what diffusers takes where the file names no alpha.

    Raises: UserError where the file is no such LoRA or a layer that it names is not in the module.
    """
    from safetensors.torch import load_file

    try:
        weights = load_file(file)
    except Exception as e:  # safetensors and the file system raise what they like
        raise UserError(f"cannot read the LoRA {file}: {' '.join(str(e).split())[:200]}") from e
    layers = dict(module.named_modules())
    downs = [key for key in weights if key.startswith(prefix) and key.endswith(".lora_A.weight")]
    if not downs or len(weights) != 2 * len(downs):
        raise UserError(f"{file} is not a LoRA that can be fused: it must hold {prefix}….lora_A and ….lora_B only")
    with torch.no_grad():
        for key in downs:
            name = key.removeprefix(prefix).removesuffix(".lora_A.weight")
            layer, up = layers.get(name), weights.get(key.replace("lora_A", "lora_B"))
            if not isinstance(layer, nn.Linear | nn.Conv2d) or up is None:
                raise UserError(f"the LoRA {file} does not fit this model: {name}")
            a, b = weights[key].float(), up.float()
            delta = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
            layer.weight.copy_(layer.weight.float() + delta.reshape(layer.weight.shape))
