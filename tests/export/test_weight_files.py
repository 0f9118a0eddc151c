"""Which files of a folder are taken, against what diffusers' and transformers' own from_pretrained take."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from cnpp_trt.developer.random_models.extractors import make_extractor, photo
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.extractors import open_extractor
from cnpp_trt.export.sources import Finder
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = pytest.mark.slow

State = dict[str, Tensor]
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "controlnet/canny": "diffusion_pytorch_model",
}
CLASSES: dict[str, Any] = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "controlnet/canny": diffusers.ControlNetModel,
}


@pytest.fixture
def folder(base: Path, hub_home: Path, tmp_path: Path) -> Path:
    """A model with a ControlNet; each component has one whole `.safetensors`."""
    ignored = shutil.ignore_patterns("*.bin", "*.fp16.*", "v1-5*")
    model = Path(shutil.copytree(base, tmp_path / "model", ignore=ignored))
    # Of the VAE's attention diffusers itself reads the early names from a whole file only.
    diffusers.AutoencoderKL.from_pretrained(base / "vae").save_pretrained(model / "vae")
    (controlnet,) = hub_home.glob("hub/models--limingcv--*/snapshots/*/checkpoints/canny")
    shutil.copytree(controlnet, model / "controlnet" / "canny")
    return model


def take(folder: Path) -> State:
    """The weights of a folder's whole file, which is deleted."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    return state


def other(state: State) -> State:
    return {key: t + 1 if t.is_floating_point() else t for key, t in state.items()}


def save_shards(state: State, folder: Path, name: Callable[[int, int], str], count: int = 2) -> dict[str, str]:
    """Returns: the weight_map of an index."""
    where: dict[str, str] = {}
    for i in range(count):
        part = {key: state[key] for key in sorted(state)[i::count]}
        file = name(i + 1, count)
        save_file(part, folder / file) if file.endswith("safetensors") else torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    return where


def numbered(stem: str, suffix: str = "safetensors") -> Callable[[int, int], str]:
    return lambda i, n: f"{stem}-{i:05d}-of-{n:05d}.{suffix}"


def write_index(file: Path, weight_map: Any) -> None:
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def ours(model: Path, component: str, **parts: Any) -> State:
    checkpoint = Checkpoint(str(model), **parts)
    if component == "controlnet/canny":
        return checkpoint.controlnet("canny", torch.float32).state_dict()
    return getattr(checkpoint, component)(torch.float32).state_dict()


def theirs(model: Path, component: str, **arguments: Any) -> State:
    module = CLASSES[component].from_pretrained(model / component, torch_dtype=torch.float32, **arguments)
    return module.state_dict()


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def refused(model: Path, component: str = "unet") -> str:
    with pytest.raises(UserError) as error:
        ours(model, component)
    assert "\n" not in str(error.value)
    return str(error.value)


# An index


@pytest.mark.parametrize("component", STEMS)
def test_an_index_beside_the_shards_of_an_earlier_save(folder, component):
    place, stem = folder / component, STEMS[component]
    state = take(place)
    save_shards(other(state), place, numbered(stem), 3)
    write_index(place / f"{stem}.safetensors.index.json", save_shards(state, place, numbered(stem)))
    assert_same(ours(folder, component), theirs(folder, component))


@pytest.mark.parametrize("component", STEMS)
def test_an_index_beside_a_whole_file(folder, component):
    """diffusers takes the index, transformers the whole file."""
    place, stem = folder / component, STEMS[component]
    state = take(place)
    save_file(other(state), place / f"{stem}.safetensors")
    write_index(place / f"{stem}.safetensors.index.json", save_shards(state, place, numbered(stem)))
    assert_same(ours(folder, component), theirs(folder, component))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_shards_with_names_of_their_own(folder, component):
    place, stem = folder / component, STEMS[component]
    weight_map = save_shards(take(place), place, lambda i, n: f"part {i}.safetensors")
    write_index(place / f"{stem}.safetensors.index.json", weight_map)
    assert_same(ours(folder, component), theirs(folder, component))


