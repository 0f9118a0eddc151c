"""diffusers' schedulers as the samplers are compared with them: what each name stands for, and their true matrices.

A scheduler's state and inputs are filled with unit vectors (its sample, last sample, model outputs, the model's output,
the noise), one real `step` is taken, and what comes out as sample, last sample and model outputs is the true matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
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
UNIT = torch.eye(6, dtype=torch.float64)[:, :, None]  # x, x_last, m0, m1, noise_pred, noise: [6, 6 directions, 1]


@contextmanager
def ieee_roots() -> Iterator[None]:
    """PyTorch's float32 square root rounded as IEEE 754 has it.

    MKL's, which PyTorch calls on x86, is off by a bit for one number in six on some machines: without this, the last
    bit of a diffusers schedule depends on where it runs.
    """
    power = torch.Tensor.__pow__

    def root(tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(tensor.numpy())))

    with (
        mock.patch.object(torch.Tensor, "sqrt", root),
        mock.patch.object(torch, "sqrt", root),
        mock.patch.object(torch.Tensor, "__pow__", lambda x, e: root(x) if e == 0.5 else power(x, e)),
    ):
        yield


def reference(
    name: str,
    config: dict[str, Any],
    steps: int,
    begin: int = 0,
    *,
    double: bool = True,
    timesteps: list[int] | None = None,
) -> Any:
    """diffusers' scheduler, ready to step.

    Args:
        name, config, steps, begin: as `build_table` takes them.
        double: its schedule is cast to float64, so that formulas are compared.
        timesteps: instead of its own, as its `set_timesteps` takes them; UniPC's takes none, and is given the time
            steps and sigmas of DPM-Solver's.
    """
    target, overrides = TARGETS[name]
    scheduler = target.from_config(config, **overrides)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    elif name == "unipc":
        scheduler.set_timesteps(steps)
        other = reference("dpmpp_2m", config, steps, double=False, timesteps=timesteps)
        scheduler.timesteps, scheduler.sigmas = other.timesteps, other.sigmas
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # without it, a repeated first time step makes diffusers run off the end
    if double:
        for attribute in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if hasattr(scheduler, attribute):
                setattr(scheduler, attribute, getattr(scheduler, attribute).double())
    return scheduler


def rows(scheduler: Any, name: str, begin: int = 0) -> Iterator[np.ndarray]:
    """The true matrix of each step from `begin` on, [5, 6]; NaN where diffusers does not show the row."""
    x, x_last, m0, m1, noise_pred, noise = UNIT
    for k, t in enumerate(scheduler.timesteps[begin:], begin):
        true = torch.full((5, 6), torch.nan, dtype=torch.float64)
        scheduler.scale_model_input(x, t)
        multistep = hasattr(scheduler, "model_outputs")
        if multistep:
            scheduler.model_outputs = [m1, m0][-scheduler.config.solver_order :]
        if name == "unipc" and k > begin:
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
