"""What a scheduler config says about noise: the training schedule, and the time steps and sigmas of one run.

The training schedule (betas, their cumulative product, sigmas) and a run's sigmas are float32 on purpose: diffusers
keeps them so, and a schedule of higher precision would be another schedule. All of it is diffusers' to the bit where
PyTorch's float32 square root is rounded as IEEE 754 has it. That of PyTorch's CPU builds with MKL is not: one root in
six is off by a bit on some machines. diffusers then has another last bit in some sigmas, and where it cuts a fractional
time step to a whole one (DPM-Solver's Karras sigmas of a cosine schedule), 1099.0 may become 1098 there.

`settings` is a complete mapping of checked values, as `scheduler_config.from_config` makes it.
"""

import math

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from .scheduler_config import ALIGN_YOUR_STEPS, Settings

Floats = npt.NDArray[np.float64]

# Align Your Steps (arXiv 2404.14507), 10 steps of Stable Diffusion 1.5 and the sigma that they end near: those of the
# time steps in diffusers' `AysSchedules`, to more digits than its own sigmas.
_AYS = (
    14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
    0.3977456272, 0.1515232662, 0.0291671582,
)  # fmt: skip


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
    """The cumulative product of 1 − beta, float32 [num_train_timesteps]; PyTorch too accumulates it in float64.

    It ends in NaN where rescaling to zero SNR divides by a product that has become 0 before the last time step.
    """
    alphas = np.float32(1) - _betas(settings)
    if settings["rescale_betas_zero_snr"]:  # arXiv 2305.08891, algorithm 1
        root = np.sqrt(np.cumprod(alphas, dtype=np.float64).astype(np.float32))
        bar = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
        alphas = np.float32(1) - (np.float32(1) - np.append(bar[0], bar[1:] / bar[:-1]))
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _bar_and_sigmas(settings: Settings) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """`alphas_cumprod` as the solvers that work with sigmas have it, and sigma/alpha of every training step."""
    bar = alphas_cumprod(settings)
    if settings["rescale_betas_zero_snr"]:
        bar[-1] = 2**-24  # as diffusers, so that the last sigma is finite
    return bar, np.sqrt((1 - bar) / bar)


def _lower_bound(values: npt.NDArray[np.float32], bound: float) -> int:
    """`torch.searchsorted(values, bound)`, also of values that are not sorted: what is NaN counts as below."""
    start, end = 0, len(values)
    while start < end:
        middle = start + (end - start) // 2
        start, end = (start, middle) if values[middle] >= bound else (middle + 1, end)
    return start


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
    trailing: Floats = np.arange(float(last), 0, -settings["num_train_timesteps"] / n).round() - 1
    return trailing


def require_count(timesteps: Floats, n: int) -> None:
    """Holds a schedule to its number of steps.

    Raises:
        UserError: it has another one. For 61 steps of 1000, `np.arange` rounds to one more, and diffusers runs it, at a
            time step of −1.
    """
    if len(timesteps) != n:
        raise UserError(f"'trailing' timestep_spacing gives {len(timesteps)} steps for {n}: use {n - 1} or {n + 1}")


def karras_sigmas(settings: Settings, n: int, smallest: float, largest: float) -> Floats:
    """EDM, arXiv 2206.00364, equation 5, rho = 7: [n], descending."""
    smallest = smallest if settings["sigma_min"] is None else settings["sigma_min"]
    largest = largest if settings["sigma_max"] is None else settings["sigma_max"]
    low, high = smallest ** (1 / 7.0), largest ** (1 / 7.0)
    return np.asarray((high + np.linspace(0, 1, n) * (low - high)) ** 7.0, np.float64)