def test_an_index_of_pickles(folder):
    state = take(folder / "unet")
    weight_map = save_shards(state, folder / "unet", numbered(STEMS["unet"], "bin"))
    write_index(folder / "unet" / "diffusion_pytorch_model.bin.index.json", weight_map)
    assert_same(ours(folder, "unet"), theirs(folder, "unet", use_safetensors=False))


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-{:05d}-of-{:05d}"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "diffusion_pytorch_model-{:05d}-of-{:05d}.fp16"),
    ],
)
def test_an_index_of_a_variant(folder, index, name):
    """In today's spelling and the one before it, beside another whole file."""
    place = folder / "unet"
    state = load_file(place / "diffusion_pytorch_model.safetensors")
    write_index(place / index, save_shards(other(state), place, lambda i, n: f"{name.format(i, n)}.safetensors"))
    assert_same(ours(folder, "unet", variant="fp16"), theirs(folder, "unet", variant="fp16"))
    assert not torch.equal(ours(folder, "unet")["conv_in.weight"], state["conv_in.weight"] + 1)


def test_fingerprints_are_of_the_files_that_count(folder):
    place = folder / "unet"
    state = take(place)
    write_index(place / "diffusion_pytorch_model.safetensors.index.json", save_shards(state, place, numbered("x")))
    before = Checkpoint(str(folder)).fingerprint()
    save_file(other(state), place / "diffusion_pytorch_model.safetensors")
    assert Checkpoint(str(folder)).fingerprint() == before
    save_file({"conv_in.bias": torch.ones(16)}, place / "x-00001-of-00002.safetensors")
    assert Checkpoint(str(folder)).fingerprint() != before


def test_a_shard_that_is_missing(folder):
    place = folder / "unet"
    weight_map = save_shards(take(place), place, numbered("diffusion_pytorch_model"))
    write_index(place / "diffusion_pytorch_model.safetensors.index.json", weight_map)
    (place / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "lacks diffusion_pytorch_model-00002-of-00002.safetensors, which its diffusion" in refused(folder)


@pytest.mark.parametrize(
    "name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", "a\\b.safetensors"]
)
def test_an_index_that_points_outside(folder, name):
    write_index(folder / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"conv_in.weight": name})
    assert "which is no file of its folder" in refused(folder)


MAPS = ["[]", "{}", "null", '{"a": 1}', '{"a": ""}', '{"a": "' + "b" * 10_000 + '"}']


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", "[" * 100_000, *(f'{{"weight_map": {m}}}' for m in MAPS)])
def test_a_damaged_index(folder, text):
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    assert "diffusion_pytorch_model.safetensors.index.json" in refused(folder)


def test_a_weight_in_two_files(folder):
    place = folder / "unet"
    state = take(place)
    weight_map = save_shards(state, place, numbered("part"))
    second = load_file(place / "part-00002-of-00002.safetensors")
    save_file({**second, "conv_in.bias": state["conv_in.bias"] + 1}, place / "part-00002-of-00002.safetensors")
    write_index(place / "diffusion_pytorch_model.safetensors.index.json", weight_map)
    message = refused(folder)
    assert "conv_in.bias stands in" in message
    assert "part-00001-of-00002.safetensors" in message


# Without an index


def test_a_whole_file_beside_shards(folder):
    """diffusers does not look at shards that no index names."""
    place = folder / "unet"
    state = load_file(place / "diffusion_pytorch_model.safetensors")
    save_shards(other(state), place, numbered("diffusion_pytorch_model"))
    assert_same(ours(folder, "unet"), theirs(folder, "unet"))


def test_two_sets_of_shards(folder):
    place = folder / "unet"
    state = take(place)
    save_shards(state, place, numbered("diffusion_pytorch_model"))
    save_shards(state, place, numbered("diffusion_pytorch_model"), 3)
    message = refused(folder)
    assert "shards of 2 sets" in message
    assert "-00001-of-00002.safetensors and diffusion_pytorch_model-00001-of-00003.safetensors" in message


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_set_that_is_not_complete(folder, missing):
    place = folder / "unet"
    save_shards(take(place), place, numbered("diffusion_pytorch_model"), 3)
    (place / f"diffusion_pytorch_model-0000{missing}-of-00003.safetensors").unlink()
    assert f"there is no diffusion_pytorch_model-0000{missing}-of-00003.safetensors" in refused(folder)


def test_numbers_that_are_none(folder):
    place = folder / "unet"
    save_file(take(place), place / "diffusion_pytorch_model-00001-of-99999.safetensors")
    assert "and 9998 more" in refused(folder)


# Variants that only some components have


@pytest.mark.parametrize("having", [("unet",), ("unet", "vae"), ("text_encoder",)])
@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_components_without_the_variant_come_without(folder, variant, having, logged):
    for component in having:
        file = folder / component / f"{STEMS[component]}.safetensors"
        save_file(other(load_file(file)), file.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, variant=variant, safety_checker=None, feature_extractor=None, torch_dtype=torch.float32
    )
    checkpoint = Checkpoint(str(folder), variant=variant)
    for component in ("unet", "vae", "text_encoder"):
        state = getattr(checkpoint, component)(torch.float32).state_dict()
        assert_same(state, getattr(pipeline, component).state_dict())
    checkpoint.fingerprint()
    without = [c for c in ("unet", "vae", "text_encoder") if c not in having]
    assert logged() == [f"{' and '.join(without)} of {folder} have no {variant} weights: others are taken"]


# Weights that nothing reads


def test_weights_that_nothing_reads(folder):
    file = folder / "text_encoder" / "model.safetensors"
    unread = {
        "text_projection.weight": torch.eye(32),
        "logit_scale": torch.ones(()),
        "vision_model.embeddings.class_embedding": torch.ones(4),
        "visual_projection.weight": torch.eye(4),
    }
    save_file({**load_file(file), **unread}, file, {"format": "pt"})
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(unet), "model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(1000)}, unet)
    for component in ("unet", "text_encoder"):
        assert_same(ours(folder, component), theirs(folder, component))


@pytest.mark.parametrize("key", ["down_blocks.9.resnets.0.conv1.weight", "add_embedding.linear_1.weight", "surplus"])
def test_weights_of_another_architecture(folder, key):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), key: torch.zeros(1)}, file)
    assert f"has a weight that its config.json knows nothing of: {key}" in refused(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("component", STEMS)
def test_numbers_that_are_none_are_found_before_anything_is_exported(folder, component, value):
    (file,) = (folder / component).glob("*.safetensors")
    state = load_file(file)
    key = sorted(key for key, t in state.items() if t.is_floating_point())[3]
    state[key].view(-1)[-1] = value
    save_file(state, file)
    with pytest.raises(UserError, match="has NaN or Inf in") as error:
        Checkpoint(str(folder)).check_weights(["unet", "vae", "text_encoder", "controlnet_canny"])
    assert key.rpartition(".")[2] in str(error.value)


def test_quantized_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "conv_in.weight": state["conv_in.weight"].to(torch.int8)}, file)
    assert "conv_in.weight as int8: quantized weights cannot be exported" in refused(folder)


