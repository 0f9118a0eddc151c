"""Trains ControlNets: plain first, then on with a consistency reward (ControlNet++) or without (its control group).

The reward follows ControlNet++ (arXiv 2404.07987, section 3.2): a lightly noised training image is denoised in a
single step, decoded, and its condition is extracted again; the difference to the condition given is a loss beside the
usual one.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...export.extractors.miniature import load_extractor
from .data import TRAIN, Conditions, Scenes, load_scenes
from .diffusion import add_noise, alphas_cumprod, encode_scenes, tokenize, weighted_mse
from .muon import Trainer

PLAIN_STEPS, PLAIN_BATCH, PLAIN_LR = 1600, 16, 1.5e-3
CAPTION_DROPOUT = 0.2


@dataclass(frozen=True)
class Reward:
    """Settings of the second stage.

    Attributes:
        weight: of the consistency loss beside the diffusion loss.
        max_timestep: up to which noise the single-step image is rewarded. The paper's 200 leaves little to learn here,
            where that image is almost right by itself.
    """

    steps: int = 200
    batch: int = 16
    lr: float = 5e-4
    weight: float = 2.0
    max_timestep: int = 500


REWARDS = {
    "seg": Reward(weight=2.0),
    "depth": Reward(weight=20.0),
    "canny": Reward(weight=4.0),
    "hed": Reward(weight=4.0),
    "lineart": Reward(weight=4.0),
}


class Frozen:
    """What ControlNet training reads and does not change: base model, scenes, latents and captions."""

    def __init__(self, work: Path) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.scenes: Scenes = load_scenes(work, TRAIN)
        self.latents = encode_scenes(work)
        self.alphas = alphas_cumprod()
        self.unet: Any = UNet2DConditionModel.from_pretrained(work / "unet").eval().requires_grad_(False)
        self.vae: Any = AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        with torch.no_grad():
            ids = tokenize(tokenizer, self.scenes.captions)
            self.prompt_embeds = torch.cat([text_encoder(x)[0] for x in ids.split(500)])
            self.no_prompt = text_encoder(tokenize(tokenizer, [""]))[0][0]
        self.conditions = Conditions()

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scene numbers [B], latents [B,4,16,16] and prompt embeddings [B,77,64], some of them of the empty prompt."""
        which = torch.randint(len(self.scenes), (size,))
        dropped = torch.rand(size, 1, 1) < CAPTION_DROPOUT
        return which, self.latents[which], torch.where(dropped, self.no_prompt, self.prompt_embeds[which])

    def predict(self, controlnet: nn.Module, noisy: Tensor, t: Tensor, embeds: Tensor, control: Tensor) -> Tensor:
        """The UNet's prediction with this ControlNet's residuals."""
        down, mid = controlnet(noisy, t, embeds, control, return_dict=False)
        return self.unet(
            noisy, t, embeds, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample


def train_plain(work: Path, condition: str) -> Path:
    """Trains `work/controlnet/<condition>` from the UNet's own encoder half."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    frozen = Frozen(work)
    controlnet = ControlNetModel.from_unet(frozen.unet, conditioning_embedding_out_channels=(8, 16, 32, 48))
    controlnet.train().requires_grad_(True)
    trainer = Trainer([controlnet], PLAIN_STEPS, PLAIN_LR, warmup=100)
    start, mean = time.perf_counter(), 0.0
    for step in range(PLAIN_STEPS):
        loss = _diffusion_loss(frozen, controlnet, condition, PLAIN_BATCH)
        trainer.step(loss)
        mean += loss.item() / 200
        if step % 200 == 199:
            print(f"{condition} {step + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            mean = 0.0
    trainer.finish()
    folder = work / "controlnet" / condition
    controlnet.save_pretrained(folder)
    return folder


def train_on(work: Path, condition: str, seed: int, reward: bool, settings: Reward | None = None) -> Path:
    """Goes on from the plain ControlNet, with the reward or, for comparison, without.

    Both see the same number of steps, the same batches and the same noise; without a reward, half of the batch is
    still drawn from light noise, so that the reward is all that differs.

    Returns:
        `work/controlnet-<reward|continued>-<seed>/<condition>`.
    """
    from diffusers import ControlNetModel

    r = settings or REWARDS[condition]
    torch.manual_seed(seed)
    frozen = Frozen(work)
    consistency = Consistency(work, condition) if reward else None
    controlnet = ControlNetModel.from_pretrained(work / "controlnet" / condition).train()
    trainer = Trainer([controlnet], r.steps, r.lr, ema=0.98, warmup=20)
    start, means = time.perf_counter(), torch.zeros(2)
    half = r.batch // 2
    for step in range(r.steps):
        which, latents, embeds = frozen.batch(r.batch)
        control = frozen.conditions(condition, frozen.scenes, which)
        t = torch.cat([torch.randint(0, 1000, (half,)), torch.randint(0, r.max_timestep, (r.batch - half,))])
        noise = torch.randn_like(latents)
        noisy = add_noise(latents, noise, frozen.alphas[t])
        predicted = frozen.predict(controlnet, noisy, t, embeds, control)
        loss = weighted_mse(predicted, noise, frozen.alphas[t])
        found = torch.zeros(())
        if consistency is not None:
            a = frozen.alphas[t[half:]].reshape(-1, 1, 1, 1)
            denoised = (noisy[half:] - (1 - a).sqrt() * predicted[half:]) / a.sqrt()
            image = frozen.vae.decode(denoised / frozen.vae.config.scaling_factor).sample / 2 + 0.5
            found = consistency(image, frozen.scenes, which[half:], control[half:])
        trainer.step(loss + r.weight * found)
        means += torch.stack([loss.detach(), found.detach()]) / 50
        if step % 50 == 49:
            kind = "reward" if reward else "continued"
            seconds = time.perf_counter() - start
            print(f"{condition} {kind} seed {seed} {step + 1}: loss {means[0]:.4f}, consistency {means[1]:.4f}, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip
            means.zero_()
    trainer.finish()
    folder = work / f"controlnet-{'reward' if reward else 'continued'}-{seed}" / condition
    controlnet.save_pretrained(folder)
    return folder


class Consistency:
    """The loss between a condition and the one extracted from an image [B,3,H,W] in about [0,1]."""

    def __init__(self, work: Path, condition: str) -> None:
        self.condition = condition
        self.extractor: Any = None
        if condition in ("seg", "depth"):
            self.extractor = load_extractor(work / "extractors" / "reward" / condition)
        else:
            # canny's edges have no slope; the soft edges that its thresholds act on have.
            self.extractor = Conditions().filters["hed" if condition == "canny" else condition]

    def __call__(self, image: Tensor, scenes: Scenes, which: Tensor, control: Tensor) -> Tensor:
        """The loss of the condition that is extracted from an image, beside the scenes' own."""
        image = _clamp(image)
        if self.condition == "seg":
            return F.cross_entropy(self.extractor.logits(image), scenes.index[which].long())
        if self.condition == "depth":
            return F.mse_loss(self.extractor(image), scenes.depth[which])
        if self.condition == "canny":
            return F.l1_loss(self.extractor(image), self.extractor(scenes.pixels(which)))
        return F.l1_loss(self.extractor(image), control[:, 0])


def _diffusion_loss(frozen: Frozen, controlnet: nn.Module, condition: str, size: int) -> Tensor:
    which, latents, embeds = frozen.batch(size)
    t = torch.randint(0, 1000, (size,))
    noise = torch.randn_like(latents)
    noisy = add_noise(latents, noise, frozen.alphas[t])
    control = frozen.conditions(condition, frozen.scenes, which)
    return weighted_mse(frozen.predict(controlnet, noisy, t, embeds, control), noise, frozen.alphas[t])


def _clamp(image: Tensor) -> Tensor:
    """Into [0,1] as a picture would be, with a gradient of one everywhere."""
    return image + (image.clamp(0, 1) - image).detach()