def _ays_schedule(n: int, train: npt.NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Time steps and sigmas of Align Your Steps, [n] each: between the published sigmas linear in log sigma.

    Whole time steps with their own sigmas, as diffusers has them from `set_timesteps(timesteps=…)`.
    """
    sigmas = np.exp(np.interp(np.linspace(0, 1, n + 1)[:n], np.linspace(0, 1, len(_AYS)), np.log(_AYS)))
    timesteps = timesteps_of_sigmas(sigmas, train).round()
    return timesteps, np.interp(timesteps, np.arange(len(train)), train)


def timesteps_of_sigmas(sigmas: Floats, train_sigmas: npt.NDArray[np.float32]) -> Floats:
    """Where in the training schedule each sigma lies, linear in log sigma: [n] fractional time steps.

    That is after the last training step whose sigma is not above it. The training sigmas need not ascend: where
    rescaling leaves one above 4096, that of the last step is below it.
    """
    log_sigmas, log_train = np.log(np.maximum(sigmas, 1e-10)), np.log(train_sigmas)
    smallest_from_here = np.fmin.accumulate(log_train[::-1])[::-1]  # of those that are numbers
    low = np.clip(np.searchsorted(smallest_from_here, log_sigmas, side="right") - 1, 0, max(len(log_train) - 2, 0))
    high = np.minimum(low + 1, len(log_train) - 1)
    weight = np.clip((log_train[low] - log_sigmas) / (log_train[low] - log_train[high]), 0, 1)
    return np.asarray((1 - weight) * low + weight * high, np.float64)


def euler_schedule(settings: Settings, n: int) -> tuple[Floats, Floats]:
    """Time steps [n], fractional, and sigmas [n + 1] with the one that the last step ends at."""
    train_steps, (_, train) = settings["num_train_timesteps"], _bar_and_sigmas(settings)
    timesteps = spaced_timesteps(settings, n, last=train_steps, points=n, whole=False)
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(train_steps), train)
    if settings["use_karras_sigmas"]:
        sigmas = karras_sigmas(settings, n, float(sigmas[-1]), float(sigmas[0]))
        timesteps = timesteps_of_sigmas(sigmas, train)
    elif settings.get(ALIGN_YOUR_STEPS):
        timesteps, sigmas = _ays_schedule(n, train)
    require_count(timesteps, n)
    return timesteps, _with_end(sigmas, settings, float(train[0]))


def multistep_schedule(settings: Settings, n: int, *, unipc: bool) -> tuple[Floats, Floats]:
    """Time steps [n], whole, and sigmas [n + 1] with the one that the last step ends at.

    Args:
        unipc: as UniPCMultistepScheduler has them, else as DPMSolverMultistepScheduler. They differ with Karras sigmas.

    Raises:
        UserError: as `require_count`.
    """
    train_steps, (bar, train) = settings["num_train_timesteps"], _bar_and_sigmas(settings)
    smallest = float(train[0])
    if settings["use_karras_sigmas"]:
        sigmas = karras_sigmas(settings, n, smallest, float(train[-1]))
        timesteps = timesteps_of_sigmas(sigmas, train)
        cosine = settings["beta_schedule"] == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine and not unipc else timesteps.round()
        smallest = float(sigmas[-1]) if unipc else smallest
    elif settings.get(ALIGN_YOUR_STEPS):
        timesteps, sigmas = _ays_schedule(n, train)
    else:
        last = train_steps
        if not unipc:
            lambdas = np.log(np.sqrt(bar)) - np.log(np.sqrt(1 - bar))
            last -= _lower_bound(lambdas[::-1], settings["lambda_min_clipped"])
        timesteps = spaced_timesteps(settings, n, last=last, points=n + 1)
        require_count(timesteps, n)
        sigmas = np.interp(timesteps, np.arange(train_steps), train)
    return timesteps, _with_end(sigmas, settings, smallest)


def _with_end(sigmas: Floats, settings: Settings, sigma_min: float) -> Floats:
    """sigmas and the one that the last step ends at, [n + 1], rounded to float32 as diffusers rounds them."""
    end = sigma_min if settings["final_sigmas_type"] == "sigma_min" else 0.0
    return np.append(sigmas, end).astype(np.float32).astype(np.float64)
