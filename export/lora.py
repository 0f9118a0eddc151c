"""LoRA files in the layouts that are published, fused: W + weight · alpha/rank · B·A (arXiv 2106.09685, equation 3)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..messages import printable, some
from ..schema import read_object
from .adapters import Adapter, read_adapter
from .resolved_sources import ADAPTER, ADAPTER_CONFIG, Lora
from .weights import check_finite, read_weights

# <layer>.lora_A.weight (PEFT and diffusers since), <layer>.lora_down.weight (kohya), <layer>_lora.down.weight,
# <layer>.lora.down.weight and <layer>.lora_linear_layer.down.weight (diffusers before); likewise lora_B and up.
_KEY = re.compile(
    r"(?P<prefix>unet\.|lora_unet_|text_encoder\.|lora_te1?_|)(?P<layer>.+?)(?:"
    r"(?P<down>[._]lora(?:_A|_down|(?:_linear_layer)?\.down)\.weight)|"
    r"(?P<up>[._]lora(?:_B|_up|(?:_linear_layer)?\.up)\.weight)|"
    r"(?P<alpha>\.alpha))"
)

# What PEFT puts before the names of a whole model's layers, and how those of CLIP's text encoder go on.
_PEFT = "base_model.model."
_TEXT_LAYERS = ("text_model.", "encoder.layers.")
# Of alpha / rank and the weight together: trained ones are below 10.
_MAX_SCALE = 1e6
# Longer than any name of a layer.
_MAX_KEY = 300

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
class LoraMatch:
    """How a LoRA fits a model: the number of layers that it changes, and its keys that belong to none."""

    fused: int
    unmatched: tuple[str, ...]


@dataclass
class _Layer:
    """What a file holds of one layer: A is [rank, …], B [out, rank], or [out, rank, 1, 1] of a convolution."""

    keys: dict[str, str] = field(default_factory=dict)
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
        adapters: PEFT's settings of each component, where there are any.
    """

    layers: Mapping[str, Mapping[str, _Layer]]
    others: tuple[str, ...]
    adapters: Mapping[str, Adapter]


def read_lora(file: Path, config: Path | None = None) -> LoraWeights:
    """The layers of a `.safetensors` file or a pickle, in PEFT's, kohya's or one of diffusers' layouts.

    Keys without a prefix are the UNet's, as diffusers' first LoRA files have them.

    Args:
        config: PEFT's `adapter_config.json`, which a file of its own layout needs.

    Raises:
        UserError: it cannot be read, half of a layer is missing or a part is there twice.
    """
    layers: dict[str, dict[str, _Layer]] = {"unet": {}, "text_encoder": {}}
    others = []
    for key, tensor in read_weights([file]).items():
        if key.startswith(_PEFT) and config is None:
            raise UserError(
                f"{printable(file)} is PEFT's adapter_model without its settings: put its {ADAPTER_CONFIG} beside it, "
                f"and call it {ADAPTER}{file.suffix}"
            )
        match = _KEY.fullmatch(key.removeprefix(_PEFT)) if len(key) < _MAX_KEY else None
        if match is None or (match["alpha"] and (tensor.numel() != 1 or tensor.is_complex())):
            others.append(key)
            continue
        is_text = match["prefix"].startswith(("text_encoder", "lora_te")) or (
            key.startswith(_PEFT) and match["layer"].startswith(_TEXT_LAYERS)
        )
        component = "text_encoder" if is_text else "unet"
        name = match["layer"].replace(".processor", "").replace(".", "_").removeprefix("text_model_")
        layer = layers[component].setdefault(name, _Layer())
        part = "alpha" if match["alpha"] else "down" if match["down"] else "up"
        if getattr(layer, part) is not None:
            twice = some([layer.keys[part], key])
            raise UserError(f"{printable(file)} holds {component} {name} twice ({twice}): download it again")
        setattr(layer, part, float(tensor) if part == "alpha" else tensor)
        layer.keys[part] = key
    for component, found in layers.items():
        for name, layer in list(found.items()):
            if layer.down is None and layer.up is None:
                others += found.pop(name).keys.values()
            elif layer.down is None or layer.up is None:
                key = some(layer.keys.values(), 1)
                raise UserError(f"{printable(file)} holds only half of {component} {name} ({key}): download it again")
    return LoraWeights(layers, tuple(others), _adapters(file, config))


def match_loras(loras: Sequence[Lora], unet: nn.Module, text_encoder: nn.Module) -> list[LoraMatch]:
    """How each LoRA fits the modules, which may be on the meta device: nothing is changed.

    Raises:
        UserError: one is of another kind, made for another model, or damaged.
    """
    return [_match(lora, {"unet": unet, "text_encoder": text_encoder}) for lora in loras]


