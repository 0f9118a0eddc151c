"""A UNet's and a ControlNet's way down, with what all prompts of an image share computed once.

Classifier-free guidance runs each image with two prompts. Until the first cross-attention nothing depends on a prompt,
so the first convolution, the first ResNet block and the first self-attention run on B images instead of on G = n·B
rows; their results are then copied to the rows. The modules are diffusers' own, in the order of
`UNet2DConditionModel.forward`, `ControlNetModel.forward`, `CrossAttnDownBlock2D.forward`,
`Transformer2DModel.forward` and `BasicTransformerBlock.forward`, for the configs that `configs.py` lets through.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What cross-attentions read: `prompt_embeds` [G,T,D], or the keys and values of all of them (`hoists.TextKv`).
Text = Tensor | tuple[Tensor, ...]


def time_embedding(model: Any, timestep: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
    """timestep [1], timestep_cond [B,E] or None → the embedding of the time step, [1,·] or [B,·]."""
    dtype = model.conv_in.weight.dtype
    embedding: Tensor = model.time_embedding(model.time_proj(timestep).to(dtype), timestep_cond)
    return embedding


def run_down_blocks(
    model: Any, sample: Tensor, emb: Tensor, text: Text, rows: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Runs the down blocks of a UNet or a ControlNet.

    Args:
        model: whose `down_blocks` run.
        sample: after the first convolution, [B,C,h,w].
        emb: as `time_embedding` gives it, or rows of `hoists.TimeEmbeds`.
        text: what the cross-attentions read: prompt_embeds [G,T,D], or what `hoists.TextKv` gives.
        rows: for each row of the batch its image, int64 [G].

    Returns:
        The last block's result [G,C',h',w'], every skip connection [G,·,·,·], and the time embedding for G rows.
    """
    emb_of_rows = emb if emb.shape[0] == 1 else emb.index_select(0, rows)
    skips, shared = [sample.index_select(0, rows)], True
    for block in model.down_blocks:
        if not getattr(block, "has_cross_attention", False):
            sample, found = block(hidden_states=sample, temb=emb if shared else emb_of_rows)
            found = tuple(skip.index_select(0, rows) for skip in found) if shared else found
        elif shared:
            sample, found = _first_cross_attention(block, sample, emb, emb_of_rows, text, rows)
            shared = False
        else:
            sample, found = block(hidden_states=sample, temb=emb_of_rows, encoder_hidden_states=text)
        skips += found
    return sample.index_select(0, rows) if shared else sample, tuple(skips), emb_of_rows


def _first_cross_attention(
    block: Any, sample: Tensor, emb: Tensor, emb_of_rows: Tensor, text: Text, rows: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A `CrossAttnDownBlock2D`: [B,·,·,·] before its first cross-attention, [G,·,·,·] after it."""
    found: list[Tensor] = []
    for resnet, attention in zip(block.resnets, block.attentions, strict=True):
        if not found:
            sample = _attention(attention, resnet(sample, emb), text, rows)
        else:
            sample = attention(resnet(sample, emb_of_rows), encoder_hidden_states=text, return_dict=False)[0]
        found.append(sample)
    if block.downsamplers is not None:
        for downsampler in block.downsamplers:
            sample = downsampler(sample)
        found.append(sample)
    return sample, tuple(found)


def _attention(attention: Any, hidden: Tensor, text: Text, rows: Tensor) -> Tensor:
    """A `Transformer2DModel` whose first block's self-attention runs once for each image."""
    _, _, height, width = hidden.shape
    tokens, inner_dim = attention._operate_on_continuous_inputs(hidden)
    first, *others = attention.transformer_blocks
    if first.only_cross_attention:  # its first attention reads the prompt too
        tokens = tokens.index_select(0, rows)
        tokens = first.attn1(first.norm1(tokens), encoder_hidden_states=text) + tokens
    else:
        tokens = (first.attn1(first.norm1(tokens)) + tokens).index_select(0, rows)
    tokens = first.attn2(first.norm2(tokens), encoder_hidden_states=text) + tokens
    tokens = first.ff(first.norm3(tokens)) + tokens
    for block in others:
        tokens = block(tokens, encoder_hidden_states=text)
    output: Tensor = attention._get_output_for_continuous_inputs(
        hidden_states=tokens,
        residual=hidden.index_select(0, rows),
        batch_size=tokens.shape[0],
        height=height,
        width=width,
        inner_dim=inner_dim,
    )
    return output


def run_up_blocks(
    unet: Any,
    sample: Tensor,
    skips: tuple[Tensor, ...],
    emb: Tensor,
    text: Text,
    last: Callable[[Any, Tensor, tuple[Tensor, ...]], Tensor] | None = None,
) -> Tensor:
    """A UNet's up blocks and its last convolution: sample [G,·,·,·] and every skip connection → [G,4,h,w].

    Args:
        last: runs the last up block, given that, the sample and its skip connections; None runs it as it is.
    """
    # As diffusers has it: a size that the upsamplers do not give by doubling is handed on.
    uneven = any(size % 2**unet.num_upsamplers for size in skips[0].shape[-2:])
    for i, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        own, skips = skips[-count:], skips[:-count]
        if last is not None and i == len(unet.up_blocks) - 1:
            sample = last(block, sample, own)
            break
        fields: dict[str, Any] = {"hidden_states": sample, "temb": emb, "res_hidden_states_tuple": own}
        if uneven and i < len(unet.up_blocks) - 1:
            fields["upsample_size"] = skips[-1].shape[2:]
        if getattr(block, "has_cross_attention", False):
            fields["encoder_hidden_states"] = text
        sample = block(**fields)
    output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
    return output


def add(tensors: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sums, pair by pair."""
    return tuple(torch.add(a, b) for a, b in zip(tensors, others, strict=True))
