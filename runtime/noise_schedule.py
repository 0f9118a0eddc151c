"""What a scheduler_config.json says about noise: the training schedule, and the time steps and sigmas of one run.

The training schedule (betas, their cumulative product, sigmas) and a run's sigmas are float32 on purpose: diffusers
keeps them so, and a schedule of higher precision would be another schedule. Betas and their cumulative product are
PyTorch's to the bit; sigmas to the last bit, where PyTorch's own square root depends on the machine.

`settings` is a complete mapping of checked values, as `scheduler_config.from_config` makes it.
"""

import math

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .scheduler_config import Settings

Floats = npt.NDArray[np.float64]


def _linspace(start: float, end: float, steps: int) -> npt.NDArray[np.float32]:
    """`torch.linspace(…, dtype=torch.float32)` on CPUs with FMA, to the bit: from both ends, rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    i = np.arange(steps)
    return np.where(i < max(steps // 2, 1), first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _betas(settings: Settings) -> npt.NDArray[np.float32]:
    steps, start, end = (settings[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if settings["trained_betas"] is not None:
        return np.asarray(settings["trained_betas"], np.float32)
    if settings["beta_schedule"] == "squaredcos_cap_v2":  # improved DDPM, arXiv 2102.09672, equation 17
        alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(steps)], np.float32)
    if settings["beta_schedule"] == "scaled_linear":
        return np.square(_linspace(start**0.5, end**0.5, steps))
    return _linspace(start, end, steps)


def alphas_cumprod(settings: Settings) -> npt.NDArray[np.float32]:
    """The cumulative product of 1 − beta, float32 [num_train_timesteps]; PyTorch too accumulates it in float64."""
    alphas = np.float32(1) - _betas(settings)
    if settings["rescale_betas_zero_snr"]:  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(np.cumprod(alphas, dtype=np.float64).astype(np.float32))
        bar = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
        alphas = np.float32(1) - (np.float32(1) - np.append(bar[0], bar[1:] / bar[:-1]))
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def train_sigmas(settings: Settings) -> npt.NDArray[np.float32]:
    """sigma/alpha of every training step, float32 [num_train_timesteps], ascending."""
    bar = alphas_cumprod(settings)
    if settings["rescale_betas_zero_snr"]:
        bar[-1] = 2**-24  # as diffusers, so that the last sigma is finite
    sigmas: npt.NDArray[np.float32] = np.sqrt((1 - bar) / bar)
    return sigmas


def spaced_timesteps(settings: Settings, n: int, *, last: int, points: int, whole: bool = True) -> Floats:
    """`timestep_spacing` (arXiv 2305.08891, table 2): [n], descending.

    `points` is n, or n + 1 for the multistep solvers, which place one more point and leave out the lowest.
    """
    spacing = settings["timestep_spacing"]
    if spacing == "linspace":
        linspace: Floats = np.linspace(0, last - 1, points)[::-1][:n]
        return np.round(linspace) if whole else linspace
    if spacing == "leading":
        leading: Floats = np.arange(points, dtype=np.float64)[::-1][:n] * (last // points) + settings["steps_offset"]
        return leading
    timesteps: Floats = np.arange(float(last), 0, -settings["num_train_timesteps"] / n).round() - 1
    if len(timesteps) != n:
        # np.arange's rounding, for 61 steps of 1000 for one; diffusers then runs one more step, at a time step of −1.
        raise UserError(f"'trailing' timestep_spacing gives {len(timesteps)} steps for {n}: use {n - 1} or {n + 1}")
    return timesteps


def karras_sigmas(settings: Settings, n: int, smallest: float, largest: float) -> Floats:
    """EDM, arXiv 2206.00364, equation 5, rho = 7: [n], descending."""
    smallest = smallest if settings["sigma_min"] is None else settings["sigma_min"]
    largest = largest if settings["sigma_max"] is None else settings["sigma_max"]
    low, high = smallest ** (1 / 7.0), largest ** (1 / 7.0)
    return np.asarray((high + np.linspace(0, 1, n) * (low - high)) ** 7.0, np.float64)


def timesteps_of_sigmas(sigmas: Floats, train_sigmas: npt.NDArray[np.float32]) -> Floats:
    """Where in the training schedule each sigma lies, linear in log sigma: [n] fractional time steps."""
    log_sigmas, log_train = np.log(np.maximum(sigmas, 1e-10)), np.log(train_sigmas)
    low = np.clip(np.searchsorted(log_train, log_sigmas, side="right") - 1, 0, max(len(log_train) - 2, 0))
    high = np.minimum(low + 1, len(log_train) - 1)
    weight = np.clip((log_train[low] - log_sigmas) / (log_train[low] - log_train[high]), 0, 1)
    return np.asarray((1 - weight) * low + weight * high, np.float64)


def euler_schedule(settings: Settings, n: int) -> tuple[Floats, Floats]:
    """Time steps [n], fractional, and sigmas [n + 1] with the one that the last step ends at."""
    train_steps, train = settings["num_train_timesteps"], train_sigmas(settings)
    timesteps = spaced_timesteps(settings, n, last=train_steps, points=n, whole=False)
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(train_steps), train)
    if settings["use_karras_sigmas"]:
        sigmas = karras_sigmas(settings, n, float(sigmas[-1]), float(sigmas[0]))
        timesteps = timesteps_of_sigmas(sigmas, train)
    return timesteps, _with_end(sigmas, settings, float(train[0]))


def multistep_schedule(settings: Settings, n: int, *, unipc: bool) -> tuple[Floats, Floats]:
    """Time steps [n], whole, and sigmas [n + 1] with the one that the last step ends at.

    Args:
        unipc: as UniPCMultistepScheduler has them, else as DPMSolverMultistepScheduler. They differ with Karras sigmas.

    Raises:
        UserError: two steps of a second-order solver at one noise level, which it would divide by.
    """
    train_steps, train = settings["num_train_timesteps"], train_sigmas(settings)
    smallest = float(train[0])
    if settings["use_karras_sigmas"]:
        sigmas = karras_sigmas(settings, n, smallest, float(train[-1]))
        timesteps = timesteps_of_sigmas(sigmas, train)
        cosine = settings["beta_schedule"] == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine and not unipc else timesteps.round()
        smallest = float(sigmas[-1]) if unipc else smallest
    else:
        lambdas = -np.log(train[::-1])
        last = train_steps - int(np.searchsorted(lambdas, settings.get("lambda_min_clipped", -math.inf)))
        timesteps = spaced_timesteps(settings, n, last=last, points=n + 1)
        sigmas = np.interp(timesteps, np.arange(train_steps), train)
    if settings["solver_order"] > 1 and not (np.diff(sigmas.astype(np.float32)) < 0).all():
        raise UserError(
            f"num_inference_steps {n} puts two steps of a multistep solver on one noise level: use fewer (at most "
            f"{train_steps // 2} is always safe) or the scheduler ddim or euler"
        )
    return timesteps, _with_end(sigmas, settings, smallest)


def _with_end(sigmas: Floats, settings: Settings, sigma_min: float) -> Floats:
    """sigmas and the one that the last step ends at, [n + 1], rounded to float32 as diffusers rounds them."""
    end = sigma_min if settings["final_sigmas_type"] == "sigma_min" else 0.0
    return np.append(sigmas, end).astype(np.float32).astype(np.float64)
