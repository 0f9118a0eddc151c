"""Trains tokenizer, text encoder and UNet on the scenes' latents and captions."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import TRAIN, load_scenes
from .muon import Trainer

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (48, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 2,  # SD 1.x configurations call the number of heads so
    # Attention below the top resolution only: there it would cost 1.6 times the whole step on a CPU.
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
    "max_position_embeddings": 77,
}
# Stable Diffusion 1.5's own file.
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
STEPS, BATCH, LR = 2400, 32, 2e-3
CAPTION_DROPOUT = 0.1
MAX_TOKENS = 77


def train_diffusion(work: Path) -> None:
    """Trains into `work/{tokenizer,text_encoder,unet,scheduler}`; needs `work/vae`."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    scenes = load_scenes(work, TRAIN)
    tokenizer = train_tokenizer(work, scenes.captions)
    ids = tokenize(tokenizer, scenes.captions)
    empty = tokenize(tokenizer, [""])[0]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT_CONFIG,
    )
    text_encoder, unet = CLIPTextModel(config), UNet2DConditionModel(**UNET_CONFIG)
    latents = encode_scenes(work)
    alphas = alphas_cumprod()
    trainer = Trainer([text_encoder, unet], STEPS, LR, ema=0.998, warmup=100)
    start, mean = time.perf_counter(), 0.0
    for step in range(STEPS):
        which = torch.randint(len(scenes), (BATCH,))
        captions = torch.where(torch.rand(BATCH, 1) < CAPTION_DROPOUT, empty, ids[which])
        t = torch.randint(0, 1000, (BATCH,))
        noise = torch.randn(BATCH, *latents.shape[1:])
        noisy = add_noise(latents[which], noise, alphas[t])
        predicted = unet(noisy, t, text_encoder(captions)[0]).sample
        loss = weighted_mse(predicted, noise, alphas[t])
        trainer.step(loss)
        mean += loss.item() / 200
        if step % 200 == 199:
            print(f"unet {step + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            mean = 0.0
    trainer.finish()
    text_encoder.save_pretrained(work / "text_encoder")
    unet.save_pretrained(work / "unet")
    write_json(work / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)


def train_tokenizer(work: Path, captions: Sequence[str]) -> Any:
    """A byte-level BPE of CLIP's kind (`</w>` ends a word), learned from the captions; saved in CLIP's own files."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=688, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learned["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet), *("".join(m.split()) for m in merges), start, end]
    folder = work / "tokenizer"
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(dict.fromkeys(tokens))})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**config, **special})
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """int64 [N,77]."""
    return tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def encode_scenes(work: Path) -> Tensor:
    """The training scenes' latents float32 [N,4,16,16], scaled, kept in `work`."""
    from diffusers import AutoencoderKL

    path = work / "latents.pt"
    if not path.exists():
        vae: Any = AutoencoderKL.from_pretrained(work / "vae").eval()
        scenes = load_scenes(work, TRAIN)
        with torch.no_grad():
            means = [vae.encode(x * 2 - 1).latent_dist.mean for x in scenes.pixels(slice(None)).split(50)]
        torch.save(torch.cat(means) * vae.config.scaling_factor, path)
    return torch.load(path, weights_only=True)


def alphas_cumprod() -> Tensor:
    """[1000], of `SCHEDULER_CONFIG`'s scaled-linear betas."""
    low, high = SCHEDULER_CONFIG["beta_start"] ** 0.5, SCHEDULER_CONFIG["beta_end"] ** 0.5
    return (1 - torch.linspace(low, high, 1000).square()).cumprod(0)


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """DDPM's forward process, arXiv 2006.11239, equation 4; alphas [B]."""
    a = alphas.reshape(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def weighted_mse(predicted: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Min-SNR-5 weighted error of the predicted noise, arXiv 2303.09556, section 3.4; alphas [B]."""
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=5.0) / snr
    return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
