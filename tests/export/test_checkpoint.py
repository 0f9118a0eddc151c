"""Every checkpoint that cannot be used is refused in one line, before anything is written."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cnpp_trt.developer.random_models.checkpoint import make_checkpoint
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle

pytestmark = pytest.mark.slow


@pytest.fixture
def refuse(tmp_path: Path) -> Callable[..., str]:
    """An export of this checkpoint must be refused in one line and leave nothing; the line is returned."""

    def call(folder: Path | str, conditions: Any = ("seg",), controlnets: Any = None, **fields: Any) -> str:
        out = tmp_path / "out" / "bundle"
        with pytest.raises(UserError) as error:
            export_bundle(Checkpoint(str(folder), controlnets), conditions, out, **fields)
        message = str(error.value)
        assert "\n" not in message
        left = [p.name for p in out.parent.iterdir()] if out.parent.exists() else []
        assert [name for name in left if not name.endswith(".lock")] == []
        return message

    return call


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is KeyError:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def test_no_such_model(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refuse("nowhere")
    assert "no model 'nowhere'" in message
    assert "sd15" in message
    assert "HF_HUB_OFFLINE" in refuse("stabilityai/stable-diffusion-2")


def test_an_empty_folder(refuse, tmp_path):
    assert "has no unet" in refuse(tmp_path)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component(refuse, checkpoint_copy, component):
    shutil.rmtree(checkpoint_copy / component)
    assert component in refuse(checkpoint_copy)


def test_damaged_weights_found_while_exporting(refuse, checkpoint_copy):
    file = next((checkpoint_copy / "text_encoder").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    message = refuse(checkpoint_copy)
    assert f"{file} is cut off or damaged" in message


@pytest.mark.parametrize("component", ["vae", "text_encoder", "unet", "controlnet"])
@pytest.mark.parametrize("kept", [None, 0, 0.5, 0.99])
def test_missing_and_truncated_weights(checkpoint_copy, component, kept):
    folder = checkpoint_copy / component / ("seg" if component == "controlnet" else "")
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(content[: int(len(content) * kept)])
    checkpoint = Checkpoint(str(checkpoint_copy))
    load = partial(checkpoint.controlnet, "seg") if component == "controlnet" else getattr(checkpoint, component)
    with pytest.raises(UserError) as error:
        load(torch.float32)
    message = str(error.value)
    assert "\n" not in message
    if kept is None:
        assert f"there are no weights in {folder}".rstrip("/") in message
    else:
        assert f"{file} is cut off or damaged" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"unet"', "\x00"])
def test_a_config_that_is_none(refuse, checkpoint_copy, text):
    (checkpoint_copy / "unet" / "config.json").write_text(text)
    assert "config.json" in refuse(checkpoint_copy)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"addition_embed_type": "text_time"}, "SDXL"),
        ({"in_channels": 9}, "inpainting"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    ],
)
def test_other_architectures(refuse, checkpoint_copy, changes, word):
    edit(checkpoint_copy / "unet" / "config.json", **changes)
    assert word in refuse(checkpoint_copy)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("unet", "block_out_channels"),
        ("unet", "cross_attention_dim"),
        ("unet", "layers_per_block"),
        ("vae", "block_out_channels"),
    ],
)
def test_a_config_without_what_every_model_has(refuse, checkpoint_copy, component, key):
    edit(checkpoint_copy / component / "config.json", **{key: KeyError})
    assert f"has no {key}" in refuse(checkpoint_copy)


def test_no_controlnet(refuse, checkpoint_copy):
    message = refuse(checkpoint_copy, ["canny"])
    assert "no ControlNet for 'canny'" in message
    assert "--controlnet canny=PATH" in message


def test_no_condition(refuse, checkpoint_copy):
    assert "no condition given" in refuse(checkpoint_copy, [])


@pytest.mark.parametrize("condition", ["pose", "Seg", ""])
def test_unknown_conditions(refuse, checkpoint_copy, condition):
    assert f"unknown condition {condition!r}: choose from seg" in refuse(checkpoint_copy, ["seg", condition])
    assert f"unknown condition {condition!r}" in refuse(checkpoint_copy, ["seg"], {condition: checkpoint_copy})


@pytest.mark.parametrize("precision", ["bf16", "FP16", "", "int8"])
def test_unknown_precisions(refuse, checkpoint_copy, precision):
    assert f"unknown precision {precision!r}: choose fp32 or fp16" in refuse(checkpoint_copy, precision=precision)


@pytest.mark.parametrize("size", [(100, 100), (63, 64), (64, 63), (56, 64), (4096, 64), (64, 2056), (0, 0), (-64, 64)])
def test_sizes_that_cannot_be_used(refuse, checkpoint_copy, size):
    message = refuse(checkpoint_copy, size=size)
    assert f"size {size[0]}x{size[1]} cannot be used" in message
    assert "multiples of 8, 64 to 2048" in message


def test_the_default_size_is_the_unets_own(checkpoint_copy):
    assert Checkpoint(str(checkpoint_copy)).size(None) == (64, 64)
    edit(checkpoint_copy / "unet" / "config.json", sample_size=[16, 24])  # height and width, of the latents
    assert Checkpoint(str(checkpoint_copy)).size(None) == (192, 128)
    assert Checkpoint(str(checkpoint_copy)).size((72, 2048)) == (72, 2048)


@pytest.fixture(scope="module")
def other_controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ControlNet of another UNet's width."""
    from diffusers import ControlNetModel

    folder = tmp_path_factory.mktemp("other")
    ControlNetModel(
        block_out_channels=(8, 16),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
    ).save_pretrained(folder)
    return folder


