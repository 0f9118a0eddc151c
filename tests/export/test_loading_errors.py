"""Every checkpoint that cannot be loaded is refused in one line that says why, and nothing half-made is left."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cnpp_trt.developer.random_models.checkpoint import make_controlnet, make_text_encoder, make_unet, make_vae
from cnpp_trt.developer.random_models.hub import SINGLE_FILE, snapshot_of
from cnpp_trt.developer.random_models.lora import make_embedding, make_lora
from cnpp_trt.export.original_layout import original_layout
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

Refuse = Callable[..., str]


@pytest.fixture
def refuse(refused: Refuse, cached: Path, tmp_path: Path) -> Refuse:
    """An export with these arguments must be refused and leave nothing; the line is returned."""

    def call(*arguments: Any) -> str:
        message = refused("export", "--cond", "canny", *arguments, "--out", tmp_path / "out" / "bundle")
        left = [p.name for p in (tmp_path / "out").glob("*") if p.suffix != ".lock"]
        assert left == []
        return message

    return call


@pytest.fixture
def folder(base: Path, cached: Path, tmp_path: Path) -> Path:
    """A whole model in a folder, `model/controlnet/canny` included, to be damaged."""
    model = tmp_path / "model"
    shutil.copytree(base, model, ignore=shutil.ignore_patterns("*.bin", "*.fp16.*", f"{SINGLE_FILE}*"))
    controlnet = snapshot_of(cached, "limingcv/reward_controlnet") / "checkpoints" / "canny"
    shutil.copytree(controlnet, model / "controlnet" / "canny")
    return model


@pytest.fixture
def single(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(base / f"{SINGLE_FILE}.safetensors", tmp_path / "single.safetensors"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Writes a file of weights again, with other ones."""
    state = load_file(file)
    change(state)
    save_file(state, file)


def drop(prefix: str, state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def halve(file: Path) -> Path:
    os.truncate(file, file.stat().st_size // 2)
    return file


# Other architectures


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unet": {"addition_embed_type": "text_time", "cross_attention_dim": 2048}}, "SDXL"),
        ({"unet": {"cross_attention_dim": 1024}}, "prompts of width 1024"),
        ({"unet": {"in_channels": 9}}, "inpainting"),
        ({"unet": {"_class_name": "UNet3DConditionModel"}}, "UNet3DConditionModel"),
        ({"text_encoder": {"architectures": ["T5EncoderModel"]}}, "T5EncoderModel"),
    ],
)
def test_a_folder_of_another_architecture(refuse, folder, changes, reason):
    for component, settings in changes.items():
        edit(folder / component / "config.json", **settings)
    message = refuse("--model", folder)
    assert message.startswith(f"{folder} ") or "UNet of" in message
    assert reason in message


def test_a_stable_diffusion_2_folder_and_a_controlnet_for_1(refuse, folder):
    """Both parts of SD 2 agree; what does not is the ControlNet."""
    edit(folder / "unet" / "config.json", cross_attention_dim=1024)
    edit(folder / "text_encoder" / "config.json", hidden_size=1024)
    assert "cross_attention_dim is 32, not 1024 (one of SD 2, the other of SD 1?)" in refuse("--model", folder)


def test_a_pipeline_without_a_unet(refuse, folder):
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "transformer": []}))
    assert refuse("--model", folder) == (
        f"{folder} is a FluxPipeline without a UNet: only SD-1.x models can be exported"
    )


def test_folders_that_are_no_model_at_all(refuse, tmp_path):
    (tmp_path / "photos").mkdir()
    assert f"{tmp_path / 'photos'} has no unet" in refuse("--model", tmp_path / "photos")


def test_what_is_no_name(refuse):
    reasons = {
        "": "no model ''",
        "sd1.5": "no model 'sd1.5': choose miniature, miniature-lcm, miniature-controlnet, sd15, seg-coco",
        "https://huggingface.co/owner/name": "is a web address: write owner/name",
        "owner/name@@x": "there is no 'owner/name@@x'",
        "../gone": "there is no '../gone'",
        "owner/na--me": "no name of a repository",
    }
    for name, reason in reasons.items():
        assert reason in refuse("--model", name)


def test_configs_for_what_has_its_own(refuse):
    assert "--config is for a model in one file" in refuse("--model", "sd15", "--config", "sd15")


def test_repositories_of_other_parts(refuse):
    """What a user may take for a model."""
    assert "has no unet" in refuse("--model", "latent-consistency/lcm-lora-sdv1-5")
    assert "has no unet" in refuse("--model", "limingcv/reward_controlnet/checkpoints/canny")


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("conditioner.embedders.0.", "is an SDXL model"),
        ("cond_stage_model.model.", "is an SD-2 model"),
        ("control_model.", "is a ControlNet in its original layout"),
    ],
)
def test_a_single_file_of_another_architecture(refuse, single, prefix, reason):
    def rename(state: dict[str, torch.Tensor]) -> None:
        state[f"{prefix}x"] = torch.zeros(1)

    change(single, rename)
    assert reason in refuse("--model", single, "--controlnet", "sd15")


