"""LoRA files in the layouts that are published, fused: W + weight · alpha/rank · B·A (arXiv 2106.09685, equation 3)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .recipe import Lora
from .weights import read_weights

# <layer>.lora_A.weight (PEFT and diffusers since), <layer>.lora_down.weight (kohya), <layer>_lora.down.weight,
# <layer>.lora.down.weight and <layer>.lora_linear_layer.down.weight (diffusers before); likewise lora_B and up.
_KEY = re.compile(
    r"(?P<prefix>unet\.|lora_unet_|text_encoder\.|lora_te1?_|)(?P<layer>.+?)(?:"
    r"(?P<down>[._]lora(?:_A|_down|(?:_linear_layer)?\.down)\.weight)|"
    r"(?P<up>[._]lora(?:_B|_up|(?:_linear_layer)?\.up)\.weight)|"
    r"(?P<alpha>\.alpha))"
)

# What keys of other kinds hold, first match first.
_OTHER_KINDS = {
    r"\bhada_": "a LoHa",
    r"\blokr_": "a LoKr",
    r"\b(dora_scale|lora_magnitude_vector)\b": "a DoRA",
    r"\boft_": "an OFT",
    r"\blora_mid\b": "a LoCon with a Tucker core",
    r"^(lora_te2_|text_encoder_2\.|lora_unet_(input|output)_blocks_)": "for SDXL",
    r"double_blocks|single_(transformer_)?blocks|joint_blocks|^transformer\.|^lora_transformer_|^diffusion_model\.": (
        "for Flux, SD 3 or another transformer"
    ),
}


@dataclass(frozen=True)
class Fit:
    """How a LoRA fits a model: the number of layers that it changes, and its keys that belong to none."""

    fused: int
    unmatched: tuple[str, ...]


@dataclass
class _Layer:
    """What a file holds of one layer: A is [rank, …], B [out, rank], or [out, rank, 1, 1] of a convolution."""

    keys: list[str] = field(default_factory=list)
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file.

    Attributes:
        layers: by component (`unet`, `text_encoder`) and the layer's name with `_` for every dot, which is what
            all layouts have in common.
        others: the keys that are no part of them.
        config: PEFT's settings of each component from the header that diffusers writes (`lora_adapter_metadata`).
    """

    layers: Mapping[str, Mapping[str, _Layer]]
    others: tuple[str, ...]
    config: Mapping[str, Any]


def read_lora(file: Path) -> LoraWeights:
    """The layers of a `.safetensors` file or a pickle, in PEFT's, kohya's or one of diffusers' layouts.

    Keys without a prefix are the UNet's, as diffusers' first LoRA files have them.

    Raises: UserError where it cannot be read or half of a layer is missing.
    """
    layers: dict[str, dict[str, _Layer]] = {"unet": {}, "text_encoder": {}}
    others = []
    for key, tensor in read_weights([file]).items():
        match = _KEY.fullmatch(key)
        if match is None or (match["alpha"] and tensor.numel() != 1):
            others.append(key)
            continue
        component = "text_encoder" if match["prefix"].startswith(("text_encoder", "lora_te")) else "unet"
        name = match["layer"].replace(".processor", "").replace(".", "_").removeprefix("text_model_")
        layer = layers[component].setdefault(name, _Layer())
        layer.keys.append(key)
        if match["alpha"]:
            layer.alpha = float(tensor)
        elif match["down"]:
            layer.down = tensor
        else:
            layer.up = tensor
    for component, found in layers.items():
        for name, layer in list(found.items()):
            if layer.down is None and layer.up is None:
                others += found.pop(name).keys
            elif layer.down is None or layer.up is None:
                raise UserError(f"{file} holds only half of {component} {name} ({layer.keys[0]}): download it again")
    return LoraWeights(layers, tuple(others), _peft_config(file))


def survey(loras: Sequence[Lora], unet: nn.Module, text_encoder: nn.Module) -> list[Fit]:
    """How each LoRA fits the modules, which may be on the meta device: nothing is changed.

    Raises: UserError where one is of another kind, made for another model, or damaged.
    """
    return [_survey(lora, {"unet": unet, "text_encoder": text_encoder}) for lora in loras]


