"""Fused LoRAs against diffusers with PEFT, for each layout that is published, and files that do not fit."""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cnpp_trt.developer.random_models.lora import make_lora
from cnpp_trt.errors import UserError
from cnpp_trt.export.checkpoint import Checkpoint
from cnpp_trt.export.lora import LoraMatch, fuse, match_loras, read_lora
from cnpp_trt.export.recipe import parse_lora
from cnpp_trt.export.resolved_sources import Lora
from cnpp_trt.export.weights import load_weights, read_weights
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

COMPONENTS = ("unet", "text_encoder")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint(str(tiny_checkpoint))


def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)


def reference(folder: Path, *loras: tuple[Path, float]) -> Any:
    """diffusers' pipeline with the LoRAs fused by PEFT."""
    pipe = pipeline(folder)
    names = [f"lora{i}" for i in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
    pipe.set_adapters(names, [weight for _, weight in loras])
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return pipe


def modules(checkpoint: Checkpoint, *loras: Lora, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Module]:
    found = {"unet": checkpoint.unet(dtype), "text_encoder": checkpoint.text_encoder(dtype)}
    for component, module in found.items():
        fuse(module, loras, component)
    return found


def changed(before: torch.nn.Module, after: torch.nn.Module) -> int:
    theirs = after.state_dict()
    return sum(not torch.equal(weight, theirs[key]) for key, weight in before.state_dict().items())


def assert_same(ours: dict[str, torch.nn.Module], theirs: Any, plain: dict[str, torch.nn.Module]) -> None:
    """Every weight to 1e-6 of the largest, and most of them not by doing nothing."""
    for component in COMPONENTS:
        expected = getattr(theirs, component).state_dict()
        for key, weight in ours[component].state_dict().items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=1e-6, msg=partial("{}: {}".format, key))
        assert changed(plain[component], ours[component]) == changed(plain[component], getattr(theirs, component))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("layout", ["kohya", "lcm", "diffusers", "lora_linear_layer", "old"])
def test_every_layout_is_fused_as_by_peft(tmp_path, tiny_checkpoint, checkpoint, layout, suffix):
    plain = modules(checkpoint)
    file = make_lora(tmp_path / f"lora{suffix}", plain["unet"], plain["text_encoder"], layout=layout)
    (match,) = match_loras([Lora("mine", file)], checkpoint.empty("unet"), checkpoint.empty("text_encoder"))
    ours = modules(checkpoint, Lora("mine", file, 0.7))
    assert_same(ours, reference(tiny_checkpoint, (file, 0.7)), plain)
    assert match == LoraMatch(sum(changed(plain[c], ours[c]) for c in COMPONENTS), ())
    assert changed(plain["unet"], ours["unet"]) > 10
    assert bool(changed(plain["text_encoder"], ours["text_encoder"])) == (layout != "lcm")


def test_the_lcm_layout_has_every_kind_of_layer(checkpoint, tmp_path):
    """Of the published file's: 3x3 and 1x1 convolutions, linear layers, the time embedding's projections."""
    unet = checkpoint.empty("unet")
    weights = load_file(make_lora(tmp_path / "lcm.safetensors", unet, layout="lcm", rank=64))
    shapes = {key: tensor.shape for key, tensor in weights.items() if key.endswith("lora_down.weight")}
    assert {(len(shape), shape[-1] if len(shape) == 4 else 0) for shape in shapes.values()} == {(2, 0), (4, 1), (4, 3)}
    assert {shape[0] for shape in shapes.values()} == {64}
    assert any("time_emb_proj" in key for key in shapes)
    assert len(weights) == 3 * len(shapes)


