"""What all prompts of an image share is computed once: the results are diffusers' own, which computes all of it."""

from typing import Any

import pytest
import torch
from cnpp_trt.export import modules
from cnpp_trt.export.shared_prefix import run_down_blocks
from diffusers import ControlNetModel, UNet2DConditionModel
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


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Three images with two prompts each."""
    torch.manual_seed(1)
    return torch.randn(3, 4, *size), torch.tensor([601.0]), torch.randn(6, 7, 12)


def close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_results_are_diffusers_own(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = {**CONFIG, **CONFIGS[name]}
    x, t, prompts = inputs(size)
    net: Any = ControlNetModel(**config).eval()
    for parameter in net.parameters():  # its last convolutions begin as zeros
        nn.init.normal_(parameter, std=0.2)
    net.controlnet_cond_embedding = nn.Identity()
    hint = torch.randn(3, 8, *size)
    down, mid = net(x[ROWS], t, encoder_hidden_states=prompts, controlnet_cond=hint[ROWS], return_dict=False)
    scales = torch.rand(len(down) + 1, 6)
    expected = [r * s[:, None, None, None] for r, s in zip((*down, mid), scales, strict=True)]
    found = modules.ControlNet(net)(x, t, prompts, ROWS, hint, scales)
    close(found, expected)

    unet: Any = UNet2DConditionModel(**config, **UP, center_input_sample=True).eval()
    fields = {"down_block_additional_residuals": expected[:-1], "mid_block_additional_residual": expected[-1]}
    want = unet(x[ROWS], t, encoder_hidden_states=prompts, **fields, return_dict=False)
    close([modules.UNet(unet)(x, t, prompts, ROWS, tuple(expected))], want)
    # Rows that share nothing are the whole batch.
    close([modules.UNet(unet)(x[ROWS], t, prompts, torch.arange(6), tuple(expected))], want)


@torch.inference_mode()
def test_a_unet_that_reads_its_guidance_scale() -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**CONFIG, **UP, time_cond_proj_dim=5).eval()
    x, t, prompts = inputs((8, 8))
    scale = torch.randn(3, 5)
    residuals = [torch.zeros(1)] * 7
    fields = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    want = unet(x, t, encoder_hidden_states=prompts[:3], timestep_cond=scale, **fields, return_dict=False)
    close([modules.UNet(unet)(x, t, prompts[:3], torch.arange(3), tuple(residuals), scale)], want)


@torch.inference_mode()
def test_before_the_first_cross_attention_each_image_is_computed_once() -> None:
    unet: Any = UNet2DConditionModel(**CONFIG, **UP).eval()
    x, _, prompts = inputs((8, 8))
    seen: dict[str, int] = {}
    block = unet.down_blocks[0]
    first, second = block.attentions[0].transformer_blocks[0], block.attentions[1].transformer_blocks[0]
    named = {"resnet": block.resnets[0], "self": first.attn1, "cross": first.attn2, "later": second.attn1}
    for name, module in named.items():
        module.register_forward_hook(lambda _, given, __, name=name: seen.update({name: len(given[0])}))
    run_down_blocks(unet, unet.conv_in(x), torch.zeros(1, 32), prompts, ROWS)
    assert seen == {"resnet": 3, "self": 3, "cross": 6, "later": 6}
