"""Trains the autoencoder: first whole, then its decoder alone, while the latents stay as the UNet learns them."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...miniature.scenes import LABELS
from .data import TEST, TRAIN, Scenes, load_scenes
from .muon import Trainer

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "sample_size": 128,
    "block_out_channels": (20, 40, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
STEPS, CROP_STEPS, CROP = 1730, 1115, 64
REFINE_STEPS = 1500
# Small things carry the picture: without weights the sky is learned first and houses last.
_WEIGHTS = {"house": 3.0, "tree": 2.5, "sky": 0.5}


def train_vae(work: Path) -> Path:
    """Trains encoder and decoder into `work/vae`: on crops first, which is faster, then on whole pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    scenes = load_scenes(work, TRAIN)
    vae: Any = AutoencoderKL(**CONFIG)
    vae = vae.to(memory_format=torch.channels_last)
    trainer = Trainer([vae], STEPS, lr=3e-3, ema=0.998)
    start = time.perf_counter()
    for step in range(STEPS):
        crop = step < CROP_STEPS
        image, weight = _batch(scenes, 24 if crop else 8, CROP if crop else 0)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(image).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * torch.randn(posterior.mean.shape)
            decoded = vae.decode(latents).sample
        kl = posterior.kl().mean() / latents[0, 0].numel()
        trainer.step(reconstruction_loss(decoded.float(), image, weight) + 3e-4 * kl)
        if step % 200 == 199:
            print(f"vae {step + 1}: {time.perf_counter() - start:.0f} s", flush=True)
    trainer.finish()
    return _save(vae, work)


def refine_decoder(work: Path) -> Path:
    """Goes on with the decoder on whole pictures, the encoder as it is."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    scenes = load_scenes(work, TRAIN)
    vae: Any = AutoencoderKL.from_pretrained(work / "vae")
    vae = vae.to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trainer = Trainer([vae.decoder, vae.post_quant_conv], REFINE_STEPS, lr=1.5e-3, ema=0.998)
    start = time.perf_counter()
    for step in range(REFINE_STEPS):
        image, weight = _batch(scenes, 8, 0)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(image).latent_dist.mean.float()
                # What the denoising loop ends in is a little off the encoder's latents.
                latents = latents + 0.05 * torch.rand(()) * latents.std() * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        trainer.step(reconstruction_loss(decoded.float(), image, weight))
        if step % 100 == 99:
            print(f"decoder {step + 1}: {time.perf_counter() - start:.0f} s", flush=True)
    trainer.finish()
    return _save(vae, work)


def reconstruction_loss(decoded: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """L1 + squared error + half the L1 of the differences between neighbors; all [B,3,H,W] in [-1,1], weighted."""
    off = decoded - image
    across, down = off[..., 1:] - off[..., :-1], off[..., 1:, :] - off[..., :-1, :]
    return (
        (weight * (off.abs() + 0.6 * off.square())).mean()
        + 0.5 * (weight[..., 1:] * across.abs()).mean()
        + 0.5 * (weight[..., 1:, :] * down.abs()).mean()
    )


@torch.no_grad()
def psnr(vae: Any, scenes: Scenes) -> float:
    """Mean PSNR in dB of reconstructed scenes."""
    values = []
    for image in scenes.pixels(slice(None)).split(20):
        decoded = vae.decode(vae.encode(image * 2 - 1).latent_dist.mean).sample
        error = (decoded / 2 + 0.5).clamp(0, 1) - image
        values.append(-10 * error.square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()


def _batch(scenes: Scenes, size: int, crop: int) -> tuple[Tensor, Tensor]:
    which = torch.randint(len(scenes), (size,))
    image, index = scenes.pixels(which) * 2 - 1, scenes.index[which]
    if crop:
        y, x = torch.randint(0, image.shape[-1] - crop + 1, (2,)).tolist()
        image, index = image[..., y : y + crop, x : x + crop], index[..., y : y + crop, x : x + crop]
    if torch.rand(()) < 0.5:
        image, index = image.flip(-1), index.flip(-1)
    by_class = torch.tensor([_WEIGHTS.get(name, 1.0) for name in LABELS])
    weight = by_class[index.long()].unsqueeze(1)
    return image.contiguous(memory_format=torch.channels_last), weight / weight.mean()


def _save(vae: Any, work: Path) -> Path:
    vae.eval()
    seen = load_scenes(work, TRAIN).pixels(slice(200))
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mean for x in seen.split(20)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(work / "vae")
    scenes = load_scenes(work, TEST)
    print(f"vae: {psnr(vae, scenes):.2f} dB on {len(scenes)} fresh scenes", flush=True)
    return work / "vae"