def fuse(module: nn.Module, loras: Sequence[Lora], component: str) -> None:
    """Adds the LoRAs' changes to the linear and convolution layers of `module`: summed in float32, then rounded once.

    Args:
        component: which part of the LoRAs: `unet` or `text_encoder`.
    Raises: UserError as `survey`; keys that match nothing are left out.
    """
    names = _layer_names(module)
    changes: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for lora in loras:
        content = read_lora(lora.file)
        for key, layer in content.layers[component].items():
            if key in names:
                name = names[key]
                down, up = _matrices(lora, name, layer, module.get_submodule(name))
                scale = lora.weight * _scale(layer.alpha, content.config, component, name, len(down))
                changes.setdefault(name, []).append((down, up, scale))
    with torch.no_grad():
        for name, added in changes.items():
            weight = module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            total = weight.flatten(1).float()
            for down, up, scale in added:
                total = torch.addmm(total, up.float(), down.float(), alpha=scale)
            weight.copy_(total.view(weight.shape))  # where a file is mapped, a page of our own: mappings are private


def _survey(lora: Lora, modules: Mapping[str, nn.Module]) -> Fit:
    content = read_lora(lora.file)
    keys = [key for found in content.layers.values() for layer in found.values() for key in layer.keys]
    keys += content.others
    if not keys:
        raise UserError(f"the LoRA {lora.source} holds no weights: {lora.file} is empty")
    for pattern, kind in _OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in keys):
            raise UserError(f"the LoRA {lora.source} is {kind}: only plain LoRA for SD 1.x can be fused")
    fused = 0
    unmatched = list(content.others)
    for component, found in content.layers.items():
        names = _layer_names(modules[component])
        for key, layer in found.items():
            if key in names:
                _matrices(lora, names[key], layer, modules[component].get_submodule(names[key]))
                fused += 1
            else:
                unmatched += layer.keys
        if found and not any(key in names for key in found):
            raise _nothing_matches(lora, [key for layer in found.values() for key in layer.keys], component)
    if not fused:
        raise _nothing_matches(lora, keys, "model")
    return Fit(fused, tuple(unmatched))


def _nothing_matches(lora: Lora, keys: Sequence[str], what: str) -> UserError:
    return UserError(
        f"nothing of the LoRA {lora.source} fits this {what}: its {len(keys)} keys look like {keys[0]}; "
        "is it a LoRA, and for SD 1.x?"
    )


def _layer_names(module: nn.Module) -> dict[str, str]:
    """The layers that a LoRA may change, by every name that a file may have for them (dots as `_`)."""
    names: dict[str, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            short = name.removeprefix("text_model.")
            # diffusers' first files call attention's layers alike in UNet and text encoder.
            old = re.sub(r"\bto_out\.0$|\bout_proj$", "to_out", re.sub(r"\b([qkv])_proj$", r"to_\1", short))
            names |= {n.replace(".", "_"): name for n in (old, short)}
    return names


def _matrices(lora: Lora, name: str, layer: _Layer, target: nn.Module) -> tuple[Tensor, Tensor]:
    """A as [rank, in · kernel] and B as [out, rank]."""
    assert layer.down is not None and layer.up is not None and isinstance(target.weight, Tensor)
    down, up = (torch.atleast_2d(t).flatten(1) for t in (layer.down, layer.up))
    if up.shape[1] != len(down) or (len(up), down.shape[1]) != target.weight.flatten(1).shape:
        raise UserError(
            f"the LoRA {lora.source} does not fit this model: {name} is {list(target.weight.shape)}, its matrices "
            f"{list(layer.down.shape)} and {list(layer.up.shape)}; is it for SD 2 or SDXL?"
        )
    return down, up


def _scale(alpha: float | None, config: Mapping[str, Any], component: str, name: str, rank: int) -> float:
    """alpha / rank; 1 where the file gives no alpha, as diffusers has it."""

    def setting(key: str) -> Any:
        return config.get(f"{component}.{key}")

    if alpha is None:
        alpha = setting("lora_alpha")
        for pattern, value in (setting("alpha_pattern") or {}).items():
            # As PEFT matches them (peft.utils.other.get_pattern_key).
            if re.fullmatch(rf"(.*\.)?({pattern.replace('text_model.', '')})", name.removeprefix("text_model.")):
                alpha = value
                break
    if alpha is None:
        return 1.0
    # rsLoRA divides by the root (arXiv 2312.03732).
    return float(alpha) / (math.sqrt(rank) if setting("use_rslora") else rank)


def _peft_config(file: Path) -> Mapping[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        text = (content.metadata() or {}).get("lora_adapter_metadata")
    try:
        config = json.loads(text or "{}")
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"the lora_adapter_metadata of {file} is no JSON object: download it again")
    return config