def test_a_controlnet_of_another_width(other_controlnet, checkpoint_copy):
    checkpoint = Checkpoint(str(checkpoint_copy), {"seg": other_controlnet})
    with pytest.raises(UserError, match=r"does not fit this UNet: block_out_channels is \[8, 16\], not \[16, 32\]"):
        checkpoint.controlnet("seg", torch.float32)


def test_a_controlnet_of_another_architecture(refuse, checkpoint_copy):
    edit(checkpoint_copy / "controlnet" / "seg" / "config.json", global_pool_conditions=True)
    with pytest.raises(UserError, match="global_pool_conditions, which is not supported"):
        Checkpoint(str(checkpoint_copy)).controlnet("seg", torch.float32)


def test_a_controlnet_one_level_down_is_found(checkpoint_copy, tmp_path):
    """As limingcv/reward_controlnet publishes some."""
    published = tmp_path / "published"
    shutil.copytree(checkpoint_copy / "controlnet" / "seg", published / "controlnet")
    source = Checkpoint(str(checkpoint_copy), {"hed": published}).resolved.controlnet("hed")
    assert source.uri == str(published / "controlnet")


def test_examples_must_be_there(checkpoint_copy):
    folder = checkpoint_copy / "examples"
    folder.mkdir()
    listed = {"defaults": {"guidance_scale": 3}, "examples": {"seg": {"image": "seg.png", "prompt": "a house"}}}
    (folder / "examples.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"names no image for 'seg'"):
        Checkpoint(str(checkpoint_copy)).examples()
    (folder / "seg.png").write_bytes(b"")
    assert Checkpoint(str(checkpoint_copy)).examples() == (listed["defaults"], listed["examples"])


def test_fingerprints_tell_base_models_apart(tiny_checkpoint, checkpoint_copy, tmp_path):
    same = Checkpoint(str(tiny_checkpoint)).fingerprint()
    shutil.rmtree(checkpoint_copy / "controlnet")
    assert Checkpoint(str(checkpoint_copy)).fingerprint() == same
    other = make_checkpoint(tmp_path / "other", tiny=True, conditions=(), seed=1)
    assert Checkpoint(str(other)).fingerprint() != same
