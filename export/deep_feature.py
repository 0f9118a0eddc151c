"""The outermost layer of a UNet apart from all that lies deeper, which changes little from step to step.

DeepCache (arXiv 2312.00858, its branch 0): on most steps only the first convolution, the last layer of the last up
block and the output convolution run; what the last layer gets from below is that of an earlier step. The modules are
diffusers' own, in the order of `CrossAttnUpBlock2D.forward` and `UpBlock2D.forward`.
"""

from typing import Any

import torch
from torch import Tensor

from .shared_prefix import Text


def run_last_up_block(
    block: Any, sample: Tensor, skips: tuple[Tensor, ...], emb: Tensor, text: Text
) -> tuple[Tensor, Tensor]:
    """A UNet's last up block, [G,·,·,·] → its result, and what its last layer was given from below."""
    for i in range(len(block.resnets) - 1):
        sample = _layer(block, i, sample, skips[-1 - i], emb, text)
    return run_last_layer(block, sample, skips[0], emb, text), sample


def run_last_layer(block: Any, sample: Tensor, skip: Tensor, emb: Tensor, text: Text) -> Tensor:
    """Its last ResNet block with what follows it, on what comes from below and the first skip connection."""
    return _layer(block, len(block.resnets) - 1, sample, skip, emb, text)


def _layer(block: Any, i: int, sample: Tensor, skip: Tensor, emb: Tensor, text: Text) -> Tensor:
    sample = block.resnets[i](torch.cat([sample, skip], dim=1), emb)
    if getattr(block, "has_cross_attention", False):
        sample = block.attentions[i](sample, encoder_hidden_states=text, return_dict=False)[0]
    return sample
