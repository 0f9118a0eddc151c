"""A fused LoRA against the formula, and files that do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import MINIATURE, Checkpoint
from cnpp_trt.export.lora import fuse_lora
from safetensors.torch import load_file, save_file


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 5, 3), "linear": torch.nn.Linear(4, 6)})


def lora(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    weights: dict[str, torch.Tensor | None] = {
        "unet.conv.lora_A.weight": torch.randn(2, 3, 3, 3),
        "unet.conv.lora_B.weight": torch.randn(5, 2, 1, 1),
        "unet.linear.lora_A.weight": torch.randn(2, 4),
        "unet.linear.lora_B.weight": torch.randn(6, 2),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    file = tmp_path / "lora.safetensors"
    save_file({key: value for key, value in weights.items() if value is not None}, file)
    return file


def test_fused_is_base_plus_two_layers_in_a_row(tmp_path: Path) -> None:
    """What a LoRA does unfused: its A layer, then its B layer, beside the base's own."""
    file, base, fused = lora(tmp_path), module(), module()
    fuse_lora(fused, file)
    w = load_file(file)
    image, row = torch.randn(1, 3, 8, 8), torch.randn(2, 4)
    beside = torch.conv2d(torch.conv2d(image, w["unet.conv.lora_A.weight"]), w["unet.conv.lora_B.weight"])
    assert torch.allclose(fused["conv"](image), base["conv"](image) + beside, atol=1e-5)
    beside = row @ w["unet.linear.lora_A.weight"].T @ w["unet.linear.lora_B.weight"].T
    assert torch.allclose(fused["linear"](row), base["linear"](row) + beside, atol=1e-5)


ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet__conv__lora_B__weight": None}, "not a LoRA that can be fused"),
        ({"unet__other__lora_A__weight": ONE, "unet__other__lora_B__weight": ONE.clone()}, "does not fit"),
        ({"text_encoder__x__lora_A__weight": ONE}, "not a LoRA that can be fused"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuse_lora(module(), lora(tmp_path, **changes))


def test_no_lora_file(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read the LoRA"):
        fuse_lora(module(), tmp_path / "lora.safetensors")


def test_the_miniatures_few_step_model() -> None:
    plain, few = Checkpoint("miniature"), Checkpoint("miniature-lcm")
    assert few.folder == plain.folder == MINIATURE
    assert few.fingerprint() != plain.fingerprint()
    assert few.examples()[0] == {"guidance_scale": 1.0, "num_inference_steps": 4, "scheduler": "lcm"}
    before, after = plain.unet(torch.float32).state_dict(), few.unet(torch.float32).state_dict()
    changed = [k for k in before if not np.array_equal(before[k].numpy(), after[k].numpy())]
    assert len(changed) > 50 and all(k.endswith("weight") for k in changed)
