"""Makes LoRA and textual inversion files with random weights in the layouts that are published.

For tests of what reads them: names, shapes and types are the real ones, what a model makes of them means nothing.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

# What the usual trainers adapt: kohya's sd-scripts (UNet and text encoder), diffusers' text-to-image script, and
# diffusers' train_lcm_distill_lora_sd_wds.py, which made latent-consistency/lcm-lora-sdv1-5.
_UNET = {
    "kohya": r"(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)$",
    "diffusers": r"(to_[qkv]|to_out\.0)$",
    "lora_linear_layer": r"(to_[qkv]|to_out\.0)$",
    "old": r"(to_[qkv]|to_out\.0)$",
    "lcm": r"(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2|conv_shortcut|"
    r"downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$",
}
_TEXT = {
    "kohya": r"([qkv]_proj|out_proj|fc[12])$",
    "diffusers": r"([qkv]|out)_proj$",
    "lora_linear_layer": r"([qkv]|out)_proj$",
    "old": r"([qkv]|out)_proj$",
}


def make_lora(
    file: Path,
    unet: nn.Module,
    text_encoder: nn.Module | None = None,
    *,
    layout: str = "kohya",
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Writes a LoRA for these modules, which may be on the meta device.

    Args:
        file: `.safetensors`, or any other name for a pickle.
        unet: adapted in the layers that the layout names.
        text_encoder: the same; None leaves it out.
        layout: `kohya` (`lora_unet_….lora_down.weight`, with alphas), `lcm` (the same, with the layers of the
            published LCM-LoRA, whose rank is 64; no text encoder), `diffusers` (`unet.….lora_A.weight`),
            `lora_linear_layer` (`unet.….lora.down.weight`, and the text encoder's `….lora_linear_layer.down.weight`:
            diffusers until PEFT) or `old` (`unet.….processor.to_q_lora.down.weight`: before that).
        rank: of every pair of matrices.
        alpha: of `kohya`, `lcm` and `diffusers`; None is half the rank in the first two and no alpha in the third.
        seed: of the random weights.
        dtype: of the weights.

    Returns:
        `file`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    components = {"unet": (unet, _UNET[layout])}
    if text_encoder is not None and layout in _TEXT:
        components["text_encoder"] = (text_encoder, _TEXT[layout])
    for component, (module, pattern) in components.items():
        for name, layer in module.named_modules():
            if not re.search(pattern, name) or not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            key, down, up = _keys(component, name, layout)
            shape = layer.weight.shape
            fan_in = shape[1:].numel()
            rows = torch.randn(rank, *shape[1:], generator=generator) * rank**-0.5
            columns = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.2 * fan_in**-0.5
            weights[key + down], weights[key + up] = rows.to(dtype), columns.to(dtype)
            if layout in ("kohya", "lcm"):
                weights[f"{key}.alpha"] = torch.tensor(rank / 2 if alpha is None else alpha, dtype=dtype)
            elif layout == "diffusers" and alpha is not None:
                weights[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return _save(weights, file)


def make_embedding(
    file: Path, width: int, *, layout: str = "diffusers", token: str = "<thing>", vectors: int = 1, seed: int = 0
) -> Path:
    """Writes a textual inversion for a text encoder with `width` features.

    Args:
        file: to write.
        width: features of the text encoder, D.
        layout: `diffusers` (a table from the token to [D] or [n,D]; `.bin` or `.safetensors`), `a1111` (`.pt`), or
            `emb_params` (`.safetensors` that name no token).
        token: the word that it stands for.
        vectors: of the word, n.
        seed: of the random vectors.

    Returns:
        `file`.
    """
    tensor = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed)) * 0.1
    if layout == "a1111":
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": token, "step": 100}
        torch.save({**content, "sd_checkpoint": None, "sd_checkpoint_name": None}, file)
        return file
    if layout == "emb_params":
        return _save({"emb_params": tensor}, file)
    return _save({token: tensor[0] if vectors == 1 else tensor}, file)


def _keys(component: str, name: str, layout: str) -> tuple[str, str, str]:
    """What a layer's keys begin with, and how those of its two matrices end."""
    text = component == "text_encoder"
    # transformers 5 leaves out what published files have.
    full = f"text_model.{name.removeprefix('text_model.')}" if text else name
    if layout in ("kohya", "lcm"):
        return f"lora_{'te' if text else 'unet'}_{full.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"
    if layout == "diffusers":
        return f"{component}.{full}", ".lora_A.weight", ".lora_B.weight"
    if layout == "lora_linear_layer":
        middle = "lora_linear_layer" if text else "lora"
        return f"{component}.{full}", f".{middle}.down.weight", f".{middle}.up.weight"
    parent, last = full.removesuffix(".0").rsplit(".", 1)
    old = re.sub(r"(\w+)_proj$", r"to_\1", last)
    return f"{component}.{parent}{'' if text else '.processor'}.{old}", "_lora.down.weight", "_lora.up.weight"


def _save(weights: dict[str, Tensor], file: Path) -> Path:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file
