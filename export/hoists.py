"""What does not change from step to step, taken out of a UNet or a ControlNet into modules of its own.

Keys and values of every cross-attention depend on the prompt alone, what a ResNet block adds of the time step on the
time step alone. Exact: the products are the same, made once instead of at every step. What is left takes their results
as inputs, through diffusers' own places for them: an attention processor, and the projection of the time embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class TextKv(nn.Module):
    """prompt_embeds [G,T,D] → k_0, v_0, k_1 and so on: keys and values of each cross-attention, [G,T,C] each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projections = nn.ModuleList(p for a in cross_attentions(model) for p in (a.to_k, a.to_v))

    def forward(self, prompt_embeds: Tensor) -> tuple[Tensor, ...]:
        return tuple(projection(prompt_embeds) for projection in self.projections)


class TimeEmbeds(nn.Module):
    """timesteps float32 [N], timestep_cond [B,E] of a distilled UNet → time_embeds [N,1,W], or [N,B,W].

    Of each step one row: what every ResNet block adds (or scales and shifts by) one after the other, W values.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_proj = model.time_proj
        self.time_embedding = model.time_embedding
        blocks = list(_time_blocks(model))
        self.activation = nn.Identity() if blocks[0].skip_time_act else blocks[0].nonlinearity
        self.projections = nn.ModuleList(block.time_emb_proj for block in blocks)

    def forward(self, timesteps: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        waves = self.time_proj(timesteps).to(self.time_embedding.linear_1.weight.dtype)
        emb = self.activation(self.time_embedding(waves[:, None], timestep_cond))
        return torch.cat([projection(emb) for projection in self.projections], -1)


def kv_widths(model: Any) -> list[int]:
    """C of each cross-attention, in the order of `TextKv`."""
    return [attention.to_k.out_features for attention in cross_attentions(model)]


def time_width(model: Any) -> int:
    """W of `TimeEmbeds`."""
    return sum(block.time_emb_proj.out_features for block in _time_blocks(model))


def take_keys_and_values(model: Any) -> None:
    """Every cross-attention reads, in the place of `encoder_hidden_states`, what `TextKv` gives. Changes the model."""
    for i, attention in enumerate(cross_attentions(model)):
        attention.to_k = attention.to_v = nn.Identity()
        attention.set_processor(_GivenKeysAndValues(i))


def take_time_embeds(model: Any) -> None:
    """Every ResNet block reads its part of a row of `TimeEmbeds`, in the place of `temb`. Changes the model."""
    start = 0
    for block in list(_time_blocks(model)):
        end = start + block.time_emb_proj.out_features
        block.time_emb_proj, block.skip_time_act = _Columns(start, end), True
        start = end
    model.time_embedding = nn.Identity()


def cross_attentions(model: Any) -> list[Any]:
    """Those of the way down, of the middle, and of the way up."""
    parts = (model.down_blocks, model.mid_block, getattr(model, "up_blocks", nn.ModuleList()))
    return [attention for part in parts for attention in _cross_attentions_of(part)]


def count_up(unet: Any) -> int:
    """How many of a UNet's cross-attentions are on the way up: the last ones."""
    return len(_cross_attentions_of(unet.up_blocks))


def count_last(unet: Any) -> int:
    """How many of a UNet's cross-attentions are in its outermost layer, the last one of its last up block."""
    attentions = getattr(unet.up_blocks[-1], "attentions", None)
    return len(_cross_attentions_of(attentions[-1])) if attentions else 0


def _cross_attentions_of(part: nn.Module) -> list[Any]:
    return [m for m in part.modules() if isinstance(m, Attention) and m.is_cross_attention]


def _time_blocks(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None)


class _Columns(nn.Module):
    """Of rows [·,W] the columns of one block."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, self.start : self.end]


class _GivenKeysAndValues:
    """diffusers' `AttnProcessor2_0` (models/attention_processor.py) with keys and values that are ready.

    For the cross-attentions of the configs that `configs.py` lets through.

    Args:
        index: of the attention in `cross_attentions`.
    """

    def __init__(self, index: int) -> None:
        self._index = index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, ...],
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        keys, values = encoder_hidden_states[2 * self._index : 2 * self._index + 2]
        batch, width = hidden_states.shape[0], keys.shape[-1]

        def by_head(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2)

        query = attn.to_q(hidden_states)
        found = scaled_dot_product_attention(by_head(query), by_head(keys), by_head(values))
        output: Tensor = attn.to_out[1](attn.to_out[0](found.transpose(1, 2).reshape(batch, -1, width)))
        return output / attn.rescale_output_factor
