"""Guidance: classifier-free, or as an input of a UNet that was distilled with it."""

import numpy as np
from numpy.typing import NDArray


def guidance_embedding(guidance_scale: float, width: int) -> NDArray[np.float32]:
    """A guidance scale as a distilled UNet reads it: float32 [1, width].

    The sinusoidal embedding of (guidance_scale − 1) · 1000 (arXiv 2210.03142, section 3.1; diffusers'
    `get_guidance_scale_embedding` in pipeline_latent_consistency_text2img.py).
    """
    half = width // 2
    step = np.float32(np.log(10000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32((guidance_scale - 1) * 1000.0) * frequencies
    embedding = np.zeros((1, width), np.float32)
    embedding[0, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return embedding