def test_a_single_inpainting_model(refuse, tmp_path, base):
    unet, vae = make_unet(True, in_channels=9), make_vae(True)
    text = {f"text_model.{key}": t for key, t in make_text_encoder(True).state_dict().items()}
    save_file(original_layout(unet, vae, text), tmp_path / "inpainting.safetensors")
    assert "reads 9 channels (an inpainting model?)" in refuse(
        "--model", tmp_path / "inpainting.safetensors", "--controlnet", "sd15"
    )


def test_files_that_are_no_model(refuse, tmp_path, base, cached):
    lora = snapshot_of(cached, "latent-consistency/lcm-lora-sdv1-5") / "pytorch_lora_weights.safetensors"
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "notes.txt").write_text("a list")
    (tmp_path / "page.safetensors").write_text("<html>404</html>")
    reasons = {
        lora: "no Stable Diffusion model in one file (it has lora_unet_",
        vae: "no Stable Diffusion model in one file",
        tmp_path / "notes.txt": "cut off or damaged, or is no file of weights",
        tmp_path / "page.safetensors": "cut off or damaged, or is no file of weights",
    }
    for file, reason in reasons.items():
        message = refuse("--model", file, "--controlnet", "sd15")
        assert reason in message
        assert str(file) in message


# Damaged files


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "controlnet/canny"])
def test_truncated_safetensors(refuse, folder, component):
    file = halve(next((folder / component).glob("*.safetensors")))
    assert refuse("--model", folder).startswith(f"{file} is cut off or damaged")


@pytest.mark.parametrize("suffix", ["bin", "ckpt"])
def test_truncated_pickles(refuse, base, folder, tmp_path, suffix):
    if suffix == "ckpt":
        model = file = halve(Path(shutil.copy(base / f"{SINGLE_FILE}.ckpt", tmp_path)))
    else:
        model, name = folder, "unet/diffusion_pytorch_model"
        (folder / f"{name}.safetensors").unlink()
        file = halve(Path(shutil.copy(base / f"{name}.bin", folder / f"{name}.bin")))
    assert refuse("--model", model, "--controlnet", "sd15").startswith(f"{file} is cut off or damaged")


class _Code:
    """What a pickle of it does when it is loaded the ordinary way."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_with_code_in_it(refuse, tmp_path, wrapped):
    """PyTorch's own container, and a bare pickle."""
    file, made = tmp_path / "model.ckpt", tmp_path / "made"
    content = {"state_dict": {"x": torch.zeros(1)}, "callbacks": _Code(made)}
    if wrapped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    message = refuse("--model", file, "--controlnet", "sd15")
    assert message == (
        f"{file} holds more than weights, code that would run: it is not loaded; get a .safetensors of it"
    )
    assert not made.exists()


# Weights and configs that do not belong together


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "controlnet/canny"])
def test_missing_unexpected_and_other_weights(refuse, folder, component):
    file = next((folder / component).glob("*.safetensors"))
    whole = file.read_bytes()
    key = sorted(k for k in load_file(file) if k.endswith("weight"))[0]
    change(file, lambda state: state.pop(key))
    message = refuse("--model", folder)
    assert "lacks 1 of its" in message
    assert key.removeprefix("text_model.") in message
    file.write_bytes(whole)
    change(file, lambda state: state.update(surplus=torch.zeros(1)))
    assert "has a weight that its config.json knows nothing of: surplus" in refuse("--model", folder)
    file.write_bytes(whole)
    change(file, lambda state: state.update({key: torch.zeros(3)}))
    assert "of shape [3], its config.json says" in refuse("--model", folder)


def test_a_single_file_with_a_part_missing(refuse, single):
    whole = single.read_bytes()
    for prefix, what in (("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")):
        single.write_bytes(whole)
        change(single, partial(drop, prefix))
        assert f"has a UNet but no {what}" in refuse("--model", single, "--controlnet", "sd15")


