"""Samplers as tables: a whole schedule of N steps is N small matrices, computed in NumPy before the first step.

DDIM, Euler, DPM-Solver++(2M), UniPC with its corrector, and LCM are linear in their state and in the model's output.
With the state as four rows, step k of any of them is one matrix product:

    [x', x_last', m0', m1', model_input'] = coefficients[k] @ [x, x_last, m0, m1, noise_pred, noise, clipped]

x is the sample, x_last the sample one step earlier (as corrected, for UniPC), m0 and m1 the last two predictions of the
clean image x0, noise_pred the model's output after guidance (whatever its prediction type), noise fresh N(0, 1).
`clipped` is the one thing that is not linear: what clamping the step's prediction of x0 to ±x0_limit adds to it
(`clip_sample` of ddim and lcm), where that prediction is the row m0' without its last column. It is 0 for every sampler
that does not clip.

The formulas are the papers'; the conventions (time steps, defaults, orders of the first and last steps) are those of
diffusers 0.42's `TargetScheduler.from_config(scheduler_config.json)`, file by file:

    ddim                        scheduling_ddim.py                 DDIM, arXiv 2010.02502, equation 12 with sigma = 0
    euler                       scheduling_euler_discrete.py       EDM, arXiv 2206.00364, algorithm 2 without churn
    dpmpp_2m, dpmpp_2m_karras   scheduling_dpmsolver_multistep.py  DPM-Solver++, arXiv 2211.01095, algorithm 2
    unipc                       scheduling_unipc_multistep.py      UniPC, arXiv 2302.04867, algorithms 1 and 2
    lcm                         scheduling_lcm.py                  LCM, arXiv 2310.04378, algorithm 3

Betas, their cumulative product and sigmas are float32, as in diffusers (see noise_schedule.py); all that follows is
float64, where diffusers goes on in float32. The only rounding that remains between the two is diffusers' own.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...messages import printable, unknown_choice
from .noise_schedule import Floats, alphas_cumprod, euler_schedule, multistep_schedule, require_count, spaced_timesteps
from .scheduler_config import REMEDY, TIMESTEP_SPACINGS, Settings, from_config, spacing_overrides

UNLIMITED = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplerTable:
    """A schedule of N steps. The state starts as [x, 0, 0, 0].

    From noise alone x = init_noise_sigma · noise; from an image's latents x = a · latents + b · noise.

    Attributes:
        timesteps: float32 [N], what the model is given at each step; whole numbers, except for Euler.
        coefficients: float64 [N, 5, 7], the matrix of each step (see the module's docstring). The last step's model
            input is read by nobody. The last column is 0 in a table that does not clip.
        init_noise_sigma: standard deviation of the initial x of a whole schedule, drawn from noise alone.
        add_noise: (a, b) of image-to-image, the noise level at which the first step begins (also that of a whole
            schedule, where it is not quite 0 and init_noise_sigma).
        input_scale: the first model input is input_scale · x; those of later steps come out of the matrices.
        uses_noise: [N], whether the step adds fresh noise. Draw it only where it does: a draw advances the generator.
        x0_limit: what the prediction of x0 is clamped to, in both directions; the largest float32 where a table does
            not clip.
    """

    timesteps: npt.NDArray[np.float32]
    coefficients: Floats
    init_noise_sigma: float
    add_noise: tuple[float, float]
    input_scale: float
    uses_noise: tuple[bool, ...]
    x0_limit: float = UNLIMITED


def build_table(
    scheduler: str,
    config: Mapping[str, Any],
    num_inference_steps: int,
    begin: int = 0,
    timestep_spacing: str | None = None,
) -> SamplerTable:
    """The table of `scheduler` for a checkpoint, as diffusers' `TargetScheduler.from_config(config)` would sample.

    What of the config counts for a scheduler is told in scheduler_config.py.

    Two schedules that diffusers has and cannot run are given their meaning: UniPC with `bh1` to sigma 0 ends in NaN
    there, and at the formula's limit here; one that begins with a repeated time step (Karras sigmas from a `sigma_max`
    beyond the training's) starts at its second step there and runs off the end, and starts at its first here.

    Image-to-image enters the same schedule at step `begin`, as after diffusers' `set_begin_index(begin)`: a multistep
    solver has no history there and starts at first order, and what is special about the last steps stays where it is.

    Args:
        scheduler: one of `SCHEDULERS`.
        config: the contents of the model's scheduler_config.json.
        num_inference_steps: 1 … num_train_timesteps; for lcm at most original_inference_steps.
        begin: 0 … num_inference_steps − 1; the table has the num_inference_steps − begin steps from there on.
        timestep_spacing: where the time steps lie, of `TIMESTEP_SPACINGS`; None is the config's own.

    Raises:
        UserError: an unknown scheduler, or a spacing that it does not have; a number of steps or a begin out of range,
            or for which no schedule exists; something that the config asks for and this module does not do.
    """
    if scheduler not in _SAMPLERS:
        raise unknown_choice("scheduler", scheduler, SCHEDULERS)
    build, target, overrides, _ = _SAMPLERS[scheduler]
    require_spacing(scheduler, timestep_spacing)
    settings = from_config(target, config, **overrides, **spacing_overrides(target, timestep_spacing))
    train_steps, n = settings["num_train_timesteps"], num_inference_steps
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= train_steps:
        raise UserError(f"num_inference_steps {n!r} cannot be used: give a whole number from 1 to {train_steps}")
    if isinstance(begin, bool) or not isinstance(begin, (int, np.integer)) or not 0 <= begin < n:
        raise UserError(f"{n} steps cannot begin at step {begin!r}: give a whole number from 0 to {n - 1}")
    try:
        with np.errstate(all="ignore"):  # lambda is infinite where sigma is 0; what is not finite in the end is refused
            table = build(settings, int(n), int(begin))
    except np.linalg.LinAlgError:
        table = None
    if table is None or not _is_finite(table, begin):
        raise UserError(
            f"{scheduler} has no finite coefficients for {n} steps of the model's scheduler config (its betas and "
            f"sigmas): use another number of steps, or {REMEDY}"
        )
    return table


def _is_finite(table: SamplerTable, begin: int) -> bool:
    """Whether all that a run reads of a table is, in the float32 that it is read in."""
    # init_noise_sigma is read only where the first x is noise alone, which begins at step 0.
    levels = [table.input_scale, *table.add_noise, *([] if begin else [table.init_noise_sigma])]
    return all(
        np.isfinite(np.asarray(numbers, np.float32)).all() for numbers in (table.coefficients, table.timesteps, levels)
    )


# The state as unit vectors: the papers' formulas, written with them, come out as rows of the matrix.
X, X_LAST, M0, M1, NOISE_PRED, NOISE, CLIPPED = np.eye(7)


class _Step(NamedTuple):
    """[7] each: x after the step, x before it (corrected, where there is a corrector), the step's prediction of x0."""

    x_next: Floats
    x: Floats
    x0: Floats


def _table(
    timesteps: Floats,
    steps: Iterable[_Step],
    add_noise: tuple[float, float],
    *,
    init_noise_sigma: float = 1.0,
    input_scales: Floats | None = None,
    uses_noise: tuple[bool, ...] | None = None,
    x0_limit: float = UNLIMITED,
) -> SamplerTable:
    """input_scales: [N + 1], what x is multiplied with before the model sees it, at each step and after the last."""
    n = len(timesteps)
    scales = np.ones(n + 1) if input_scales is None else input_scales
    rows = [[s.x_next, s.x, s.x0, M0, s.x_next * scale] for s, scale in zip(steps, scales[1:], strict=True)]
    return SamplerTable(
        timesteps=timesteps.astype(np.float32),
        coefficients=np.array(rows),
        init_noise_sigma=init_noise_sigma,
        add_noise=(float(add_noise[0]), float(add_noise[1])),
        input_scale=float(scales[0]),
        uses_noise=uses_noise or (False,) * n,
        x0_limit=x0_limit,
    )


def _x0_prediction(settings: Settings, x: Floats, alpha: np.float64, sigma: np.float64) -> Floats:
    """The model's output as a prediction of x0, where x = alpha · x0 + sigma · noise is what the model was shown."""
    if settings["prediction_type"] == "epsilon":
        return (x - sigma * NOISE_PRED) / alpha
    if settings["prediction_type"] == "v_prediction":  # progressive distillation, arXiv 2202.00512, appendix D
        return alpha * x - sigma * NOISE_PRED
    return NOISE_PRED


def _x0_limit(settings: Settings) -> float:
    return float(settings["clip_sample_range"]) if settings["clip_sample"] else UNLIMITED


def _alpha_sigma_lambda(sigmas: Floats) -> tuple[Floats, Floats, Floats]:
    """sigma/alpha → alpha and sigma with alpha² + sigma² = 1, and lambda = log(alpha/sigma), infinite at sigma 0."""
    alpha = 1 / np.sqrt(np.square(sigmas) + 1)
    return alpha, sigmas * alpha, -np.log(sigmas)


def _ddim(settings: Settings, n: int, begin: int) -> SamplerTable:
    train_steps, bar = settings["num_train_timesteps"], alphas_cumprod(settings).astype(np.float64)
    timesteps = spaced_timesteps(settings, n, last=train_steps, points=n)
    require_count(timesteps, n)
    timesteps = timesteps[begin:]
    if timesteps[0] >= train_steps:
        raise UserError(
            f"ddim's step {begin} of {n} is at time step {timesteps[0]:.0f}, beyond {train_steps - 1}: use fewer steps"
        )
    final = 1.0 if settings["set_alpha_to_one"] else bar[0]

    def step(t: int) -> _Step:
        t_prev = t - train_steps // n
        bar_t, bar_prev = bar[t], bar[t_prev] if t_prev >= 0 else final
        if bar_t == 0 and settings["prediction_type"] == "epsilon":
            raise UserError("rescale_betas_zero_snr leaves ddim no signal to predict from: use a v_prediction model")
        alpha, sigma = np.sqrt(bar_t), np.sqrt(1 - bar_t)
        x0 = _x0_prediction(settings, X, alpha, sigma) + settings["clip_sample"] * CLIPPED
        # Of the model's output as it came, also where x0 is clipped.
        match settings["prediction_type"]:
            case "epsilon":
                epsilon = NOISE_PRED
            case "v_prediction":
                epsilon = alpha * NOISE_PRED + sigma * X
            case _:
                epsilon = (X - alpha * NOISE_PRED) / sigma
        return _Step(np.sqrt(bar_prev) * x0 + np.sqrt(1 - bar_prev) * epsilon, X, x0)

    first = bar[int(timesteps[0])]
    return _table(
        timesteps,
        [step(int(t)) for t in timesteps],
        (np.sqrt(first), np.sqrt(1 - first)),
        x0_limit=_x0_limit(settings),
    )


def _euler(settings: Settings, n: int, begin: int) -> SamplerTable:
    timesteps, sigmas = euler_schedule(settings, n)
    input_scales = 1 / np.sqrt(np.square(sigmas) + 1)

    def step(k: int) -> _Step:
        # Here x = x0 + sigma · noise; the model is shown it scaled to unit variance.
        alpha, sigma = input_scales[k], sigmas[k]
        x0 = _x0_prediction(settings, alpha * X, alpha, alpha * sigma)
        return _Step(X + (sigmas[k + 1] - sigma) * (X - x0) / sigma, X, x0)

    largest = float(sigmas.max())
    initial = math.sqrt(largest**2 + 1) if settings["timestep_spacing"] == "leading" else largest
    return _table(
        timesteps[begin:],
        map(step, range(begin, n)),
        (1.0, sigmas[begin]),
        init_noise_sigma=initial,
        input_scales=input_scales[begin:],
    )


def _dpmpp_2m(settings: Settings, n: int, begin: int) -> SamplerTable:
    timesteps, sigmas = multistep_schedule(settings, n, unipc=False)
    alpha, sigma, lam = _alpha_sigma_lambda(sigmas)
    first_order_at_end = (
        settings["euler_at_final"]
        or (settings["lower_order_final"] and n < 15)
        or settings["final_sigmas_type"] == "zero"
    )

    def step(k: int) -> _Step:
        x0 = _x0_prediction(settings, X, alpha[k], sigma[k])
        h = lam[k + 1] - lam[k]
        x = sigma[k + 1] / sigma[k] * X - alpha[k + 1] * np.expm1(-h) * x0
        if settings["solver_order"] == 1 or k == begin or (k == n - 1 and first_order_at_end):
            return _Step(x, X, x0)
        slope = h / (lam[k] - lam[k - 1]) * (x0 - M0)
        if settings["solver_type"] == "heun":
            return _Step(x + alpha[k + 1] * (np.expm1(-h) / h + 1) * slope, X, x0)
        return _Step(x - 0.5 * alpha[k + 1] * np.expm1(-h) * slope, X, x0)

    return _multistep_table(settings, n, timesteps[begin:], map(step, range(begin, n)), (alpha[begin], sigma[begin]))


def _unipc(settings: Settings, n: int, begin: int) -> SamplerTable:
    order = settings["solver_order"]
    if n - begin > 1 and order > 1 and not settings["lower_order_final"] and settings["final_sigmas_type"] == "zero":
        raise UserError(
            "unipc cannot end at sigma 0 with lower_order_final false in the model's scheduler config: take another "
            "scheduler, or set final_sigmas_type 'sigma_min' in the checkpoint and export it again"
        )
    timesteps, sigmas = multistep_schedule(settings, n, unipc=True)
    alpha, sigma, lam = _alpha_sigma_lambda(sigmas)
    orders = {k: min(order, k - begin + 1, n - k if settings["lower_order_final"] else order) for k in range(begin, n)}

    def b(h: np.float64) -> np.float64:
        return -h if settings["solver_type"] == "bh1" else np.expm1(-h)

    def corrected(k: int, x0: Floats) -> Floats:
        """UniC: x at step k once more from x_last, now that x0 at k is known."""
        h = lam[k] - lam[k - 1]
        x: Floats = sigma[k] / sigma[k - 1] * X_LAST - alpha[k] * np.expm1(-h) * M0
        if orders[k - 1] == 1:
            x -= alpha[k] * b(h) * 0.5 * (x0 - M0)
            return x
        r = (lam[k - 2] - lam[k - 1]) / h
        phi_2 = np.expm1(-h) / -h - 1
        phi_3 = phi_2 / -h - 0.5
        rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_2 / b(h), 2 * phi_3 / b(h)])
        x -= alpha[k] * b(h) * (rho[0] * (M1 - M0) / r + rho[1] * (x0 - M0))
        return x

    def step(k: int) -> _Step:
        x0 = _x0_prediction(settings, X, alpha[k], sigma[k])
        x = corrected(k, x0) if k > begin and k - 1 not in settings["disable_corrector"] else X
        h = lam[k + 1] - lam[k]
        x_next = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * np.expm1(-h) * x0  # UniP
        if orders[k] == 2:
            x_next = x_next - alpha[k + 1] * b(h) * 0.5 * h / (lam[k - 1] - lam[k]) * (M0 - x0)
        return _Step(x_next, x, x0)

    return _multistep_table(settings, n, timesteps[begin:], map(step, range(begin, n)), (alpha[begin], sigma[begin]))


