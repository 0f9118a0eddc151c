"""What can be exported, told before anything is loaded: from configs, and from the names in a single file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..messages import printable, some

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
_CROSS_ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def require_sd1_configs(unet: Mapping[str, Any], text_encoder: Mapping[str, Any], name: str) -> None:
    """Checks that a model is of SD-1.x architecture, from its configs.

    Raises:
        UserError: the configs of `name` are those of another architecture.
    """
    only = "only SD-1.x models can be exported"
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise UserError(f"{name} has a {printable(unet['_class_name'], 60)}: {only}")
    if unet.get("addition_embed_type"):
        raise UserError(f"{name} is not of SD-1.x architecture (SDXL?): {only}")
    if unet.get("in_channels", 4) != 4:
        channels = printable(unet["in_channels"], 40)
        raise UserError(f"{name} reads {channels} channels (an inpainting model?): {only}")
    kinds = text_encoder.get("architectures") or ["CLIPTextModel"]
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(str(kind).startswith("CLIPTextModel") for kind in kinds):
        raise UserError(f"{name} has a {printable(kinds[0], 60)} as its text encoder: {only}")
    if (dim := unet.get("cross_attention_dim")) and dim != text_encoder.get("hidden_size", dim):
        raise UserError(
            f"the UNet of {name} reads prompts of width {printable(dim, 40)}, its text encoder gives "
            f"{printable(text_encoder['hidden_size'], 40)}: they do not belong together"
        )


def require_fitting(controlnet: Mapping[str, Any], unet: Mapping[str, Any], name: str, vae_scale_factor: int) -> None:
    """Checks that a ControlNet fits the UNet and the VAE, from their configs.

    Raises:
        UserError: the config of the ControlNet `name` does not fit the UNet's, or the VAE's latents.
    """
    kind = controlnet.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel":
        raise UserError(f"{name} is a {printable(kind, 60)}: only ControlNetModel can be exported")
    for key in ("block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types"):
        ours, theirs = controlnet.get(key, unet.get(key)), unet.get(key, controlnet.get(key))
        if ours != theirs:
            hint = " (one of SD 2, the other of SD 1?)" if key == "cross_attention_dim" else ""
            raise UserError(
                f"{name} does not fit this UNet: {key} is {printable(ours, 80)}, not {printable(theirs, 80)}{hint}"
            )
    if controlnet.get("global_pool_conditions"):
        raise UserError(f"{name} has global_pool_conditions, which is not supported")
    embedding = controlnet.get("conditioning_embedding_out_channels")
    if isinstance(embedding, list) and 2 ** (len(embedding[:16]) - 1) != vae_scale_factor:
        raise UserError(
            f"{name} makes a control image {2 ** (len(embedding[:16]) - 1)} times smaller, this VAE an image "
            f"{vae_scale_factor} times: they do not belong together"
        )


def require_sd1_file(state: "Mapping[str, Tensor]", name: str, vae: bool = True) -> None:
    """Whether a single file's weights are those of a whole SD-1.x model.

    Args:
        vae: whether its VAE is wanted; one may come from elsewhere.

    Raises:
        UserError: they are something else; the message says what.
    """
    if any(key.startswith("conditioner.") for key in state):
        raise UserError(f"{name} is an SDXL model: only SD-1.x can be exported")
    if any(key.startswith("cond_stage_model.model.") for key in state):
        raise UserError(f"{name} is an SD-2 model in one file, which is not supported: only SD-1.x can be exported")
    if any(key.startswith("control_model.") for key in state):
        raise UserError(f"{name} is a ControlNet in its original layout: give it as --controlnet CONDITION=SOURCE")
    if _FIRST_CONVOLUTION not in state or _CROSS_ATTENTION not in state:
        raise UserError(f"{name} is no Stable Diffusion model in one file (it has {some(state)}): check what it is")
    if (channels := state[_FIRST_CONVOLUTION].shape[1]) != 4:
        raise UserError(f"{name} reads {channels} channels (an inpainting model?): only SD-1.x with 4 can be exported")
    if not any(key.startswith("cond_stage_model.transformer.") for key in state):
        raise UserError(f"{name} has a UNet but no text encoder: it is not a whole model")
    if vae and not any(key.startswith("first_stage_model.") for key in state):
        raise UserError(f"{name} has a UNet but no VAE: give one with --vae SOURCE, as stabilityai/sd-vae-ft-mse")