def fuse(module: nn.Module, loras: Sequence[Lora], component: str) -> None:
    """Adds the LoRAs' changes to the linear and convolution layers of `module`: summed in float32, then rounded once.

    Args:
        component: which part of the LoRAs: `unet` or `text_encoder`.

    Raises:
        UserError: As `match_loras`; keys that match nothing are left out.
    """
    names = _layer_names(module)
    changes: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for lora in loras:
        content = read_lora(lora.file, lora.config)
        for key, layer in content.layers[component].items():
            if key in names:
                name = names[key]
                adapter = content.adapters.get(component, Adapter())
                changes.setdefault(name, []).append(_change(lora, name, layer, module.get_submodule(name), adapter))
    with torch.no_grad():
        for name, added in changes.items():
            weight = module.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            total = weight.flatten(1).float()
            for down, up, scale in added:
                total = torch.addmm(total, up.float(), down.float(), alpha=scale)
            if not bool(torch.isfinite(total).all()):
                used = ", ".join(printable(lora.source) for lora in loras)
                raise UserError(f"{name} becomes NaN or Inf with the LoRA {used}: give it a smaller weight")
            weight.copy_(total.view(weight.shape))  # where a file is mapped, a page of our own: mappings are private


def _match(lora: Lora, modules: Mapping[str, nn.Module]) -> LoraMatch:
    content = read_lora(lora.file, lora.config)
    keys = [key for found in content.layers.values() for layer in found.values() for key in layer.keys.values()]
    keys += content.others
    if not keys:
        raise UserError(f"the LoRA {printable(lora.source)} holds no weights: {printable(lora.file)} is empty")
    for pattern, kind in _OTHER_KINDS.items():
        if any(re.search(pattern, key[:_MAX_KEY]) for key in keys):
            raise UserError(f"the LoRA {printable(lora.source)} is {kind}: only plain LoRA for SD 1.x can be fused")
    fused = 0
    unmatched = list(content.others)
    for component, found in content.layers.items():
        names = _layer_names(modules[component])
        for key, layer in found.items():
            if key in names:
                target = modules[component].get_submodule(names[key])
                _change(lora, names[key], layer, target, content.adapters.get(component, Adapter()))
                fused += 1
            else:
                unmatched += layer.keys.values()
        if found and not any(key in names for key in found):
            raise _nothing_matches(lora, [key for layer in found.values() for key in layer.keys.values()], component)
    if not fused:
        raise _nothing_matches(lora, keys, "model")
    return LoraMatch(fused, tuple(unmatched))


def _nothing_matches(lora: Lora, keys: Sequence[str], what: str) -> UserError:
    return UserError(
        f"nothing of the LoRA {printable(lora.source)} fits this {what}: its {len(keys)} keys look like "
        f"{printable(keys[0])}; "
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


def _change(lora: Lora, name: str, layer: _Layer, target: nn.Module, adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """A as [rank, in · kernel], B as [out, rank], and what their product is multiplied by.

    Raises:
        UserError: they do not fit the layer `name`, or are no numbers.
    """
    assert layer.down is not None and layer.up is not None and isinstance(target.weight, Tensor)
    what = f"the LoRA {printable(lora.source)}"
    down, up = (torch.atleast_2d(t).flatten(1) for t in (layer.down, layer.up))
    if not len(down) or up.shape[1] != len(down) or (len(up), down.shape[1]) != target.weight.flatten(1).shape:
        raise UserError(
            f"{what} does not fit this model: {name} is {list(target.weight.shape)}, its matrices "
            f"{list(layer.down.shape)} and {list(layer.up.shape)}; is it for SD 2 or SDXL?"
        )
    check_finite({layer.keys["down"]: down, layer.keys["up"]: up}, what)
    scale = lora.weight * adapter.scale(name, len(down), layer.alpha, what)
    if math.isfinite(scale) and abs(scale) > _MAX_SCALE:
        raise UserError(f"{what} multiplies its change to {name} by {scale:g}: its alpha or its weight is too large")
    if not math.isfinite(scale):
        key = printable(layer.keys.get("alpha", f"the alpha of {name}"))
        raise UserError(f"{what} has NaN or Inf in {key}: it is damaged, get it again")
    return down, up, scale


def _adapters(file: Path, config: Path | None) -> Mapping[str, Adapter]:
    """PEFT's settings by component: of the file beside it, or of the header that diffusers writes."""
    if config is not None:
        adapter = read_adapter(read_object(config), f"the LoRA {printable(config)}")
        return {"unet": adapter, "text_encoder": adapter}
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        text = (content.metadata() or {}).get("lora_adapter_metadata")
    try:
        header = json.loads(text or "{}")
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"the lora_adapter_metadata of {printable(file)} is no JSON object: download it again")
    found = {}
    for component in ("unet", "text_encoder"):
        prefix = f"{component}."
        own = {key.removeprefix(prefix): value for key, value in header.items() if key.startswith(prefix)}
        if own:
            found[component] = read_adapter(own, f"the LoRA {printable(file)}")
    return found
