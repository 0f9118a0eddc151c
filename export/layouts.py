"""Weights under other names than today's modules give them: original Stable Diffusion files, and old diffusers folders.

The mapping of original ("LDM") names is diffusers' own (loaders/single_file_utils.py).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .weights import State

_TEXT_MODEL = "text_model."


def unet_of(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {key: t for key, t in state.items() if not key.startswith("model_ema.")}
    converted: State = convert_ldm_unet_checkpoint(own, config)
    return converted


def vae_of(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """Also of a VAE's own file, whose names have no `first_stage_model.` before them."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    whole = any(key.startswith("first_stage_model.") for key in state)
    own = {key: t for key, t in state.items() if not whole or key.startswith("first_stage_model.")}
    if not any(".down.0.block." in key or key.startswith("encoder.down.0.block.") for key in own):
        return own  # diffusers' names already
    converted: State = convert_ldm_vae_checkpoint(own, config)
    return converted


def text_encoder_of(state: Mapping[str, Tensor]) -> State:
    prefix = "cond_stage_model.transformer."
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def as_module_names(state: State, module: nn.Module) -> State:
    """The same tensors under the names that `module` has for them.

    CLIP's text encoder had `text_model.` before every name until transformers 5, and saved its position ids; a VAE's
    attention had `query`, `key`, `value` and `proj_attn` in early diffusers.
    """
    from diffusers import ModelMixin

    wanted = module.state_dict().keys()
    prefixed = any(key.startswith(_TEXT_MODEL) for key in wanted)
    renamed: State = {}
    for key, tensor in state.items():
        if key.endswith("embeddings.position_ids"):
            continue
        if key not in wanted:
            key = key.removeprefix(_TEXT_MODEL) if not prefixed else f"{_TEXT_MODEL}{key.removeprefix(_TEXT_MODEL)}"
        renamed[key] = tensor
    if isinstance(module, ModelMixin):
        module._fix_state_dict_keys_on_load(renamed)
    # Some VAEs keep their attention's matrices as 1×1 convolutions, as the original code did.
    shapes = module.state_dict()
    return {
        key: t.reshape(shapes[key].shape) if key in shapes and t.ndim == 4 and shapes[key].ndim == 2 else t
        for key, t in renamed.items()
    }
