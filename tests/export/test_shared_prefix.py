"""What all prompts of an image share is computed once: the results are diffusers' own, which computes all of it."""

from typing import Any

import pytest
import torch
from cnpp_trt.bundles.manifest import GraphOptions
from cnpp_trt.export import modules
from cnpp_trt.export.shared_prefix import run_down_blocks
from diffusers import UNet2DConditionModel
from small_networks import CONFIG, CONFIGS, ROWS, UP, close, inputs, small_controlnet

AS_ONE = GraphOptions(hoist_prompt=False, hoist_time=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 9)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_results_are_diffusers_own(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    config = {**CONFIG, **CONFIGS[name]}
    x, t, prompts = inputs(size)
    net = small_controlnet(config)
    hint = torch.randn(3, 8, *size)
    down, mid = net(x[ROWS], t, encoder_hidden_states=prompts, controlnet_cond=hint[ROWS], return_dict=False)
    scales = torch.rand(len(down) + 1, 6)
    expected = [r * s[:, None, None, None] for r, s in zip((*down, mid), scales, strict=True)]
    given = {"model_input": x, "timestep": t, "prompt_embeds": prompts}
    found = modules.ControlNet(net, AS_ONE)(rows=ROWS, hint=hint, scales=scales, **given)
    close(found, expected)

    unet: Any = UNet2DConditionModel(**config, **UP, center_input_sample=True).eval()
    fields = {"down_block_additional_residuals": expected[:-1], "mid_block_additional_residual": expected[-1]}
    want = unet(x[ROWS], t, encoder_hidden_states=prompts, **fields, return_dict=False)
    close([modules.UNet(unet, AS_ONE)(rows=ROWS, residuals=tuple(expected), **given)], want)
    # Rows that share nothing are the whole batch.
    given["model_input"] = x[ROWS]
    close([modules.UNet(unet, AS_ONE)(rows=torch.arange(6), residuals=tuple(expected), **given)], want)


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
