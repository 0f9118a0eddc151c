"""What is computed before the loop, and a UNet in two halves: the results are diffusers' own."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from cnpp_trt.bundles.manifest import GraphOptions
from cnpp_trt.export import modules
from cnpp_trt.export.hoists import TextKv, TimeEmbeds, count_up, cross_attentions
from diffusers import UNet2DConditionModel
from small_networks import CONFIG, CONFIGS, ROWS, UP, close, inputs, small_controlnet
from torch import Tensor

pytestmark = pytest.mark.slow

BOTH = GraphOptions(hoist_prompt=True, hoist_time=True)
OPTIONS = [BOTH, GraphOptions(True, False), GraphOptions(False, True), GraphOptions(False, False)]
TIMES = torch.tensor([981.0, 601.0, 1.0])


def before_the_loop(net: Any, options: GraphOptions, t: Tensor, prompts: Tensor, cond: Any = None) -> dict[str, Any]:
    """What a network is given instead of the time step and the prompt, by another copy of it."""
    whole = deepcopy(net)
    found: dict[str, Any] = {}
    if options.hoist_time:
        # The second of three steps that are computed at once.
        found["time_embeds"] = TimeEmbeds(whole)(TIMES, cond)[1]
    else:
        found |= {"timestep": t} | ({} if cond is None else {"timestep_cond": cond})
    return found | ({"keys_values": TextKv(whole)(prompts)} if options.hoist_prompt else {"prompt_embeds": prompts})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_results_are_diffusers_own(name: str, options: GraphOptions) -> None:
    torch.manual_seed(0)
    config = {**CONFIG, **CONFIGS[name]}
    size = (6, 10)
    x, t, prompts = inputs(size)
    net = small_controlnet(config)
    hint = torch.randn(3, 8, *size)
    down, mid = net(x[ROWS], t, encoder_hidden_states=prompts, controlnet_cond=hint[ROWS], return_dict=False)
    scales = torch.rand(len(down) + 1, 6)
    expected = tuple(r * s[:, None, None, None] for r, s in zip((*down, mid), scales, strict=True))
    given = before_the_loop(net, options, t, prompts)
    close(modules.ControlNet(net, options)(model_input=x, rows=ROWS, hint=hint, scales=scales, **given), expected)

    unet: Any = UNet2DConditionModel(**config, **UP, center_input_sample=True).eval()
    fields = {"down_block_additional_residuals": expected[:-1], "mid_block_additional_residual": expected[-1]}
    want = unet(x[ROWS], t, encoder_hidden_states=prompts, **fields, return_dict=False)
    given = before_the_loop(unet, options, t, prompts)
    whole = modules.UNet(deepcopy(unet), options)
    close([whole(model_input=x, rows=ROWS, residuals=expected, **given)], want)
    close([in_two_halves(unet, options, x, expected, given)], want)


def in_two_halves(unet: Any, options: GraphOptions, x: Tensor, residuals: Any, given: dict[str, Any]) -> Tensor:
    below = 2 * (len(cross_attentions(unet)) - count_up(unet))
    encoder = modules.UNetEncoder(deepcopy(unet), options)
    decoder = modules.UNetDecoder(unet, options)
    sides = [{k: v for k, v in given.items() if k != "keys_values"} for _ in range(2)]
    if options.hoist_prompt:
        sides[0]["keys_values"], sides[1]["keys_values"] = given["keys_values"][:below], given["keys_values"][below:]
    rows = ROWS[: len(residuals[0])]
    *skips, encoded = encoder(model_input=x, rows=rows, **sides[0])
    time = given.get("time_embeds", given.get("timestep_cond"))
    if time is not None and len(time) > 1:
        sides[1]["rows"] = rows
    found: Tensor = decoder(skips=tuple(skips), encoded=encoded, residuals=residuals, **sides[1])
    return found


@pytest.mark.parametrize("options", OPTIONS)
@torch.inference_mode()
def test_a_unet_that_reads_its_guidance_scale(options: GraphOptions) -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**CONFIG, **UP, time_cond_proj_dim=5).eval()
    x, t, prompts = inputs((8, 8))
    scale = torch.randn(3, 5)
    _, skips = unet.config, 7
    residuals = tuple(torch.zeros(1) for _ in range(skips))
    fields = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    want = unet(x, t, encoder_hidden_states=prompts[:3], timestep_cond=scale, **fields, return_dict=False)
    given = before_the_loop(unet, options, t, prompts[:3], scale)
    whole = modules.UNet(deepcopy(unet), options)
    close([whole(model_input=x, rows=torch.arange(3), residuals=residuals, **given)], want)
    rows_of_images = [torch.zeros(3, 1, 1, 1) for _ in residuals]
    close([in_two_halves(unet, options, x, tuple(rows_of_images), given)], want)


@torch.inference_mode()
def test_nothing_of_the_prompt_or_the_time_step_is_left_in_the_network() -> None:
    unet: Any = UNet2DConditionModel(**CONFIG, **UP).eval()
    before = {name for name, _ in unet.named_parameters()}
    modules.UNet(unet, BOTH)
    gone = before - {name for name, _ in unet.named_parameters()}
    projections = ("attn2.to_k", "attn2.to_v", "time_emb_proj", "time_embedding")
    assert gone == {name for name in before if any(part in name for part in projections)}
