"""Configs of models: what diffusers writes for an SD-1.x model is taken, what no graph can have is refused."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from cnpp_trt.developer.random_models.checkpoint import make_unet
from cnpp_trt.developer.random_models.extractors import make_extractor
from cnpp_trt.developer.random_models.lora import make_lora
from cnpp_trt.errors import CnppError, UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.configs import checked
from cnpp_trt.export.extractors import open_extractor
from cnpp_trt.export.sources import Finder

pytestmark = pytest.mark.slow

COMPONENTS = ("unet", "vae", "text_encoder", "controlnet_seg")


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Its weights are links: only configs are changed."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model", copy_function=_link))


def _link(source: str, target: str) -> None:
    if source.endswith(".json"):
        shutil.copy(source, target)
    else:
        Path(target).symlink_to(source)


def look(folder: Path) -> None:
    """Everything that an export looks at before it exports."""
    checkpoint = Checkpoint(str(folder))
    checkpoint.check_controlnet("seg")
    checkpoint.size(None)
    checkpoint.examples()
    checkpoint.check_weights(COMPONENTS)
    checkpoint.check_tokenizer()


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        look(folder)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    return message


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
CONTROLNET = "controlnet/seg/config.json"


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (CONTROLNET, {"conditioning_channels": 1}, "conditioning_channels 1: only 3"),
        (CONTROLNET, {"conditioning_channels": 4}, "conditioning_channels 4: only 3"),
        (CONTROLNET, {"conditioning_channels": True}, "conditioning_channels True: only 3"),
        (CONTROLNET, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (CONTROLNET, {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type 'text_proj'"),
        (CONTROLNET, {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        (CONTROLNET, {"conditioning_embedding_out_channels": [8, 8, 16]}, "4 times smaller, this VAE an image 8"),
        (CONTROLNET, {"controlnet_conditioning_channel_order": "gbr"}, "channel_order"),
        (CONTROLNET, {"in_channels": 9}, "in_channels 9: only 4"),
        (UNET, {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        (UNET, {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8}, "encoder_hid_dim_type 'text_proj'"),
        (UNET, {"conv_in_kernel": 5}, "conv_in_kernel 5: only 3"),
        (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        (UNET, {"layers_per_block": [1, 1]}, "layers_per_block"),
        (UNET, {"cross_attention_dim": [32, 32]}, "prompts of width [32, 32]"),
        (UNET, {"transformer_layers_per_block": [1, 1]}, "transformer_layers_per_block"),
        (UNET, {"block_out_channels": [10**9, 10**9]}, "block_out_channels"),
        (UNET, {"block_out_channels": 16}, "block_out_channels"),
        (UNET, {"layers_per_block": 10**6}, "layers_per_block"),
        (UNET, {"norm_eps": float("nan")}, "NaN"),
        (UNET, {"sample_size": 10**6}, "sample_size"),
        (UNET, {"sample_size": 1}, "size 8x8 cannot be used"),
        (UNET, {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        (UNET, {"act_fn": "\x1b[31mred"}, r"act_fn"),
        (VAE, {"scaling_factor": None, "latent_channels": 16}, "latent_channels 16: only 4"),
        (VAE, {"shift_factor": 0.1}, "shift_factor 0.1"),
        (VAE, {"scaling_factor": 0}, "scaling_factor"),
        (VAE, {"latents_mean": [0.0]}, "latents_mean"),
        (TEXT, {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        (TEXT, {"vocab_size": 2**40}, "vocab_size"),
        (TEXT, {"max_position_embeddings": 248}, "max_position_embeddings 248: only 77"),
        (TEXT, {"hidden_act": "exec"}, "hidden_act"),
        (TEXT, {"eos_token_id": 600}, "eos_token_id 600, but only 600 tokens"),
        (TEXT, {"architectures": 5}, "has a 5 as its text encoder"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 50}, "model_max_length 50: only 77"),
        ("tokenizer/vocab.json", {"zebra": 99999}, "has the token 99999, the text encoder 600 rows"),
    ],
)
def test_what_no_graph_can_have(model, file, changes, reason):
    edit(model / file, **changes)
    assert reason in refused(model)


def test_what_a_module_has_by_default_is_taken():
    """Every key that today's diffusers writes, at SD 1.5's sizes."""
    with torch.device("meta"):
        unet = make_unet(False)
        controlnet = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        modules = [unet, controlnet, diffusers.AutoencoderKL(), diffusers.AutoencoderTiny()]
    for module in modules:
        kind = type(module).__name__
        written = json.loads(module.to_json_string())
        found = checked(kind, written, "it")
        with torch.device("meta"):
            again = getattr(diffusers, kind).from_config(found)
        assert {k: t.shape for k, t in again.state_dict().items()} == {
            k: t.shape for k, t in module.state_dict().items()
        }
        assert json.loads(again.to_json_string()) == written


def test_unknown_keys_are_left_out(model):
    for file in (UNET, VAE, TEXT, CONTROLNET):
        edit(model / file, quantization_config={"load_in_8bit": True}, _attn_implementation="flash", something=[1])
    look(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"a":' * 100_000])
@pytest.mark.parametrize("file", [UNET, VAE, TEXT, CONTROLNET, "model_index.json", "scheduler/scheduler_config.json"])
def test_what_is_no_config(model, file, text):
    (model / file).write_text(text)
    with pytest.raises(UserError, match=Path(file).name):
        look(model)
        Checkpoint(str(model)).config("scheduler")


VALUES: list[Any] = [
    *(None, True, 0, -1, 7, 10**6, 2**63, 10**400, 0.5, float("nan"), float("inf")),
    *("", "x", "\x1b[31m", "a" * 5000, [], [1], ["x"], [None], {}, {"a": 1}, [10**9] * 4, list(range(5000))),
]


@pytest.mark.parametrize("file", [UNET, VAE, TEXT, CONTROLNET, "tokenizer/tokenizer_config.json"])
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(model, file):
    """A sample, the same in every run."""
    path = model / file
    whole = json.loads(path.read_text())
    pairs = [(key, value) for key in whole for value in VALUES]
    for key, value in random.Random(0).sample(pairs, 60):
        path.write_text(json.dumps({**whole, key: value}))
        _taken_or_refused(lambda: look(model))


@pytest.mark.parametrize(("condition", "file"), [("seg", "config.json"), ("depth", "preprocessor_config.json")])
def test_any_value_of_an_extractors_config(tmp_path, condition, file):
    folder = make_extractor(condition, tmp_path / condition, tiny=True)
    whole = json.loads((folder / file).read_text())
    pairs = [(key, value) for key in whole for value in VALUES]
    for key, value in random.Random(0).sample(pairs, 30):
        (folder / file).write_text(json.dumps({**whole, key: value}))
        _taken_or_refused(lambda: open_extractor(condition, Finder().find(folder), 64, 64))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_flipped_bits_in_weights_are_taken_or_refused_in_one_line(model, tmp_path, suffix):
    lora = make_lora(tmp_path / f"lora.{suffix}", Checkpoint(str(model)).empty("unet"))
    whole, rng = lora.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(min(len(whole), 4000))] ^= 1 << rng.randrange(8)
        lora.write_bytes(damaged)
        _taken_or_refused(lambda: Checkpoint(str(model), loras=[str(lora)]).match_loras())


def _taken_or_refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except CnppError as e:
        assert str(e).isprintable() and len(str(e)) < 1500
