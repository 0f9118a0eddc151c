"""A ControlNet in one file, in every layout that is published, against what diffusers itself loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from cnpp_trt.conditions import REWARD_CONTROLNET_REPOSITORY
from cnpp_trt.developer.random_models.checkpoint import make_controlnet, make_unet
from cnpp_trt.developer.random_models.hub import SINGLE_FILE, snapshot_of
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.exporter import export_bundle
from cnpp_trt.export.original_layout import original_controlnet
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.slow

State = dict[str, Tensor]


@pytest.fixture
def published(hub_home: Path) -> Path:
    """The folder of the canny ControlNet."""
    return snapshot_of(hub_home, REWARD_CONTROLNET_REPOSITORY) / "checkpoints" / "canny"


@pytest.fixture
def controlnet(published: Path) -> Any:
    return diffusers.ControlNetModel.from_pretrained(published)


def without_prefix(state: State) -> State:
    return {key.removeprefix("control_model."): t for key, t in state.items()}


def with_base(state: State) -> State:
    """As the first published files, control_sd15_*.pth, which hold the base model too."""
    return {**state, "model.diffusion_model.out.2.bias": torch.ones(4), "betas": torch.ones(1000)}


LAYOUTS: dict[str, Callable[[Any], State]] = {
    "controlnet++_canny_sd15.safetensors": lambda module: module.state_dict(),
    "diffusers_with_prefix.safetensors": lambda m: {f"control_model.{key}": t for key, t in m.state_dict().items()},
    "control_v11p_sd15_canny.pth": original_controlnet,
    "control_v11p_sd15_canny.safetensors": original_controlnet,
    "without_prefix.safetensors": lambda module: without_prefix(original_controlnet(module)),
    "control_sd15_canny.pth": lambda module: with_base(original_controlnet(module)),
    "diffusion_pytorch_model.bin": lambda module: module.state_dict(),
}


def save(state: State, file: Path) -> Path:
    state = {key: t.contiguous() for key, t in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if "v11p" in file.name else state, file)
    return file


def assert_same(ours: Any, theirs: Any) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    differing = {key for key in ours.config if ours.config[key] != theirs.config.get(key)}
    assert {key for key in differing if not key.startswith("_")} == set()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(base, published, controlnet, tmp_path, name, beside):
    file = save(LAYOUTS[name](controlnet), tmp_path / name)
    if beside:
        shutil.copy(published / "config.json", tmp_path)
    checkpoint = Checkpoint(str(base), {"canny": str(file)})
    checkpoint.check_controlnet("canny")
    checkpoint.check_weights(["controlnet_canny"])
    assert_same(checkpoint.controlnet("canny", torch.float32), controlnet)


@pytest.mark.parametrize("name", ["controlnet++_canny_sd15.safetensors", "control_v11p_sd15_canny.safetensors"])
def test_as_diffusers_reads_the_file(base, published, controlnet, tmp_path, name):
    file = save({k: t.half() for k, t in LAYOUTS[name](controlnet).items()}, tmp_path / name)
    theirs = diffusers.ControlNetModel.from_single_file(str(file), config=str(published), torch_dtype=torch.float32)
    assert_same(Checkpoint(str(base), {"canny": file}).controlnet("canny", torch.float32), theirs)


def test_a_file_on_the_hub(base, cached, controlnet):
    """`owner/name/folder/file`."""
    source = f"{REWARD_CONTROLNET_REPOSITORY}/checkpoints/canny/diffusion_pytorch_model.safetensors"
    checkpoint = Checkpoint(str(base), {"canny": source})
    assert_same(checkpoint.controlnet("canny", torch.float32), controlnet)
    whole = Checkpoint(str(base), {"canny": f"{REWARD_CONTROLNET_REPOSITORY}/checkpoints/canny"})
    assert checkpoint.controlnet_fingerprint("canny") == whole.controlnet_fingerprint("canny")


def test_the_published_sizes(tmp_path):
    """SD 1.5's own, under its original names, and what the published config.json of control_v11p_sd15_canny says."""
    from cnpp_trt.export.controlnet_file import config_of, controlnet_of

    with torch.device("meta"):
        unet = make_unet(False)
        controlnet = diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    original = original_controlnet(controlnet)
    for key in ("input_hint_block.14.weight", "zero_convs.11.0.weight", "middle_block.1.proj_in.weight"):
        assert f"control_model.{key}" in original
    state = controlnet_of(original, 2, "it")
    assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in controlnet.state_dict().items()}
    config = config_of(state, unet.config, None, "it")
    published = {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
        "cross_attention_dim": 768,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "resnet_time_scale_shift": "default",
        "use_linear_projection": False,
    }
    assert {key: config[key] for key in published} == published


