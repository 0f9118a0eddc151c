"""stable-diffusion.cpp as a contender: the names in its files, and how it fails. It is not installed for tests."""

import sys
import types
from typing import Any

import pytest
import torch
from cnpp_trt.benchmarks.latency import sdcpp
from cnpp_trt.benchmarks.requests import make_requests
from cnpp_trt.errors import BackendError
from cnpp_trt.export.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


def test_a_controlnets_original_names_are_read_back_by_diffusers():
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    torch.manual_seed(0)
    controlnet: Any = ControlNetModel(
        block_out_channels=(8, 16, 24, 24), cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8, 12, 16),
    )  # fmt: skip
    expected = controlnet.state_dict()
    named = sdcpp.original_names(expected)
    assert named["input_blocks.3.0.op.weight"].shape == (8, 8, 3, 3)
    assert named["middle_block_out.0.bias"].shape == (24,)
    found = convert_controlnet_checkpoint(dict(named), controlnet.config)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_names_that_no_controlnet_of_sd15_has():
    with pytest.raises(ValueError, match="add_embedding"):
        sdcpp.original_names({"add_embedding.linear_1.weight": torch.zeros(1)})


def test_the_base_model_has_the_prefixes_that_are_looked_for(tiny: Any):
    checkpoint = Checkpoint(str(tiny.checkpoint))
    found = sdcpp.base_weights(checkpoint)
    assert {key.split(".")[0] for key in found} == {"unet", "vae", "te"}
    # src/conditioner.hpp looks for cond_stage_model.transformer.text_model.…, which `te.` stands for.
    assert "te.text_model.embeddings.token_embedding.weight" in found
    assert all(key.startswith("te.text_model.") for key in found if key.startswith("te."))
    assert found["unet.conv_in.weight"].dtype == torch.float16


def test_what_it_cannot_do_is_one_line(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: Any) -> None:
        raise ValueError("Failed to load model")  # as its Python package does, whatever the reason is

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", types.SimpleNamespace(StableDiffusion=refuse))
    # Its mapping is of two layers to a block, which the tiny ControlNet has not: one that fits its names stands in.
    monkeypatch.setattr(sdcpp, "original_names", dict)
    contender = sdcpp.StableDiffusionCpp(Checkpoint(str(tiny.checkpoint)), 1)
    unknown = next(make_requests(tiny.pipeline, "seg", [0], scheduler="unipc"))
    with pytest.raises(BackendError, match=r"has no unipc: give --scheduler, one of euler, dpmpp_2m, lcm$"):
        contender.generate(unknown)
    with pytest.raises(BackendError, match="cannot load the checkpoint: Failed to load model"):
        contender.generate(next(make_requests(tiny.pipeline, "seg", [0], scheduler="euler")))