def test_two_at_once_on_the_same_layers(tmp_path, tiny_checkpoint, checkpoint):
    plain = modules(checkpoint)
    a = make_lora(tmp_path / "a.safetensors", plain["unet"], plain["text_encoder"], layout="kohya", alpha=3.0)
    b = make_lora(tmp_path / "b.safetensors", plain["unet"], plain["text_encoder"], layout="diffusers", rank=2, seed=1)
    ours = modules(checkpoint, Lora("a", a, 0.8), Lora("b", b, -0.5))
    assert_same(ours, reference(tiny_checkpoint, (a, 0.8), (b, -0.5)), plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_the_header_that_diffusers_writes(tmp_path, tiny_checkpoint, checkpoint, rslora):
    """Saved by diffusers from PEFT's own adapters, with ranks and alphas that differ from layer to layer."""
    pipe = pipeline(tiny_checkpoint)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "conv1"],
        rank_pattern={"conv1": 2},
        alpha_pattern={r"mid_block.*\.to_q": 3, "conv1": 5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    text = LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj"], use_rslora=rslora, init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.text_encoder.add_adapter(text)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="default"),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="default"),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert read_lora(file).adapters["unet"].alpha == 6
    ours = modules(checkpoint, Lora("mine", file, 1.5))
    assert_same(ours, reference(tiny_checkpoint, (file, 1.5)), modules(checkpoint))


def test_alphas_as_keys_in_peft_names(tmp_path, checkpoint):
    """Which diffusers refuses: the same file without them, its weight times alpha / rank, is the reference."""
    unet = checkpoint.unet(torch.float32)
    given = make_lora(tmp_path / "a.safetensors", unet, layout="diffusers", rank=4, alpha=6.0)
    plain = make_lora(tmp_path / "b.safetensors", unet, layout="diffusers", rank=4)
    ours, expected = modules(checkpoint, Lora("a", given)), modules(checkpoint, Lora("b", plain, 1.5))
    assert_close(ours["unet"], expected["unet"])
    assert changed(unet, ours["unet"]) > 10


def assert_close(a: torch.nn.Module, b: torch.nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=1e-6)


def test_diffusers_first_files_name_no_component(tmp_path, checkpoint):
    unet = checkpoint.empty("unet")
    file = make_lora(tmp_path / "a.bin", unet, layout="old")
    bare = {key.removeprefix("unet."): tensor for key, tensor in torch.load(file).items()}
    torch.save(bare, tmp_path / "b.bin")
    loras = [Lora("a", file), Lora("b", tmp_path / "b.bin")]
    a, b = match_loras(loras, unet, checkpoint.empty("text_encoder"))
    assert a == b
    assert_close(*(modules(checkpoint, lora)["unet"] for lora in loras))


def test_fp16_is_rounded_once(tmp_path, checkpoint):
    unet = checkpoint.empty("unet")
    loras = [Lora(str(i), make_lora(tmp_path / f"{i}.safetensors", unet, seed=i)) for i in range(3)]
    half, full = (modules(checkpoint, *loras, dtype=t)["unet"] for t in (torch.float16, torch.float32))
    for key, weight in half.state_dict().items():
        assert torch.equal(weight, full.state_dict()[key].half()), key


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_models_own_file_is_left_alone(tmp_path, checkpoint, suffix):
    """Its weights are the mapped file's where the types agree."""
    state, file = checkpoint.unet(torch.float16).state_dict(), tmp_path / f"unet{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    before = file.read_bytes()
    unet = load_weights(checkpoint.empty("unet"), read_weights([file]), "unet", torch.float16)
    fuse(unet, [Lora("mine", make_lora(tmp_path / "lora.safetensors", unet))], "unet")
    assert sum(not torch.equal(weight, state[key]) for key, weight in unet.state_dict().items()) > 10
    assert file.read_bytes() == before


def test_what_does_not_match_is_counted(tmp_path, checkpoint):
    unet, text_encoder = checkpoint.empty("unet"), checkpoint.empty("text_encoder")
    file = make_lora(tmp_path / "a.safetensors", unet, layout="diffusers")
    weights = load_file(file)
    more = {
        "unet.up_blocks.7.attentions.0.to_q.lora_A.weight": torch.ones(2, 4),
        "unet.up_blocks.7.attentions.0.to_q.lora_B.weight": torch.ones(4, 2),
        "unet.conv_in.alpha": torch.ones(()),
        "bundle_emb.thing": torch.ones(4),
    }
    save_file({**weights, **more}, file)
    (match,) = match_loras([Lora("a", file)], unet, text_encoder)
    assert match.fused == len(weights) // 2
    assert sorted(match.unmatched) == sorted(more)
    modules(checkpoint, Lora("a", file))  # and is left out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lcm", ("lcm", 1.0)),
        ("lcm:0.8", ("lcm", 0.8)),
        ("org/name:-1", ("org/name", -1.0)),
        ("org/name@v1/file.safetensors:1e-1", ("org/name@v1/file.safetensors", 0.1)),
        ("a:b/c.safetensors", ("a:b/c.safetensors", 1.0)),
        ("a:b/c.safetensors:2", ("a:b/c.safetensors", 2.0)),
        (r"C:\loras\c.safetensors", (r"C:\loras\c.safetensors", 1.0)),
        (r"C:\loras\c.safetensors:0", (r"C:\loras\c.safetensors", 0.0)),
    ],
)
def test_parse_lora(text, expected):
    assert parse_lora(text) == expected


