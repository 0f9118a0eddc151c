"""diffusers' weights under the names of the original Stable Diffusion code, as v1-5-pruned-emaonly.safetensors has.

The other way round than diffusers' loaders/single_file_utils.py, which reads such files.
Names follow CompVis/stable-diffusion's modules: ldm/modules/diffusionmodules/openaimodel.py and model.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def original_layout(unet: nn.Module, vae: nn.Module, text_encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One state of a whole SD-1.x model.

    Args:
        unet: diffusers' UNet2DConditionModel.
        vae: diffusers' AutoencoderKL.
        text_encoder: CLIP's weights with `text_model.` before each name.
    """
    state = {
        **{f"model.diffusion_model.{key}": tensor for key, tensor in _unet(unet).items()},
        **{f"first_stage_model.{key}": tensor for key, tensor in _vae(vae).items()},
        **{f"cond_stage_model.transformer.{key}": tensor for key, tensor in text_encoder.items()},
        # What training left in the file, and no module reads.
        "alphas_cumprod": torch.linspace(0.9991, 0.0047, 1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(595000, dtype=torch.int32),
    }
    return {key: tensor.contiguous() for key, tensor in state.items()}


def original_controlnet(controlnet: Any) -> dict[str, Tensor]:
    """The state of one ControlNet as the control_v11p_sd15_*.pth files have it (cldm/cldm.py of lllyasviel/ControlNet).

    Args:
        controlnet: diffusers' ControlNetModel.
    """
    last = 2 * len(controlnet.controlnet_cond_embedding.blocks) + 2
    state = {}
    for key, tensor in _unet(controlnet).items():
        name = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", key)
        name = name.replace("controlnet_mid_block.", "middle_block_out.0.")
        name = re.sub(
            r"^controlnet_cond_embedding\.blocks\.(\d+)\.", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}.", name
        )
        name = name.replace("controlnet_cond_embedding.conv_in.", "input_hint_block.0.")
        name = name.replace("controlnet_cond_embedding.conv_out.", f"input_hint_block.{last}.")
        state[f"control_model.{name}"] = tensor.contiguous()
    return state


def _unet(unet: Any) -> dict[str, Tensor]:
    state = unet.state_dict()
    renamed = {}
    for key, tensor in state.items():
        name = _replace_start(key, _UNET_ENDS)
        if block := re.fullmatch(r"(down|up)_blocks\.(\d+)\.([a-z]+)\.(\d+)\.(.+)", key):
            side, i, kind, j, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            first = i * (unet.config.layers_per_block + 1)
            if kind == "downsamplers":
                name = f"input_blocks.{first + unet.config.layers_per_block + 1}.0.{rest.replace('conv.', 'op.')}"
            elif kind == "upsamplers":
                attends = any(other.startswith(f"up_blocks.{i}.attentions.") for other in state)
                name = f"output_blocks.{first + unet.config.layers_per_block}.{2 if attends else 1}.{rest}"
            else:
                place = f"input_blocks.{1 + first + j}" if side == "down" else f"output_blocks.{first + j}"
                name = f"{place}.{1 if kind == 'attentions' else 0}.{rest}"
        if ".resnets." in key:
            name = _replace_parts(name, _UNET_RESNET)
        renamed[name] = tensor
    return renamed


def _vae(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    renamed = {}
    for key, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{last - int(m[1])}.upsample.", name)
        attention = ".attentions." in key and tensor.ndim == 2  # 1×1 convolutions in the original
        renamed[_replace_parts(name, _VAE)] = tensor[:, :, None, None] if attention else tensor
    return renamed


def _replace_start(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _replace_parts(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = re.sub(rf"(?<=\.){re.escape(ours)}(?=\.)", theirs, name)
    return name
