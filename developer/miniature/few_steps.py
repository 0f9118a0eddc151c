"""Few-step sampling: the UNet distilled by latent consistency (LCM, arXiv 2310.04378, algorithm 1), kept as a LoRA."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...export.lora import fuse
from ...export.resolved_sources import Lora
from .controlnet import Frozen
from .diffusion import SCHEDULER_CONFIG, add_noise
from .evaluate import GUIDANCE, SEEDS, Judge, Sampler, cell, rounded
from .muon import Trainer

STEPS, BATCH, LR = 400, 32, 5e-4
RANK = 8
SKIP = 20  # timesteps that one step of the teacher's solver bridges: 50 of them make a schedule
TARGET_DECAY = 0.95


def distill(work: Path) -> Path:
    """Distils `work/unet`, at guidance `GUIDANCE`, into `work/unet-lcm`."""
    torch.manual_seed(0)
    frozen = Frozen(work)
    student = copy.deepcopy(frozen.unet).train().requires_grad_(True)
    target = copy.deepcopy(frozen.unet)
    trainer = Trainer([student], STEPS, LR, ema=0.99, warmup=50)
    start, mean = time.perf_counter(), 0.0
    for step in range(STEPS):
        _, latents, embeds = frozen.batch(BATCH)
        k = torch.randint(1, 1000 // SKIP, (BATCH,))
        t, earlier = (k + 1) * SKIP - 1, k * SKIP - 1
        noisy = add_noise(latents, torch.randn_like(latents), frozen.alphas[t])
        with torch.no_grad():
            guided = _guided(frozen, noisy, t, embeds)
            less_noisy = _ddim(noisy, guided, frozen.alphas[t], frozen.alphas[earlier])
            wanted = _x0(target(less_noisy, earlier, embeds).sample, less_noisy, frozen.alphas[earlier])
        found = _x0(student(noisy, t, embeds).sample, noisy, frozen.alphas[t])
        loss = ((found - wanted).square() + 1e-6).sqrt().mean()
        trainer.step(loss)
        with torch.no_grad():
            for p, q in zip(target.parameters(), student.parameters(), strict=True):
                p.lerp_(q, 1 - TARGET_DECAY)
        mean += loss.item() / 100
        if step % 100 == 99:
            print(f"lcm {step + 1}: loss {mean:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
            mean = 0.0
    trainer.finish()
    student.save_pretrained(work / "unet-lcm")
    return work / "unet-lcm"


def extract_lora(work: Path) -> Path:
    """The difference of `work/unet-lcm` to `work/unet` at rank `RANK`, by SVD, into `work/lora/lcm`.

    A LoRA is a sixth of the UNet and works with any ControlNet of it; biases and norms stay the base model's.
    """
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    base: Any = UNet2DConditionModel.from_pretrained(work / "unet")
    distilled = dict(UNet2DConditionModel.from_pretrained(work / "unet-lcm").named_modules())
    weights: dict[str, Tensor] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            continue
        delta = (distilled[name].weight - layer.weight).detach()
        u, s, v = torch.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
        rank = min(RANK, len(s))
        root = s[:rank].sqrt()
        up, down = u[:, :rank] * root, root[:, None] * v[:rank]
        if delta.ndim == 4:
            up, down = up[..., None, None], down.reshape(rank, *delta.shape[1:])
        weights[f"unet.{name}.lora_A.weight"] = down.half().contiguous()
        weights[f"unet.{name}.lora_B.weight"] = up.half().contiguous()
    file = work / "lora" / "lcm" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file)
    return file


def compare(work: Path) -> dict[str, Any]:
    """The mIoU of ControlNet++ for `seg` by sampler and steps, over seeds; written to `work/results/few_steps.json`."""
    from diffusers import ControlNetModel, LCMScheduler, UNet2DConditionModel, UniPCMultistepScheduler

    sampler, judge = Sampler(work), Judge(work)
    control = judge.conditions("seg", sampler.scenes, slice(None))
    controlnet = rounded(ControlNetModel.from_pretrained(work / "controlnet-reward-0" / "seg"))
    base, distilled = sampler.unet, rounded(UNet2DConditionModel.from_pretrained(work / "unet-lcm"))
    fused: Any = copy.deepcopy(base)
    fuse(fused, [Lora("lcm", work / "lora" / "lcm" / "pytorch_lora_weights.safetensors")], "unet")
    results: dict[str, Any] = {}
    torch.manual_seed(0)  # LCM draws noise at every step
    for title, unet, scheduler, steps, guidance in (
        ("UniPC, 8 steps", base, UniPCMultistepScheduler, 8, GUIDANCE),
        ("UniPC, 4 steps", base, UniPCMultistepScheduler, 4, GUIDANCE),
        ("LCM, 4 steps, not distilled", base, LCMScheduler, 4, GUIDANCE),
        ("LCM, 4 steps, distilled", distilled, LCMScheduler, 4, 1.0),
        ("LCM, 4 steps, LoRA of it", rounded(fused), LCMScheduler, 4, 1.0),
    ):
        sampler.unet, sampler.steps, sampler.guidance = unet, steps, guidance
        sampler.scheduler = scheduler.from_config(SCHEDULER_CONFIG)
        images = [sampler.generate(controlnet, control, seed) for seed in SEEDS]
        scores = [judge.score("seg", x, sampler.scenes)["mIoU"] for x in images]
        # How far the colors are from the scene's own: a washed-out picture can still have the right segmentation.
        off = [(x.float() - sampler.scenes.image.float()).abs().mean().item() for x in images]
        results[title] = {"mIoU": scores, "mean color error": off}
        print(f"{title}: {results[title]}", flush=True)
    (work / "results" / "few_steps.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return results


def table(results: dict[str, Any]) -> str:
    """`miniature/README.md`'s table of `compare`'s results: mean and, in brackets, the range."""
    lines = ["| sampler | mIoU ↑ | color error ↓ |", "|---|---|---|"]
    for title, found in results.items():
        cells = [cell(found[metric], metric) for metric in ("mIoU", "mean color error")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _guided(frozen: Frozen, noisy: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    empty = frozen.no_prompt.expand_as(embeds)
    both = frozen.unet(torch.cat([noisy, noisy]), torch.cat([t, t]), torch.cat([empty, embeds])).sample
    without, with_prompt = both.chunk(2)
    return without + GUIDANCE * (with_prompt - without)


def _x0(noise_pred: Tensor, noisy: Tensor, alphas: Tensor) -> Tensor:
    """The consistency function; LCM's c_skip is below 1e-5 and c_out above 0.999 from timestep 19 on."""
    a = alphas.reshape(-1, 1, 1, 1)
    return (noisy - (1 - a).sqrt() * noise_pred) / a.sqrt()


def _ddim(noisy: Tensor, noise_pred: Tensor, alphas: Tensor, earlier: Tensor) -> Tensor:
    return add_noise(_x0(noise_pred, noisy, alphas), noise_pred, earlier)
