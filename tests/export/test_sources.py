"""Every way to name a checkpoint finds the same weights, which are those that diffusers and transformers find."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from cnpp_trt.conditions import CONDITIONS, REWARD_CONTROLNET_REPOSITORY
from cnpp_trt.developer.random_models.extractors import REPOSITORIES, photo
from cnpp_trt.developer.random_models.hub import BASE, COCO_STUFF, DISTILLED, SINGLE_FILE, snapshot_of
from cnpp_trt.developer.random_models.lora import make_embedding
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.extractors import open_extractor
from safetensors.torch import load_file, save_file
from torch import Tensor

COMPONENTS = ("unet", "vae", "text_encoder")
State = dict[str, Tensor]


def states(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    return {name: getattr(checkpoint, name)(dtype).state_dict() for name in COMPONENTS}


def assert_equal(ours: dict[str, State], theirs: dict[str, State]) -> None:
    for component, state in theirs.items():
        assert ours[component].keys() == state.keys()
        different = [key for key, tensor in state.items() if not torch.equal(ours[component][key], tensor)]
        assert different == []


@pytest.fixture(scope="session")
def published(base: Path) -> dict[str, State]:
    """What diffusers and transformers themselves load from the published files."""
    return {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(base / "unet").state_dict(),
        "vae": diffusers.AutoencoderKL.from_pretrained(base / "vae").state_dict(),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(base / "text_encoder").state_dict(),
    }


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """The published folder, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sd15", BASE, f"{BASE}@main", f"{BASE}@{{commit}}", f"{BASE}/", "{base}", "{base}/../{commit}"]
)
def test_names_of_one_folder(cached, base, published, name):
    checkpoint = Checkpoint(name.format(commit=base.name, base=base))
    assert_equal(states(checkpoint), published)
    assert checkpoint.fingerprint() == Checkpoint(str(base)).fingerprint()


@pytest.mark.parametrize("place", ["{base}/{file}.safetensors", "{base}/{file}.ckpt", f"{BASE}/{{file}}.safetensors"])
def test_a_single_file_has_the_folders_weights(cached, base, published, place):
    checkpoint = Checkpoint(place.format(base=base, file=SINGLE_FILE))
    assert_equal(states(checkpoint), published)
    prompt = "a red house"
    assert checkpoint.tokenizer()(prompt).input_ids == Checkpoint(str(base)).tokenizer()(prompt).input_ids
    assert checkpoint.config("scheduler") == Checkpoint(str(base)).config("scheduler")


def test_configs_of_a_single_file_from_elsewhere(base, published, tmp_path):
    """No hub is asked for Stable Diffusion 1.5's own."""
    file = Path(shutil.copy(base / f"{SINGLE_FILE}.safetensors", tmp_path))
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.ckpt")
    configs = shutil.copytree(base, tmp_path / "configs", ignore=weights)
    assert_equal(states(Checkpoint(str(file), config=str(configs))), published)


def test_pickles_alone(folder, published):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert_equal(states(Checkpoint(str(folder))), published)


@pytest.mark.parametrize("kept", ["*.fp16.safetensors", "*.fp16.bin"])
def test_a_variant(folder, published, kept):
    for file in folder.glob("*/*"):
        if file.suffix in (".safetensors", ".bin") and not file.match(kept):
            file.unlink()
    half = {name: {key: t.half() for key, t in state.items()} for name, state in published.items()}
    assert_equal(states(Checkpoint(str(folder), variant="fp16"), torch.float16), half)


def test_the_variant_is_asked_for(base, cached):
    """Beside each other, the variant's file is read only with its name."""
    file = Checkpoint("sd15", variant="fp16").unet(torch.float32).state_dict()["conv_in.weight"]
    whole = Checkpoint("sd15").unet(torch.float32).state_dict()["conv_in.weight"]
    assert torch.equal(file, whole.half().float())
    assert not torch.equal(file, whole)