def test_a_file_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert parse_lora("style:2") == ("style:2", 1.0)
    assert parse_lora("style:2:0.5") == ("style:2", 0.5)


@pytest.mark.parametrize("text", ["lcm:", "lcm:high", "lcm:nan", "lcm:inf", "lcm:1e999", ":1"])
def test_no_weight(text):
    with pytest.raises(UserError, match="is no weight for the LoRA"):
        parse_lora(text)


def one(component: str, layer: str, shape: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    key = f"{component}{layer}"
    return {f"{key}.lora_A.weight": torch.ones(2, shape[1]), f"{key}.lora_B.weight": torch.ones(shape[0], 2)}


TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BAD = {
    "nothing of the UNet": ({**one("unet.", "other")}, r"nothing of the LoRA mine fits this unet.*unet\.other\.lora_A"),
    "nothing at all": (
        {"model.weight": torch.ones(2)},
        r"fits this model: its 1 keys look like model.weight",
    ),
    "no weights": ({}, "holds no weights"),
    "another width": (one("unet.", TO_K, (16, 1024)), r"to_k is \[16, 32\], .*SD 2 or SDXL"),
    "another rank": (
        {f"unet.{TO_K}.lora_A.weight": torch.ones(2, 32), f"unet.{TO_K}.lora_B.weight": torch.ones(16, 3)},
        r"\[2, 32\] and \[16, 3\]",
    ),
    "no matrices": (
        {f"unet.{TO_K}.lora_A.weight": torch.ones(2), f"unet.{TO_K}.lora_B.weight": torch.ones(2)},
        "does not fit this model",
    ),
    "half a layer": ({f"unet.{TO_K}.lora_A.weight": torch.ones(2, 32)}, "only half of unet"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2), f"{KOHYA}.alpha": torch.ones(())}, "mine is a LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, "mine is a LoKr"),
    "DoRA": ({**one("unet.", TO_K, (16, 32)), f"unet.{TO_K}.dora_scale": torch.ones(16)}, "mine is a DoRA"),
    "DoRA of PEFT": (
        {**one("unet.", TO_K, (16, 32)), f"unet.{TO_K}.lora_magnitude_vector": torch.ones(16)},
        "mine is a DoRA",
    ),
    "Tucker": ({f"{KOHYA}.lora_mid.weight": torch.ones(2, 2)}, "Tucker"),
    "SDXL": (one("lora_te2_text_model_encoder_layers_0_mlp_fc1", ""), "mine is for SDXL"),
    "SDXL's UNet": (one("lora_unet_input_blocks_4_1_proj_in", ""), "mine is for SDXL"),
    "Flux": (one("transformer.", "single_transformer_blocks.0.attn.to_q"), "for Flux"),
    "Flux of kohya": (one("lora_unet_double_blocks_0_img_attn_proj", ""), "for Flux"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(tmp_path, checkpoint, case):
    weights, message = BAD[case]
    save_file(weights, tmp_path / "lora.safetensors")
    lora = Lora("mine", tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=message) as error:
        match_loras([lora], checkpoint.empty("unet"), checkpoint.empty("text_encoder"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", ["{", "[]"])
def test_a_damaged_header(tmp_path, metadata):
    save_file(one("unet.", TO_K), tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match="lora_adapter_metadata"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin"])
def test_no_lora_file(tmp_path, name):
    with pytest.raises(UserError, match="there is no"):
        read_lora(tmp_path / name)
    (tmp_path / name).write_bytes(b"no")
    with pytest.raises(UserError, match="cut off or damaged"):
        read_lora(tmp_path / name)


def test_the_miniatures_few_step_model() -> None:
    plain, few = Checkpoint("miniature"), Checkpoint("miniature-lcm")
    assert few.fingerprint() != plain.fingerprint()
    assert few.examples()[0] == {"guidance_scale": 1.0, "num_inference_steps": 4, "scheduler": "lcm"}
    (match,) = few.match_loras()
    assert match.unmatched == ()
    before, after = plain.unet(torch.float32).state_dict(), few.unet(torch.float32).state_dict()
    found = [k for k in before if not np.array_equal(before[k].numpy(), after[k].numpy())]
    assert len(found) == match.fused > 50 and all(k.endswith("weight") for k in found)