def test_a_single_file_of_other_sizes_than_its_configs(refuse, base, single, tmp_path):
    configs = shutil.copytree(base, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    edit(configs / "unet" / "config.json", block_out_channels=[32, 64])
    message = refuse("--model", single, "--config", configs, "--controlnet", "canny=sd15")
    assert "block_out_channels" in message


@pytest.mark.parametrize("missing", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_file(refuse, folder, missing):
    (folder / "unet" / missing).unlink()
    message = refuse("--model", folder)
    assert str(folder / "unet") in message
    assert ("there is no" if missing == "config.json" else "there are no weights in") in message


def test_a_variant_that_is_not_there(refuse, folder):
    message = refuse("--model", folder, "--variant", "fp16")
    assert message == f"there are no weights of variant 'fp16' in {folder}: leave --variant out"
    (folder / "vae" / "diffusion_pytorch_model.ema.safetensors").touch()
    message = refuse("--model", folder, "--variant", "fp16")
    assert message == f"there are no weights of variant 'fp16' in {folder}, only ema: choose with --variant"


def test_only_a_variant_is_there(refuse, folder):
    for file in (folder / "unet").glob("*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    message = refuse("--model", folder)
    assert "only diffusion_pytorch_model.fp16.safetensors: choose with --variant" in message


# ControlNets


def test_a_controlnet_that_does_not_fit(refuse, folder):
    make_controlnet(make_unet(True, cross_attention_dim=24), True).save_pretrained(folder / "other")
    message = refuse("--model", folder, "--controlnet", f"canny={folder / 'other'}")
    assert message.startswith(f"the ControlNet at {folder / 'other'} does not fit this UNet: cross_attention_dim is 24")


def test_what_is_no_controlnet(refuse, folder, cached):
    assert "only ControlNetModel can be exported" in refuse(
        "--model", folder, "--controlnet", f"canny={folder / 'vae'}"
    )
    assert "AutoencoderTiny" in refuse("--model", folder, "--controlnet", "canny=madebyollin/taesd")
    missing = refuse("--model", folder, "--controlnet", "canny=madebyollin/taesd/canny")
    assert "the hub's madebyollin/taesd has no file or folder 'canny' (in the hub's cache" in missing


def test_a_condition_that_the_model_has_not(refuse, folder):
    assert "seg-coco has no 'canny', only seg" in refuse("--model", "seg-coco")
    shutil.rmtree(folder / "controlnet")
    assert "--controlnet sd15" in refuse("--model", folder)


# What is put into the base model


def test_loras_that_do_not_fit(refuse, folder, tmp_path):
    wide = make_lora(tmp_path / "wide.safetensors", make_unet(True, cross_attention_dim=24), layout="kohya")
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "flux.safetensors"
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    cut = halve(make_lora(tmp_path / "cut.safetensors", make_unet(True)))
    for file in (wide, tmp_path / "flux.safetensors", tmp_path / "x.safetensors", cut):
        assert file.name in refuse("--model", folder, "--lora", file)
    assert "gone.safetensors" in refuse("--model", folder, "--lora", tmp_path / "gone.safetensors")
    assert "no weight for the LoRA" in refuse("--model", folder, "--lora", f"{wide}:strong")


def test_embeddings_that_do_not_fit(refuse, folder, tmp_path):
    file = make_embedding(tmp_path / "cat.safetensors", width=768)
    assert "vectors of width 768, this text encoder's are 32 wide" in refuse("--model", folder, "--embedding", file)
    own = make_embedding(tmp_path / "own.safetensors", width=32)
    assert "knows 'a' already" in refuse("--model", folder, "--embedding", f"{own}:a")
    assert "own.safetensors" in refuse("--model", folder, "--embedding", halve(own))


def test_a_vae_that_is_none(refuse, folder):
    assert "UNet2DConditionModel" in refuse("--model", folder, "--vae", folder / "unet")
    assert "gone" in refuse("--model", folder, "--vae", "./gone")


# Extractors


def test_extractors_that_do_not_fit(refuse, cached, tmp_path):
    upernet = snapshot_of(cached, "openmmlab/upernet-convnext-small")
    wrong = {
        f"depth={upernet}": "is a UperNetForSemanticSegmentation, not a DPTForDepthEstimation",
        "hed=Intel/dpt-large": "has no ControlNetHED.pth",
        "hed=lllyasviel/Annotators/sk_model.pth": "lacks",
        f"seg={tmp_path / 'gone'}": "seg extractor: there is no",
        "sea=sd15": "unknown condition 'sea'",
    }
    for given, reason in wrong.items():
        condition = given.partition("=")[0]
        others = ["--cond", condition] if condition != "sea" else []
        assert reason in refuse("--model", "sd15", *others, "--extractor", given)


@pytest.mark.parametrize(("condition", "name"), [("seg", "pytorch_model.bin"), ("hed", "ControlNetHED.pth")])
def test_truncated_extractors(refuse, cached, tmp_path, condition, name):
    source = {"seg": "openmmlab/upernet-convnext-small", "hed": "lllyasviel/Annotators"}[condition]
    folder = shutil.copytree(snapshot_of(cached, source), tmp_path / "extractor")
    file = halve(folder / name)
    message = refuse("--model", "sd15", "--cond", condition, "--extractor", f"{condition}={folder}")
    assert message.startswith(f"{file} is cut off or damaged")