# The hub, and extractors


def test_an_index_in_the_hubs_cache(hub_home, tmp_path, monkeypatch):
    """Beside the shards of an earlier save, as the hub's list of files has them all."""
    home = tmp_path / "hub"
    repository = "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(
        hub_home / "hub" / repository, home / repository, ignore=shutil.ignore_patterns("*.bin", "*.fp16.*")
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    (place,) = home.glob("*/snapshots/*/unet")
    state = take(place)
    save_shards(other(state), place, numbered("diffusion_pytorch_model"), 3)
    weight_map = save_shards(state, place, numbered("diffusion_pytorch_model"))
    write_index(place / "diffusion_pytorch_model.safetensors.index.json", weight_map)
    checkpoint = Checkpoint("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert_same(checkpoint.unet(torch.float32).state_dict(), theirs(place.parent, "unet"))
    assert len(checkpoint.resolved.weights("unet")) == 2
    (place / weight_map["conv_in.bias"]).unlink()
    with pytest.raises(UserError, match=r"lacks diffusion_pytorch_model-0000\d-of-00002.safetensors"):
        Checkpoint("stable-diffusion-v1-5/stable-diffusion-v1-5").fingerprint()


@pytest.mark.parametrize("condition", ["seg", "depth"])
def test_an_extractor_in_shards(tmp_path, condition):
    """As transformers saves it, beside the shards of an earlier save."""
    folder = make_extractor(condition, tmp_path / condition, tiny=True)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    network = getattr(transformers, architecture).from_pretrained(folder)
    image = torch.from_numpy(photo(64, 64))[None]
    expected = open_extractor(condition, Finder().find(folder), 64, 64)(image)
    (file,) = folder.glob("*model.*")
    file.unlink()
    network.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    save_shards(other(dict(network.state_dict())), folder, numbered("model"), 2)
    assert torch.equal(open_extractor(condition, Finder().find(folder), 64, 64)(image), expected)


def test_a_controlnet_without_the_variant_comes_without(folder, caplog):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    caplog.set_level("INFO", "cnpp_trt")
    checkpoint = Checkpoint(str(folder), variant="fp16")
    for _ in range(2):
        checkpoint.controlnet_fingerprint("canny")
    assert caplog.messages == [f"the ControlNet {folder}/controlnet/canny has no fp16 weights: others are taken"]