def test_shards(folder, published):
    unet = folder / "unet"
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    for file in unet.glob("diffusion_pytorch_model*"):
        file.unlink()
    keys = sorted(state)
    for i, part in enumerate((keys[::2], keys[1::2])):
        save_file({key: state[key] for key in part}, unet / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    assert_equal(states(Checkpoint(str(folder))), published)


def test_todays_names_load_as_well(folder, published):
    """As diffusers and transformers save the same model now."""
    diffusers.AutoencoderKL.from_pretrained(folder / "vae").save_pretrained(folder / "vae")
    transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").save_pretrained(folder / "text_encoder")
    assert_equal(states(Checkpoint(str(folder))), published)


# ControlNets


def published_controlnet(home: Path, inside: str) -> Path:
    folder = snapshot_of(home, REWARD_CONTROLNET_REPOSITORY) / inside
    return folder if (folder / "config.json").is_file() else folder / "controlnet"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_named_models_controlnets(cached, condition):
    """Which are safetensors or pickles, in their folder or one level down."""
    folder = published_controlnet(cached, CONDITIONS[condition].checkpoint)
    ours = Checkpoint("sd15").controlnet(condition, torch.float32).state_dict()
    assert_equal({"": ours}, {"": diffusers.ControlNetModel.from_pretrained(folder).state_dict()})


def test_the_coco_stuff_controlnet(cached):
    checkpoint = Checkpoint("seg-coco")
    ours = checkpoint.controlnet("seg", torch.float32).state_dict()
    folder = published_controlnet(cached, COCO_STUFF)
    assert_equal({"": ours}, {"": diffusers.ControlNetModel.from_pretrained(folder).state_dict()})
    assert checkpoint.resolved.palette("seg") == "coco-stuff"
    assert Checkpoint("sd15").resolved.palette("seg") == "ade20k"


@pytest.mark.parametrize(
    "source",
    [
        "sd15",
        "limingcv/reward_controlnet/checkpoints/canny",
        "limingcv/reward_controlnet@main/checkpoints/canny/",
        "{folder}",
    ],
)
def test_ways_to_name_a_controlnet(cached, base, source):
    folder = published_controlnet(cached, "checkpoints/canny")
    checkpoint = Checkpoint(str(base), {"canny": source.format(folder=folder)})
    assert checkpoint.controlnet_fingerprint("canny") == Checkpoint("sd15").controlnet_fingerprint("canny")
    theirs = diffusers.ControlNetModel.from_pretrained(folder).state_dict()
    assert_equal({"": checkpoint.controlnet("canny", torch.float32).state_dict()}, {"": theirs})


# VAEs


def test_a_vae_in_place_of_the_models(cached, base, published, tmp_path):
    """A folder, its pipeline's folder, a file with diffusers' names and one with the original names."""
    vae = Path(shutil.copytree(base / "vae", tmp_path / "vae"))
    other = {key: tensor * 2 for key, tensor in load_file(vae / "diffusion_pytorch_model.safetensors").items()}
    save_file(other, vae / "diffusion_pytorch_model.safetensors")
    theirs = diffusers.AutoencoderKL.from_pretrained(vae).state_dict()
    original = load_file(base / f"{SINGLE_FILE}.safetensors")
    prefix = "first_stage_model."
    save_file(
        {k.removeprefix(prefix): t * 2 for k, t in original.items() if prefix in k}, tmp_path / "vae-ft.safetensors"
    )
    for given in (vae, tmp_path, vae / "diffusion_pytorch_model.safetensors", tmp_path / "vae-ft.safetensors"):
        checkpoint = Checkpoint("sd15", vae=str(given))
        assert_equal(states(checkpoint), {**published, "vae": theirs})
        assert checkpoint.fingerprint() != Checkpoint("sd15").fingerprint()


@pytest.mark.parametrize("given", ["taesd", "madebyollin/taesd"])
def test_a_tiny_vae(cached, given):
    checkpoint = Checkpoint("sd15", vae=given)
    theirs = diffusers.AutoencoderTiny.from_pretrained(snapshot_of(cached, "madebyollin/taesd")).float()
    assert_equal({"": checkpoint.vae(torch.float32).state_dict()}, {"": theirs.state_dict()})
    assert checkpoint.vae_scale_factor == 8


# What a manifest says


def test_sources_name_the_commit(cached, base):
    sources: dict[str, Any] = Checkpoint("sd15").sources()
    assert sources["unet"] == f"{BASE}@{base.name}/unet"
    assert Checkpoint(str(base)).sources()["unet"] == f"{base}/unet"


# LoRAs and textual inversions

LCM_LORA = "latent-consistency/lcm-lora-sdv1-5"


@pytest.mark.parametrize(
    "given", ["lcm", LCM_LORA, f"{LCM_LORA}/pytorch_lora_weights.safetensors", "{folder}", "{file}"]
)
def test_ways_to_name_a_lora(cached, given):
    """The digest is of the file and its weight, whatever its name."""
    folder = snapshot_of(cached, LCM_LORA)
    text = given.format(folder=folder, file=folder / "pytorch_lora_weights.safetensors")
    checkpoint = Checkpoint("sd15", loras=[text])
    assert checkpoint.fingerprint() == Checkpoint("sd15", loras=["lcm"]).fingerprint()
    assert checkpoint.fingerprint() != Checkpoint("sd15").fingerprint()
    assert Checkpoint("sd15", loras=[f"{text}:0.5"]).resolved.loras[0].weight == 0.5
    assert [match.unmatched for match in checkpoint.match_loras()] == [()]


@pytest.mark.parametrize(("name", "fused"), [("lcm", True), (f"{LCM_LORA}:0.7", True), ("{file}", False)])
def test_a_lora_known_by_name_brings_its_settings(cached, tmp_path, name, fused):
    file = shutil.copy(
        snapshot_of(cached, LCM_LORA) / "pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors"
    )
    defaults, _ = Checkpoint("sd15", loras=[name.format(file=file)]).examples()
    assert (defaults.get("scheduler") == "lcm") is fused


def test_ways_to_name_an_embedding(cached, tmp_path):
    file = make_embedding(tmp_path / "concept" / "learned_embeds.safetensors", 32, token="<cat>", vectors=2)
    for given, token in (
        (file, "<cat>"),
        (file.parent, "<cat>"),
        (f"{file}:dog", "dog"),
        (f"{file.parent}:dog", "dog"),
    ):
        found = Checkpoint("sd15", embeddings=[str(given)]).embeddings()
        assert [(e.token, e.vectors.shape) for e in found] == [(token, (2, 32))]


def test_a_distilled_unet(cached):
    folder = snapshot_of(cached, DISTILLED)
    ours = Checkpoint(DISTILLED).unet(torch.float32).state_dict()
    assert_equal({"": ours}, {"": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()})
    assert "time_embedding.cond_proj.weight" in ours


def test_a_concept_library_folder_of_several_files_wants_a_name(cached, tmp_path):
    for name in ("a", "b"):
        make_embedding(tmp_path / "library" / f"{name}.safetensors", 32)
    with pytest.raises(UserError, match=r"several: a\.safetensors, b\.safetensors; name one"):
        Checkpoint("sd15", embeddings=[str(tmp_path / "library")]).embeddings()


# Extractors


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["seg", "depth", "hed", "lineart"])
def test_ways_to_name_an_extractor(cached, base, condition):
    """The named model brings its own; any other takes the same, by name, from the hub or from a folder."""
    named = Checkpoint("sd15").resolved.extractor(condition)
    assert named is not None
    folder = snapshot_of(cached, REPOSITORIES[condition])
    assert Checkpoint(str(base)).resolved.extractor(condition) is None
    image = torch.from_numpy(photo(64, 64))[None]
    expected = open_extractor(condition, named, 64, 64)(image)
    for given in ("sd15", REPOSITORIES[condition], str(folder)):
        found = Checkpoint(str(base), extractors={condition: given}).resolved.extractor(condition)
        assert found is not None
        assert torch.equal(open_extractor(condition, found, 64, 64)(image), expected)
