"""Makes a Hugging Face cache that holds what the hub publishes for ControlNet++, with random weights.

    python -m cnpp_trt.developer.random_models.hub HF_HOME [--tiny] [--cond seg …]
    HF_HOME=… HF_HUB_OFFLINE=1 cnpp-trt export --model sd15 --cond all

Repositories, file names, key names, shapes and types are the published ones, so that an export takes the path that the
real weights take once they are downloaded. Where limingcv/reward_controlnet's files could not be looked up, its
conditions stand for all that is known to occur: a `config.json` in the folder itself or one level down, and
safetensors or pickles. The images mean nothing.
"""

import hashlib
import itertools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ...conditions import CONDITIONS, REWARD_CONTROLNET_REPOSITORY
from ...export.original_layout import original_layout
from ..miniature.diffusion import SCHEDULER_CONFIG, write_json
from .checkpoint import make_checkpoint, make_controlnet, make_text_encoder, make_unet, make_vae, write_byte_tokenizer
from .extractors import REPOSITORIES, make_extractor
from .lora import make_lora

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SINGLE_FILE = "v1-5-pruned-emaonly"
COCO_STUFF = "checkpoints/cocostuff/reward_5k"
DISTILLED = "SimianLuo/LCM_Dreamshaper_v7"

# A ControlNet++ folder's files: one level down or not, a pickle or not.
_ONE_LEVEL_DOWN = ("lineart", "depth")
_PICKLES = ("lineart", "hed")

# What stable-diffusion-v1-5 wrote with diffusers 0.6: every later setting is left to its default.
_UNET_KEYS = [
    "act_fn",
    "attention_head_dim",
    "block_out_channels",
    "center_input_sample",
    "cross_attention_dim",
    "down_block_types",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "out_channels",
    "sample_size",
    "up_block_types",
]
_VAE_KEYS = [
    "act_fn",
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "out_channels",
    "sample_size",
    "up_block_types",
]
_TEXT_KEYS = [
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "initializer_factor",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "projection_dim",
    "vocab_size",
]
_TEXT_REST = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "dropout": 0.0,
    # Not the tokenizer's: they only choose what the pooled output is taken from, which Stable Diffusion does not read.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# Of early diffusers, which the published VAE still has.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

State = Mapping[str, Tensor]


def make_hub(
    home: Path,
    *,
    tiny: bool = False,
    conditions: Sequence[str] = tuple(CONDITIONS),
    variants: bool | None = None,
    seed: int = 0,
) -> Path:
    """Writes `home/hub/models--<owner>--<name>/` with `refs/main` and one snapshot for every repository.

    Args:
        home: the folder of the hub's cache.
        tiny: small networks in place of SD 1.5's sizes.
        conditions: those to make a ControlNet and an extractor for.
        variants: also the base model's copies of the same weights: `.fp16`, pickles, and the whole model in one file
            (17 GB more at full size). None does for tiny ones.
        seed: of the random weights.

    Returns:
        `home`, for the environment variable HF_HOME.
    """
    torch.manual_seed(seed)
    unet = _make_base(_snapshot(home, BASE), tiny, tiny if variants is None else variants)
    for condition in conditions:
        folder = _snapshot(home, REWARD_CONTROLNET_REPOSITORY) / CONDITIONS[condition].checkpoint
        if condition in _ONE_LEVEL_DOWN:
            folder /= "controlnet"
        _save_model(make_controlnet(unet, tiny), folder, pickled=condition in _PICKLES)
    if tiny:
        _save_model(make_controlnet(unet, tiny), _snapshot(home, REWARD_CONTROLNET_REPOSITORY) / COCO_STUFF)
        _make_distilled(_snapshot(home, DISTILLED))
    _make_extractors(home, conditions, tiny)
    _make_lora(_snapshot(home, "latent-consistency/lcm-lora-sdv1-5"), unet, tiny)
    _make_tiny_vae(_snapshot(home, "madebyollin/taesd"), tiny)
    return home


def snapshot_of(home: Path, repository: str) -> Path:
    """The folder of a repository's files in a cache that `make_hub` made."""
    commit = hashlib.sha1(repository.encode()).hexdigest()  # as git names a commit; no secret
    return home / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / commit


def _snapshot(home: Path, repository: str) -> Path:
    folder = snapshot_of(home, repository)
    folder.mkdir(parents=True, exist_ok=True)
    ref = folder.parent.parent / "refs" / "main"
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(folder.name)
    return folder


