"""Configs of diffusers' UNet and ControlNet that export takes, at sizes that PyTorch runs in milliseconds."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": (CROSS, PLAIN),
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
UP: dict[str, Any] = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
CONFIGS: dict[str, dict[str, Any]] = {
    "as SD 1.5": {},
    "no attention before the second level": {"down_block_types": (PLAIN, CROSS)},
    "no attention on the way down": {"down_block_types": (PLAIN, PLAIN)},
    "several layers in a transformer": {"transformer_layers_per_block": 2},
    "projections as linear layers": {"use_linear_projection": True},
    "cross-attention alone": {"only_cross_attention": True},
    "scale and shift by time": {"resnet_time_scale_shift": "scale_shift"},
}
ROWS = torch.tensor([0, 1, 2, 0, 1, 2])


def small_controlnet(config: Mapping[str, Any]) -> Any:
    """A ControlNet with random weights whose hint comes in ready."""
    net: Any = ControlNetModel(**config).eval()
    for parameter in net.parameters():  # its last convolutions begin as zeros
        nn.init.normal_(parameter, std=0.2)
    net.controlnet_cond_embedding = nn.Identity()
    return net


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Three images with two prompts each."""
    torch.manual_seed(1)
    return torch.randn(3, 4, *size), torch.tensor([601.0]), torch.randn(6, 7, 12)


def close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
