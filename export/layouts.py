"""Weights under other names than today's modules give them: original Stable Diffusion files, and old diffusers folders.

The mapping of original ("LDM") names is diffusers' own (loaders/single_file_utils.py).
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..messages import one_line, printable
from .weights import State

_TEXT_MODEL = "text_model."
# What files hold and no graph reads, as diffusers and transformers leave it out: CLIP's image half and projections,
# position ids, what a training kept, and an original file's noise schedule.
_UNREAD = re.compile(
    r"(?:text_model\.)?(?:text_projection\.weight|logit_scale|vision_model\..+|visual_projection\.weight)"
    r"|(?:.+\.)?position_ids"
    r"|(?:model_ema|ema|loss|optimizer)\..+|global_step|decay|num_updates|(?:.+\.)?num_batches_tracked"
    r"|betas|logvar|alphas_cumprod(?:_prev)?|sqrt_(?:one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(?:m1)?_alphas_cumprod|posterior_(?:variance|log_variance_clipped|mean_coef[12])"
)


def unet_of(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """The UNet's weights of a single file, under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    own = {key: t for key, t in state.items() if not key.startswith("model_ema.")}
    return _converted(convert_ldm_unet_checkpoint, own, config, "UNet")


def vae_of(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """Also of a VAE's own file, whose names have no `first_stage_model.` before them."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    whole = any(key.startswith("first_stage_model.") for key in state)
    own = {key: t for key, t in state.items() if not whole or key.startswith("first_stage_model.")}
    if not any(".down.0.block." in key or key.startswith("encoder.down.0.block.") for key in own):
        return own  # diffusers' names already
    return _converted(convert_ldm_vae_checkpoint, own, config, "VAE")


def text_encoder_of(state: Mapping[str, Tensor]) -> State:
    """The text encoder's weights of a single file, under transformers' names."""
    prefix = "cond_stage_model.transformer."
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def as_module_names(state: State, module: nn.Module) -> State:
    """The same tensors under the names that `module` has for them, without those that nothing reads.

    CLIP's text encoder had `text_model.` before every name until transformers 5, and saved its position ids; a VAE's
    attention had `query`, `key`, `value` and `proj_attn` in early diffusers.
    """
    from diffusers import ModelMixin

    wanted = module.state_dict().keys()
    prefixed = any(key.startswith(_TEXT_MODEL) for key in wanted)
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        if key not in wanted and _UNREAD.fullmatch(key):
            continue
        if key not in wanted:
            key = key.removeprefix(_TEXT_MODEL) if not prefixed else f"{_TEXT_MODEL}{key.removeprefix(_TEXT_MODEL)}"
        if key in renamed:
            raise UserError(f"the weights hold {printable(key)} twice, with and without {_TEXT_MODEL}: get them again")
        renamed[key] = tensor
    if isinstance(module, ModelMixin):
        try:
            module._fix_state_dict_keys_on_load(renamed)
        except KeyError as e:  # one of an old attention's matrices
            raise UserError(f"the weights lack {printable(e)}: they are incomplete, get them again") from None
    # Some VAEs keep their attention's matrices as 1×1 convolutions, as the original code did.
    shapes = module.state_dict()
    return {
        key: t.reshape(shapes[key].shape) if key in shapes and t.shape == (*shapes[key].shape, 1, 1) else t
        for key, t in renamed.items()
    }


def _converted(convert: Callable[..., Any], state: State, config: Mapping[str, Any], what: str) -> State:
    """What a function of diffusers makes of original names.

    Raises:
        UserError: names that it needs are missing.
    """
    try:
        return {key: t for key, t in convert(state, config).items() if t is not None}
    except Exception as e:  # whatever a missing key makes of it
        raise UserError(f"the {what}'s weights in the file cannot be read ({one_line(e, 120)}): is it whole?") from e