def _make_base(folder: Path, tiny: bool, variants: bool) -> Any:
    """Makes the base model and returns its UNet."""
    unet, vae = make_unet(tiny), make_vae(tiny)
    text_encoder = make_text_encoder(tiny)
    text = old_text_names(text_encoder)
    states = {
        "unet/diffusion_pytorch_model": unet.state_dict(),
        "vae/diffusion_pytorch_model": old_attention_names(vae.state_dict()),
        "text_encoder/model": text,
    }
    for name, state in states.items():
        _save(state, folder / f"{name}.safetensors")
        if variants:
            pickle = folder / f"{name.replace('/model', '/pytorch_model')}.bin"
            half = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
            _save(state, pickle)
            _save(half, folder / f"{name}.fp16.safetensors")
            _save(half, pickle.with_suffix(".fp16.bin"))
    if variants:
        whole = original_layout(unet, vae, text)
        _save(whole, folder / f"{SINGLE_FILE}.safetensors")
        torch.save({"state_dict": whole}, folder / f"{SINGLE_FILE}.ckpt")
    _write_config(folder / "unet", "UNet2DConditionModel", unet.config, _UNET_KEYS)
    _write_config(folder / "vae", "AutoencoderKL", vae.config, _VAE_KEYS)
    settings = text_encoder.config.to_dict()
    write_json(folder / "text_encoder" / "config.json", {**{key: settings[key] for key in _TEXT_KEYS}, **_TEXT_REST})
    scheduler = {key: value for key, value in SCHEDULER_CONFIG.items() if key != "prediction_type"}
    write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": "0.6.0"})
    write_tokenizer(folder / "tokenizer", settings["vocab_size"])
    write_json(folder / "model_index.json", _INDEX)
    return unet


def old_text_names(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModel's weights as transformers named them before version 5, and with the position ids it saved."""
    state = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text_encoder.state_dict().items()}
    return {"text_model.embeddings.position_ids": torch.arange(77).expand(1, -1), **state}


def old_attention_names(vae: State) -> dict[str, Tensor]:
    """An AutoencoderKL's weights as diffusers named them before version 0.15."""
    renamed = {}
    for key, tensor in vae.items():
        head, part, tail = key.rpartition(".attentions.0.")
        for new, old in _OLD_ATTENTION.items():
            tail = tail.replace(f"{new}.", f"{old}.") if part else tail
        renamed[f"{head}{part}{tail}"] = tensor
    return renamed


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes CLIP's four files.

    At CLIP's own size (49,408) the vocabulary is as large, with made-up merges; smaller ones know single bytes only.
    """
    write_byte_tokenizer(folder)
    if vocab_size >= 49408:
        _write_vocabulary(folder, merges=49408 - 514)
    start, end = (
        {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for token in ("<|startoftext|>", "<|endoftext|>")
    )
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    typed = {key: {"__type": "AddedToken", **token} for key, token in special.items() if isinstance(token, dict)}
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    write_json(
        folder / "tokenizer_config.json",
        {**config, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", **typed},
    )


def _write_vocabulary(folder: Path, merges: int) -> None:
    """The bytes, then a token for each merge, then the two special ones: the order of CLIP's own."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pairs = list(itertools.islice(_merges(), merges))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def _merges() -> Any:
    """Every two letters, every two letters and a third, every two and two; within a word and at its end."""
    letters = string.ascii_lowercase
    twos = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    for first, second in ((letters, letters), (twos, letters), (twos, twos)):
        for end in ("", "</w>"):
            for a, b in itertools.product(first, second):
                yield a, b + end


def _make_distilled(folder: Path) -> None:
    """A model whose UNet was distilled with its guidance scale as an input: SimianLuo/LCM_Dreamshaper_v7's layout."""
    make_checkpoint(folder, tiny=True, conditions=(), seed=1)
    _save_model(make_unet(True, time_cond_proj_dim=256), folder / "unet")
    lcm = {**SCHEDULER_CONFIG, "_class_name": "LCMScheduler", "original_inference_steps": 50}
    write_json(folder / "scheduler" / "scheduler_config.json", lcm)


def _make_extractors(home: Path, conditions: Sequence[str], tiny: bool) -> None:
    for condition in (c for c in conditions if c in REPOSITORIES):
        made = make_extractor(condition, _snapshot(home, REPOSITORIES[condition]), tiny=tiny)
        if condition == "depth":  # Intel/dpt-large is there in both formats
            _save(torch.load(made / "pytorch_model.bin", weights_only=True), made / "model.safetensors")


def _make_lora(folder: Path, unet: nn.Module, tiny: bool) -> None:
    file = folder / "pytorch_lora_weights.safetensors"
    make_lora(file, unet, layout="lcm", rank=4 if tiny else 64)


def _make_tiny_vae(folder: Path, tiny: bool) -> None:
    from diffusers import AutoencoderTiny

    channels = (8,) * 4 if tiny else (64,) * 4
    _save_model(
        AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels).half(), folder
    )


def _save_model(model: Any, folder: Path, pickled: bool = False) -> None:
    model.save_pretrained(folder, safe_serialization=not pickled)


def _save(state: State, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: t.contiguous() for key, t in state.items()}, file, metadata={"format": "pt"})
    else:
        torch.save(dict(state), file)


def _write_config(folder: Path, kind: str, config: Mapping[str, Any], keys: Sequence[str]) -> None:
    own = {"_class_name": kind, "_diffusers_version": "0.6.0", **{key: config[key] for key in keys}}
    write_json(folder / "config.json", own)


def _main(
    home: Annotated[Path, typer.Argument(metavar="HF_HOME")],
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes instead of the published.")] = False,
    cond: Annotated[list[str] | None, typer.Option(help="Conditions to make a ControlNet for. Default: all.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Also .fp16, pickles and single files.")] = False,
) -> None:
    print(make_hub(home, tiny=tiny, conditions=cond or tuple(CONDITIONS), variants=variants or None))


if __name__ == "__main__":
    typer.run(_main)
