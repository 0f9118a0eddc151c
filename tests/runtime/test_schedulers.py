"""The tables against diffusers' schedulers, without knowing the formulas.

A scheduler's state and inputs are filled with unit vectors (its sample, last sample, model outputs, the model's output,
the noise), one real `step` is taken, and what comes out in the sample, last sample and model outputs is a row of the true matrix.
"""

from collections.abc import Iterator
from unittest import mock

import diffusers
import numpy as np
import torch

TARGETS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
UNIT = torch.eye(6, dtype=torch.float64)[:, :, None]  # x, x_last, m0, m1, noise_pred, noise: [6, 6 directions, 1]


def reference(name: str, config: dict, steps: int, *, double: bool = True):
    """diffusers' scheduler, ready to step. `double`: in float64 as far as it goes, so that only formulas are compared."""
    target, overrides = TARGETS[name]
    scheduler = target.from_config(config, **overrides)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if double:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0] if config.get("set_alpha_to_one") is False else torch.tensor(1.0)
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def rows(scheduler, name: str) -> Iterator[np.ndarray]:
    """The true matrix of each step, [5, 6]; NaN where diffusers does not show the row."""
    x, x_last, m0, m1, noise_pred, noise = UNIT
    for k, t in enumerate(scheduler.timesteps):
        true = torch.full((5, 6), torch.nan, dtype=torch.float64)
        scheduler.scale_model_input(x, t)
        multistep = hasattr(scheduler, "model_outputs")
        if multistep:
            scheduler.model_outputs = [m1, m0][-scheduler.config.solver_order :]
        if name == "unipc" and k > 0:
            scheduler.last_sample = x_last
        with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", return_value=noise):
            out = scheduler.step(noise_pred, t, x)
        true[0] = out.prev_sample[:, 0]
        true[1] = (scheduler.last_sample if name == "unipc" else x)[:, 0]
        if multistep:
            for row, m in zip((2, 3), scheduler.model_outputs[::-1], strict=False):
                true[row] = m[:, 0]
        elif name != "lcm":
            true[2] = out.pred_original_sample[:, 0]
        if k + 1 < len(scheduler.timesteps):
            true[4] = scheduler.scale_model_input(out.prev_sample, scheduler.timesteps[k + 1])[:, 0]
        yield true.numpy()
