"""The outermost layer of a UNet apart from all that lies deeper, which changes little from step to step.

DeepCache (arXiv 2312.00858, its branch 0): on most steps only the first convolution, the last layer of the last up
block and the output convolution run; what the last layer gets from below is that of an earlier step. The modules are
diffusers' own, in the order of `CrossAttnUpBlock2D.forward` and `UpBlock2D.forward`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .shared_prefix import time_embedding


def run_last_up_block(
    block: Any, sample: Tensor, skips: tuple[Tensor, ...], emb: Tensor, prompt_embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """A UNet's last up block, [G,·,·,·] → its result, and what its last layer was given from below."""
    count = len(block.resnets)
    for i in range(count - 1):
        sample = _layer(block, i, sample, skips[-1 - i], emb, prompt_embeds)
    return _layer(block, count - 1, sample, skips[0], emb, prompt_embeds), sample


def _layer(block: Any, i: int, sample: Tensor, skip: Tensor, emb: Tensor, prompt_embeds: Tensor) -> Tensor:
    sample = block.resnets[i](torch.cat([sample, skip], dim=1), emb)
    if getattr(block, "has_cross_attention", False):
        sample = block.attentions[i](sample, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
    return sample


class ShallowUNet(nn.Module):
    """A UNet of which only the outermost layer runs.

    model_input [B,4,h,w], timestep [1], prompt_embeds [G,T,D], rows int64 [G], down_0 [G,C0,h,w] (the ControlNet's
    residual of the first skip connection), deep [G,C,h,w] (as the graph `unet` gives it), and timestep_cond [B,E] of a
    distilled UNet → noise_pred [G,4,h,w].
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        unet.down_blocks, unet.mid_block = nn.ModuleList(), nn.Identity()
        unet.up_blocks = unet.up_blocks[-1:]

    def forward(
        self,
        model_input: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        rows: Tensor,
        down_0: Tensor,
        deep: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """noise_pred [G,4,h,w]."""
        unet = self.unet
        sample = 2 * model_input - 1 if unet.config.center_input_sample else model_input
        emb = time_embedding(unet, timestep, timestep_cond)
        emb = emb if emb.shape[0] == 1 else emb.index_select(0, rows)
        skip, block = unet.conv_in(sample).index_select(0, rows) + down_0, unet.up_blocks[0]
        sample = _layer(block, len(block.resnets) - 1, deep, skip, emb, prompt_embeds)
        output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
        return output
