"""Measures condition consistency on fresh scenes: no control, ControlNet, trained on without reward, ControlNet++.

Beside them the ceilings: the real images, and their reconstructions by the autoencoder. Scored by networks that no
ControlNet was trained against, with the runtime's own metrics.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ...conditions import CONDITIONS
from ...export.extractors.miniature import load_extractor
from ...miniature.scenes import LABELS
from ...runtime.control.consistency import MeanIoU, f1, ms_ssim, rmse
from .data import TEST, Conditions, Scenes, canny, load_scenes
from .diffusion import SCHEDULER_CONFIG, tokenize

STEPS, GUIDANCE, BATCH = 20, 3.0, 40
SEEDS = (0, 1, 2)


class Judge:
    """Scores images against their scenes' conditions."""

    def __init__(self, work: Path) -> None:
        self.networks = {c: load_extractor(work / "extractors" / "scoring" / c) for c in ("seg", "depth")}
        self.conditions = Conditions()
        self.labels = np.array(list(LABELS.values()), np.uint8)

    @torch.no_grad()
    def score(self, condition: str, images: Tensor, scenes: Scenes) -> dict[str, float]:
        """Metrics of uint8 images [N,3,128,128] by name."""
        found = torch.cat([self._extract(condition, x.float().div(255)) for x in images.split(50)])
        if condition == "seg":
            pooled = MeanIoU()
            for given, labels in zip(scenes.index.numpy(), found.numpy(), strict=True):
                pooled.update(self.labels[given], labels)
            return {"mIoU": pooled.value()}
        given = self.conditions(condition, scenes, slice(None))[:, 0]
        pairs = list(zip(given.double().numpy(), found.double().numpy(), strict=True))
        if condition == "depth":
            plain = np.mean([np.sqrt(np.mean((g - d) ** 2)) for g, d in pairs])
            return {"RMSE": float(np.mean([rmse(g, d) for g, d in pairs])), "RMSE in [0,1]": float(plain)}
        if condition == "canny":
            truth, edges = np.stack([g > 0.5 for g, _ in pairs]), np.stack([d > 0.5 for _, d in pairs])
            return {"F1": f1(truth, edges), "F1 within one pixel": near_f1(truth, edges)}
        return {"SSIM": float(np.mean([ms_ssim(g, d) for g, d in pairs]))}

    def _extract(self, condition: str, images: Tensor) -> Tensor:
        if condition in self.networks:
            found = self.networks[condition](images)
            return found if condition == "seg" else (found * 255).round().div(255)
        if condition == "canny":
            return canny(images)
        return (self.conditions.filters[condition](images) * 255).round().div(255)


def near_f1(truth: np.ndarray, edges: np.ndarray) -> float:
    """F1 in percent where an edge pixel counts as found if the other map [N,H,W] has one within one pixel."""
    square = np.ones((3, 3), np.uint8)
    grown = [np.stack([cv2.dilate(m.astype(np.uint8), square) for m in maps]) > 0 for maps in (truth, edges)]
    precision = (edges & grown[0]).sum() / max(edges.sum(), 1)
    recall = (truth & grown[1]).sum() / max(truth.sum(), 1)
    return float(200 * precision * recall / max(precision + recall, 1e-9))


