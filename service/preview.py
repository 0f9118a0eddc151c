"""Small pictures of what a request looks like before it is done: a linear map from latents to colors."""

import threading

import numpy as np
from numpy.typing import NDArray

from ..runtime.images.image_files import Pixels

_SAMPLES = 16
"""Images after which the map has been learned."""


class Previewer:
    """Colors from latents, by least squares over what the decoder made of finished ones: it suits any VAE."""

    def __init__(self) -> None:
        self._products = np.zeros((5, 5))
        self._targets = np.zeros((5, 3))
        self._spread = 1.0
        self._learned = 0
        self._lock = threading.Lock()

    def learn(self, latents: NDArray[np.float32], images: Pixels) -> None:
        """Takes up finished images uint8 [B,H,W,3] with their latents float32 [B,4,h,w]."""
        if self._learned >= _SAMPLES or not np.isfinite(latents).all():
            return
        b, _, h, w = latents.shape
        height, width = images.shape[1:3]
        small = images.reshape(b, h, height // h, w, width // w, 3).mean((2, 4)).reshape(-1, 3)
        rows = _rows(latents)
        with self._lock:
            self._products += rows.T @ rows
            self._targets += rows.T @ small
            self._spread = float(latents.std()) or 1.0
            self._learned += b

    def picture(self, latents: NDArray[np.float32]) -> Pixels | None:
        """A picture uint8 [h,w,3] of latents [4,h,w] at any step; None while nothing has been learned."""
        if not self._learned:
            return None
        with self._lock:
            ridge = 1e-3 * np.trace(self._products) / 5
            weights = np.linalg.solve(self._products + ridge * np.eye(5), self._targets)
        # Noise is wider than what it becomes, by far in samplers that scale it: so brought, it stays within the colors.
        narrowed = latents * min(1.0, self._spread / (float(latents.std()) or 1.0))
        colors = _rows(narrowed[None]) @ weights
        return np.clip(colors + 0.5, 0, 255).astype(np.uint8).reshape(*latents.shape[1:], 3)


def _rows(latents: NDArray[np.float32]) -> NDArray[np.float64]:
    """[B,4,h,w] → [B·h·w,5]: the channels of each place, and 1."""
    flat = latents.transpose(0, 2, 3, 1).reshape(-1, 4).astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
