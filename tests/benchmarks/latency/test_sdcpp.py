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
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def test_the_files_are_of_the_checkpoint_under_the_original_names(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    """As stable-diffusion.cpp is given them, read back by diffusers."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint

    checkpoint, given = Checkpoint(str(tiny.checkpoint)), dict[str, Any]()
    monkeypatch.setitem(
        sys.modules,
        "stable_diffusion_cpp",
        types.SimpleNamespace(StableDiffusion=lambda **options: given.update(options)),
    )
    contender = sdcpp.StableDiffusionCpp(checkpoint, 1)
    contender._of("seg")
    base, control = (load_file(given[name]) for name in ("model_path", "control_net_path"))

    for found, module in (
        (convert_ldm_unet_checkpoint(base, checkpoint.config("unet")), checkpoint.unet(torch.float16)),
        (convert_controlnet_checkpoint(control, {"layers_per_block": 1}), checkpoint.controlnet("seg", torch.float16)),
    ):
        expected = module.state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    # src/conditioner.hpp looks for cond_stage_model.transformer.text_model.…
    assert base["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].dtype == torch.float16
    assert all(".text_model." in key for key in base if key.startswith("cond_stage_model."))


def test_what_it_cannot_do_is_one_line(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: Any) -> None:
        raise ValueError("Failed to load model")  # as its Python package does, whatever the reason is

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", types.SimpleNamespace(StableDiffusion=refuse))
    contender = sdcpp.StableDiffusionCpp(Checkpoint(str(tiny.checkpoint)), 1)
    unknown = next(make_requests(tiny.pipeline, "seg", [0], scheduler="unipc"))
    with pytest.raises(BackendError, match=r"has no unipc: give --scheduler, one of euler, dpmpp_2m, lcm$"):
        contender.generate(unknown)
    with pytest.raises(BackendError, match="cannot load the checkpoint: Failed to load model"):
        contender.generate(next(make_requests(tiny.pipeline, "seg", [0], scheduler="euler")))
