"""The factors on a ControlNet's residuals, as diffusers computes them."""

import numpy as np
from numpy.typing import NDArray


def residual_scales(
    conditioning_scale: float, residuals: int, *, guided: bool, guess_mode: bool
) -> NDArray[np.float32]:
    """The factor of each residual for each side of the guidance.

    In guess mode the factors grow from 0.1 to 1 with the depth (`torch.logspace(-1, 0, …)` in the forward method of
    diffusers' `controlnet.py`), and the negative prompt's side gets none (pipeline_controlnet.py), so that guidance
    itself pushes towards the control image.

    Args:
        conditioning_scale: `controlnet_conditioning_scale`.
        residuals: R, the middle block's included.
        guided: whether the batch is doubled for classifier-free guidance.

    Returns:
        float32 [R, n], n = 2 with guidance (the negative prompt's side first), else 1.
    """
    scales = np.full(residuals, conditioning_scale)
    if guess_mode:
        scales = np.logspace(-1, 0, residuals) * conditioning_scale
    sides = [np.zeros_like(scales) if guess_mode else scales, scales] if guided else [scales]
    return np.stack(sides, 1).astype(np.float32)
