"""Makes a checkpoint with random weights in the diffusers layout: SD 1.5's exact shapes, or tiny ones.

    python -m cnpp_trt.developer.random_models.checkpoint FOLDER [--tiny] [--cond seg …]

For measuring and testing where the real weights cannot be had: time, memory and parity do not depend on what the
weights are. The images mean nothing. The tokenizer knows single bytes only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..miniature.diffusion import SCHEDULER_CONFIG, write_json

# Sizes of stable-diffusion-v1-5's own config.json files; what they leave out is the default in diffusers.
_FULL: dict[str, Any] = {
    "unet": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "vocab_size": 49408,
    "sample_size": 64,
    "hint": (16, 32, 96, 256),
}
_TINY: dict[str, Any] = {
    "unet": {
        "block_out_channels": (16, 32),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    "text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "vocab_size": 600,
    "sample_size": 8,
    "hint": (8, 8, 16, 16),
}


def make_checkpoint(
    folder: Path,
    *,
    tiny: bool = False,
    conditions: Sequence[str] = ("seg",),
    seed: int = 0,
    prediction: str = "epsilon",
) -> Path:
    """Writes `folder` with unet, vae, text_encoder, tokenizer, scheduler and `controlnet/<condition>`, in fp16.

    UNet, VAE and text encoder follow from their sizes and the seed alone, whatever the conditions are.

    Returns:
        `folder`.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    unet = make_unet(tiny)
    unet.half().save_pretrained(folder / "unet")
    for condition in conditions:
        make_controlnet(unet, tiny).half().save_pretrained(folder / "controlnet" / condition)
    del unet
    torch.manual_seed(seed)
    make_vae(tiny).half().save_pretrained(folder / "vae")
    torch.manual_seed(seed)
    make_text_encoder(tiny, eos_token_id=513, bos_token_id=512).half().save_pretrained(folder / "text_encoder")
    write_byte_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER_CONFIG, "prediction_type": prediction})
    components = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **components})
    return folder


def make_unet(tiny: bool, **config: Any) -> Any:
    """A UNet2DConditionModel of random weights; `config` overrides or adds to SD 1.5's."""
    from diffusers import UNet2DConditionModel

    shape = _TINY if tiny else _FULL
    return UNet2DConditionModel(**{"sample_size": shape["sample_size"], **shape["unet"], **config})


def make_controlnet(unet: Any, tiny: bool) -> Any:
    """A ControlNetModel for the UNet: a full-size one starts from its weights, a tiny one from its own.

    A new ControlNet's output is zero by design; here its last convolutions are random too, so that it matters.
    """
    from diffusers import ControlNetModel

    hint = (_TINY if tiny else _FULL)["hint"]
    controlnet: Any = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=hint, load_weights_from_unet=not tiny
    )
    for zero in (controlnet.controlnet_cond_embedding.conv_out, *controlnet.controlnet_down_blocks):
        torch.nn.init.normal_(zero.weight, std=0.05)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.05)
    return controlnet


def make_vae(tiny: bool) -> Any:
    """An AutoencoderKL of random weights."""
    from diffusers import AutoencoderKL

    shape = _TINY if tiny else _FULL
    # Annotated as tuples of one.
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    blocks: dict[str, Any] = {"down_block_types": down, "up_block_types": up}
    return AutoencoderKL(
        latent_channels=4,
        sample_size=shape["sample_size"] * 8,
        **blocks,
        **shape["vae"],
    )


def make_text_encoder(tiny: bool, **config: Any) -> Any:
    """A CLIPTextModel of random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = _TINY if tiny else _FULL
    settings = {"vocab_size": shape["vocab_size"], "max_position_embeddings": 77, **shape["text"], **config}
    return CLIPTextModel(CLIPTextConfig(**settings))


def write_byte_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer without merges: every byte is a token, with and without the end-of-word mark."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    end = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": end, "eos_token": end}
    write_json(folder / "tokenizer_config.json", {**config, "bos_token": "<|startoftext|>", "unk_token": end})


def _main(
    folder: Path,
    tiny: Annotated[bool, typer.Option(help="Tiny sizes instead of SD 1.5's.")] = False,
    cond: Annotated[list[str] | None, typer.Option(help="Conditions to make a ControlNet for.")] = None,
) -> None:
    print(make_checkpoint(folder, tiny=tiny, conditions=cond or ["seg"]))


if __name__ == "__main__":
    typer.run(_main)
