"""PEFT's own adapters against PEFT's merge, and settings that cannot be used."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from cnpp_trt.errors import UserError
from cnpp_trt.export.adapters import Patterns
from cnpp_trt.export.checkpoint import Checkpoint
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

pytestmark = pytest.mark.slow

UNET = ["to_q", "to_v", "conv1", "proj_in"]
TEXT = ["q_proj", "fc1"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {"conv1": 2, r"attn1\.to_q": 3, "layers.1.mlp.fc1": 2},
        "alpha_pattern": {r"mid_block.*\.to_q": 5, "conv1": 7, r"down_blocks\.\d+\.resnets.+conv1": 9, "fc1": 2},
    },
    "alternatives": {"lora_alpha": 3, "alpha_pattern": {r"(to_q|to_v)": 6, r"^up_blocks.*proj_in$": 2, "q_proj": 1}},
}


def adapter(module: nn.Module, folder: Path, targets: list[str], **settings: Any) -> nn.Module:
    """Saves an adapter of random weights with PEFT. Returns: the module with the adapter merged by PEFT."""
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings)
    model = get_peft_model(module, config)
    model.save_pretrained(str(folder))
    merged: nn.Module = cast(Any, model).merge_and_unload()
    return merged


def load(model: Path, component: str, *loras: str) -> nn.Module:
    module = getattr(Checkpoint(str(model), loras=loras), component)(torch.float32)
    assert isinstance(module, nn.Module)
    return module


def assert_close(ours: nn.Module, theirs: nn.Module, plain: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for key, weight in a.items():
        torch.testing.assert_close(weight, b[key], rtol=0, atol=1e-6, msg=partial("{}: {}".format, key))
    before = plain.state_dict()
    assert sum(not torch.equal(weight, before[key]) for key, weight in a.items()) > 2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("component", "targets"), [("unet", UNET), ("text_encoder", TEXT)])
def test_an_adapter_is_fused_as_by_peft(base, tmp_path, component, targets, settings):
    merged = adapter(load(base, component), tmp_path, targets, **SETTINGS[settings])
    checkpoint = Checkpoint(str(base), loras=[str(tmp_path)])
    (match,) = checkpoint.match_loras()
    assert match.unmatched == () and match.fused > 2
    assert_close(load(base, component, str(tmp_path)), merged, load(base, component))


@pytest.mark.parametrize("given", ["{folder}/adapter_model.safetensors", "{folder}/adapter_model.bin", "{folder}:0.5"])
def test_ways_to_name_an_adapter(base, tmp_path, given):
    plain = load(base, "unet")
    weight = 0.5 if given.endswith("0.5") else 1.0
    merged = adapter(load(base, "unet"), tmp_path, UNET, lora_alpha=8 * weight)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    if given.endswith(".bin"):
        torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
    assert_close(load(base, "unet", given.format(folder=tmp_path)), merged, plain)


def test_the_settings_are_part_of_the_fingerprint(base, tmp_path):
    adapter(load(base, "unet"), tmp_path, UNET, lora_alpha=8)
    before = Checkpoint(str(base), loras=[str(tmp_path)]).fingerprint()
    change(tmp_path, lora_alpha=9)
    assert Checkpoint(str(base), loras=[str(tmp_path)]).fingerprint() != before


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapter(load(base, "unet"), folder, UNET, lora_alpha=8)
    return folder


def refused(base: Path, folder: Path) -> str:
    with pytest.raises(UserError) as error:
        Checkpoint(str(base), loras=[str(folder)]).match_loras()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "NaN"),
        ({"lora_alpha": 1e999}, "NaN or Inf"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": 0}, "at `$.r`"),
        ({"r": -4}, "at `$.r`"),
        ({"r": 8}, "settings say 8"),
        ({"r": [4]}, "at `$.r`"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern"),
        ({"alpha_pattern": {"to_q": None}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "only names"),
        ({"alpha_pattern": {"(": 1}}, "only names"),
        ({"alpha_pattern": {".*.*.*a": 1}}, "only names"),
        ({"alpha_pattern": {"a" * 10_000: 1}}, "alpha_pattern"),
        ({"alpha_pattern": {f"a{i}": 1 for i in range(5000)}}, "5000 patterns"),
        ({"alpha_pattern": {f"a{i}.*b": 1 for i in range(50)}}, "50 patterns with"),
    ],
)
def test_settings_that_cannot_be_used(base, saved, tmp_path, settings, named):
    (tmp_path / "adapter_model.safetensors").symlink_to(saved / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    change(tmp_path, **settings)
    assert named in refused(base, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_damaged_settings(base, saved, tmp_path, text):
    (tmp_path / "adapter_model.safetensors").symlink_to(saved / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refused(base, tmp_path)


def test_an_adapter_without_its_settings(base, saved, tmp_path):
    (tmp_path / "adapter_model.safetensors").symlink_to(saved / "adapter_model.safetensors")
    assert "put its adapter_config.json beside it" in refused(base, tmp_path)
    (tmp_path / "adapter_config.json").symlink_to(saved / "adapter_config.json")
    assert Checkpoint(str(base), loras=[str(tmp_path)]).match_loras()[0].fused > 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none(base, saved, tmp_path, value):
    state = load_file(saved / "adapter_model.safetensors")
    key = sorted(state)[3]
    state[key].view(-1)[0] = value
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").symlink_to(saved / "adapter_config.json")
    assert f"has NaN or Inf in {key}" in refused(base, tmp_path)


NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.10.resnets.1.conv1",
    "mid_block.attentions.0.proj_in",
    "to_q",
    "conv1",
    "xconv1",
    "encoder.layers.1.mlp.fc1",
]
PATTERNS = [
    *NAMES,
    "conv1",
    "to_.",
    r"down_blocks.*to_q",
    r"down_blocks\.\d+\.resnets\.\d\.conv1",
    r"\d+.mlp.fc1",
    r"(to_q|conv1)",
    r"(?:attn1|attn2).to_q",
    r"^mid_block.+proj_in$",
    "^to_q",
    "block",
    "s.0.proj_in",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_pefts(pattern):
    ours = Patterns({pattern: 2.0}, "it")
    for name in NAMES:
        theirs = get_pattern_key([pattern], name)
        # Where nothing matches PEFT returns the name.
        found = theirs == pattern and (pattern != name or get_pattern_key([f"({pattern})"], name) != name)
        assert ours.value(name, 1.0) == (2.0 if found else 1.0), name


def test_the_first_pattern_counts():
    assert Patterns({"to_.": 2.0, "to_q": 3.0}, "it").value("a.to_q", 1.0) == 2.0


def test_hostile_patterns_take_no_time():
    table = {f"{'.*' if i < 16 else ''}a.*{i}x": 1.0 for i in range(32)}
    start = time.process_time()
    patterns = Patterns(table, "it")
    assert patterns.value("a." * 60 + "b", 1.0) == 1.0
    assert time.process_time() - start < 1