class Sampler:
    """The base model with weights as they are published: rounded to fp16, computed in fp32."""

    def __init__(self, work: Path) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler
        from transformers import CLIPTextModel, CLIPTokenizer

        self.steps, self.guidance = STEPS, GUIDANCE
        self.scheduler: Any = UniPCMultistepScheduler.from_config(SCHEDULER_CONFIG)
        self.scenes = load_scenes(work, TEST)
        self.unet: Any = rounded(UNet2DConditionModel.from_pretrained(work / "unet"))
        self.vae: Any = rounded(AutoencoderKL.from_pretrained(work / "vae"))
        text_encoder = rounded(CLIPTextModel.from_pretrained(work / "text_encoder"))
        ids = tokenize(CLIPTokenizer.from_pretrained(work / "tokenizer"), [*self.scenes.captions, ""])
        with torch.no_grad():
            self.embeds = text_encoder(ids)[0]

    def generate(self, controlnet: Any, control: Tensor | None, seed: int) -> Tensor:
        """One image uint8 [N,3,128,128] for each scene; the same noise for every ControlNet."""
        noise = torch.randn(len(self.scenes), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        images = []
        for part in torch.arange(len(self.scenes)).split(BATCH):
            own = None if control is None else control[part]
            images.append(self.sample(controlnet, own, noise[part], part))
        return torch.cat(images)

    @torch.no_grad()
    def sample(self, controlnet: Any, control: Tensor | None, latents: Tensor, which: Tensor) -> Tensor:
        """Images uint8 [B,3,128,128] of the scenes `which` [B] from noise [B,4,16,16]; control [B,3,128,128]."""
        self.scheduler.set_timesteps(self.steps)
        embeds = torch.cat([self.embeds[-1:].expand(len(which), -1, -1), self.embeds[which]])
        for t in self.scheduler.timesteps:
            both = torch.cat([latents, latents])
            residuals: dict[str, Any] = {}
            if control is not None:
                down, mid = controlnet(both, t, embeds, torch.cat([control, control]), return_dict=False)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            without, with_prompt = self.unet(both, t, embeds, **residuals).sample.chunk(2)
            guided = without + self.guidance * (with_prompt - without)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte()

    @torch.no_grad()
    def reconstruct(self) -> Tensor:
        """The scenes after encoder and decoder, uint8 [N,3,128,128]."""
        scaling = self.vae.config.scaling_factor
        images = self.scenes.pixels(slice(None)).split(BATCH)
        return torch.cat([self._decode(self.vae.encode(x * 2 - 1).latent_dist.mean * scaling) for x in images])


def rounded(module: Any) -> Any:
    """The module with its weights rounded to fp16, as they are shipped."""
    return module.half().float().eval()


def evaluate(work: Path, condition: str) -> dict[str, Any]:
    """Scores of every stage of one condition, a list over seeds each; written to `work/results/<condition>.json`."""
    from diffusers import ControlNetModel

    sampler, judge, start = Sampler(work), Judge(work), time.perf_counter()
    scenes = sampler.scenes
    control = judge.conditions(condition, scenes, slice(None))
    results: dict[str, Any] = {
        "real images": [judge.score(condition, scenes.image, scenes)],
        "VAE reconstructions": [judge.score(condition, sampler.reconstruct(), scenes)],
        "no control": [judge.score(condition, uncontrolled(work, sampler, seed), scenes) for seed in SEEDS],
    }
    folders = {
        "ControlNet": [work / "controlnet"],
        "trained on without reward": sorted(work.glob("controlnet-continued-*")),
        "ControlNet++": sorted(work.glob("controlnet-reward-*")),
    }
    for stage, parents in folders.items():
        trained = [p / condition for p in parents if (p / condition / "config.json").is_file()]
        if not trained:
            continue
        results[stage] = []
        for i, seed in enumerate(SEEDS):
            # Training seed i is sampled with sampling seed i; a stage with one training serves every sampling seed.
            controlnet = rounded(ControlNetModel.from_pretrained(trained[i % len(trained)]))
            scores = judge.score(condition, sampler.generate(controlnet, control, seed), scenes)
            results[stage].append(scores)
            print(f"{condition} {stage} seed {seed}: {scores}, {time.perf_counter() - start:.0f} s", flush=True)
        results[f"trainings of {stage}"] = len(trained)
    path = work / "results" / f"{condition}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return results


def uncontrolled(work: Path, sampler: Sampler, seed: int) -> Tensor:
    """The UNet alone; the same images serve every condition, so they are generated once."""
    path = work / f"uncontrolled-{seed}.pt"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(sampler.generate(None, None, seed), partial)
        partial.replace(path)
    images: Tensor = torch.load(path, weights_only=True)
    return images


def table(results: dict[str, dict[str, Any]]) -> str:
    """`miniature/README.md`'s table: mean over seeds and, in brackets, the range."""
    stages = [
        "no control",
        "ControlNet",
        "trained on without reward",
        "ControlNet++",
        "VAE reconstructions",
        "real images",
    ]
    lines = ["| condition | metric | " + " | ".join(stages) + " |", "|---" * (len(stages) + 2) + "|"]
    for condition, found in results.items():
        for metric in found["real images"][0]:
            better = "↑" if CONDITIONS[condition].higher_is_better else "↓"
            cells = [cell([s[metric] for s in found.get(stage, [])], metric) for stage in stages]
            lines.append(f"| {condition} | {metric} {better} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: Sequence[float], metric: str) -> str:
    """Mean and, in brackets, the range."""
    if not values:
        return "–"
    digits = 4 if metric == "SSIM" or "[0,1]" in metric else 2
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