def test_a_config_of_another_model_beside_it(base, controlnet, tmp_path):
    """A folder where downloads of all kinds lie."""
    file = save(controlnet.state_dict(), tmp_path / "a.safetensors")
    for other in (
        {"_class_name": "UNet2DConditionModel"},
        {"_class_name": "ControlNetModel", "block_out_channels": [8]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert_same(Checkpoint(str(base), {"canny": file}).controlnet("canny", torch.float32), controlnet)


def test_an_export(base, controlnet, tmp_path):
    file = save(original_controlnet(controlnet), tmp_path / "control_v11p_sd15_canny.pth")
    bundle = export_bundle(Checkpoint(str(base), {"canny": file}), ["canny"], tmp_path / "bundle")
    assert bundle.manifest.conditions["canny"].get("source") == file.name


def refused(base: Path, file: Path, **parts: Any) -> str:
    checkpoint = Checkpoint(str(base), {"canny": file}, **parts)
    with pytest.raises(UserError) as error:
        checkpoint.check_controlnet("canny")
        checkpoint.check_weights(["controlnet_canny"])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_controlnet", "a Control-LoRA"),
        ("add_embedding.linear_1.weight", "for SDXL"),
        ("label_emb.0.0.weight", "for SDXL"),
        ("task_embedding", "of several conditions"),
        ("body.0.in_conv.weight", "a T2I-Adapter"),
        ("something.else", "is no ControlNet in one file (it has something.else)"),
    ],
)
def test_files_of_other_kinds(base, tmp_path, key, kind):
    assert kind in refused(base, save({key: torch.ones(2, 2)}, tmp_path / "a.safetensors"))


def test_files_that_are_none(base, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert "cut off or damaged" in refused(base, tmp_path / "a.safetensors")
    assert "is no ControlNet in one file" in refused(base, base / f"{SINGLE_FILE}.safetensors")
    assert "is no ControlNet in one file" in refused(base, base / "unet" / "diffusion_pytorch_model.safetensors")


def test_one_for_another_width(base, tmp_path):
    other = make_controlnet(make_unet(True, cross_attention_dim=24), True)
    message = refused(base, save(original_controlnet(other), tmp_path / "a.safetensors"))
    assert "cross_attention_dim is 24, not 32" in message


@pytest.mark.parametrize("layout", ["controlnet++_canny_sd15.safetensors", "control_v11p_sd15_canny.safetensors"])
def test_every_weight_is_needed(base, controlnet, tmp_path, layout):
    state = LAYOUTS[layout](controlnet)
    for key in sorted(state)[::7]:
        rest = {k: t for k, t in state.items() if k != key}
        assert refused(base, save(rest, tmp_path / "a.safetensors"))


# A single file of a whole model, without its VAE


def test_a_model_without_a_vae(base, tmp_path):
    """What is missing is asked for, and then it loads."""
    state = load_file(base / f"{SINGLE_FILE}.safetensors")
    own = {key: t for key, t in state.items() if not key.startswith("first_stage_model.")}
    file = save(own, tmp_path / "noVAE.safetensors")
    components = ("unet", "vae", "text_encoder")
    with pytest.raises(UserError, match="has a UNet but no VAE: give one with --vae"):
        Checkpoint(str(file), config=str(base)).check_weights(components)
    checkpoint = Checkpoint(str(file), config=str(base), vae=str(base / "vae"))
    checkpoint.check_weights(components)
    theirs = diffusers.AutoencoderKL.from_pretrained(base / "vae").state_dict()
    assert all(torch.equal(t, theirs[key]) for key, t in checkpoint.vae(torch.float32).state_dict().items())
    unread = {
        "cond_stage_model.transformer.text_projection.weight": torch.eye(32),
        "cond_stage_model.logit_scale": torch.ones(1),
    }
    Checkpoint(str(save({**own, **unread}, file)), config=str(base), vae=str(base)).check_weights(components)