def _multistep_table(
    settings: Settings, n: int, timesteps: Floats, steps: Iterable[_Step], add_noise: tuple[float, float]
) -> SamplerTable:
    """The table of a multistep solver.

    Raises:
        UserError: two steps at one noise level, where the solver divides by their difference.
    """
    table, last = _table(timesteps, steps, add_noise), settings["num_train_timesteps"] - 1
    if not np.isfinite(table.coefficients).all() and (np.diff(np.minimum(timesteps, last)) == 0).any():
        raise UserError(
            f"num_inference_steps {n} puts two steps of a multistep solver on one noise level: use fewer "
            f"(at most {(last + 1) // 2} is always safe) or the scheduler ddim or euler"
        )
    return table


def _lcm(settings: Settings, n: int, begin: int) -> SamplerTable:
    train_steps, original = settings["num_train_timesteps"], settings["original_inference_steps"]
    if original > train_steps:
        raise UserError(
            f"original_inference_steps {original} in the model's scheduler config is more than num_train_timesteps "
            f"{train_steps}: {REMEDY}"
        )
    if n > original:
        raise UserError(f"lcm takes at most original_inference_steps={original} steps, not {n}: 4 to 8 are usual")
    bar = alphas_cumprod(settings).astype(np.float64)
    distilled = np.arange(original, 0, -1) * (train_steps // original) - 1  # the time steps of distillation, descending
    timesteps = distilled[np.floor(np.linspace(0, original, n, endpoint=False)).astype(np.int64)][begin:]
    last = len(timesteps) - 1

    def step(k: int) -> _Step:
        t = int(timesteps[k])
        if bar[t] == 0 and settings["prediction_type"] == "epsilon":
            raise UserError("rescale_betas_zero_snr leaves lcm no signal to predict from: use a v_prediction model")
        x0 = _x0_prediction(settings, X, np.sqrt(bar[t]), np.sqrt(1 - bar[t])) + settings["clip_sample"] * CLIPPED
        scaled, sigma_data = t * settings["timestep_scaling"], 0.5
        c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
        c_out = scaled / math.sqrt(scaled**2 + sigma_data**2)
        denoised = c_skip * X + c_out * x0
        if k == last:
            return _Step(denoised, X, x0)
        bar_next = bar[timesteps[k + 1]]
        return _Step(np.sqrt(bar_next) * denoised + np.sqrt(1 - bar_next) * NOISE, X, x0)

    first = bar[timesteps[0]]
    return _table(
        timesteps.astype(np.float64),
        map(step, range(last + 1)),
        (float(np.sqrt(first)), float(np.sqrt(1 - first))),
        uses_noise=(True,) * last + (False,),
        x0_limit=_x0_limit(settings),
    )


def require_spacing(scheduler: str, timestep_spacing: str | None) -> None:
    """Checks that a scheduler can place its time steps so.

    Raises:
        UserError: it cannot.
    """
    own = _SAMPLERS[scheduler].spacings
    if timestep_spacing is not None and timestep_spacing not in own:
        instead = f"it has {', '.join(own)}" if own else "it has its own time steps alone"
        raise UserError(f"{scheduler} has no timestep_spacing {printable(repr(timestep_spacing), 40)}: {instead}")


class _Sampler(NamedTuple):
    """target: the diffusers class. overrides: what the scheduler's name implies, whatever the config says."""

    build: Callable[[Settings, int, int], SamplerTable]
    target: str
    overrides: Mapping[str, Any]
    spacings: tuple[str, ...] = ()


_SAMPLERS: Mapping[str, _Sampler] = {
    "ddim": _Sampler(_ddim, "DDIMScheduler", {}, ("trailing",)),  # its steps are evenly spaced, by its formula
    "euler": _Sampler(_euler, "EulerDiscreteScheduler", {}, tuple(TIMESTEP_SPACINGS)),
    "dpmpp_2m": _Sampler(_dpmpp_2m, "DPMSolverMultistepScheduler", {}, tuple(TIMESTEP_SPACINGS)),
    "dpmpp_2m_karras": _Sampler(_dpmpp_2m, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": _Sampler(_unipc, "UniPCMultistepScheduler", {}, tuple(TIMESTEP_SPACINGS)),
    "lcm": _Sampler(_lcm, "LCMScheduler", {}),
}

SCHEDULERS: tuple[str, ...] = tuple(_SAMPLERS)
