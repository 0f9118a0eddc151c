"""Schedules at random, each against diffusers': every setting that a scheduler config may have, mixed.

`PYTHONPATH=tests python tests/runtime/sampling/test_scheduler_sweep.py 5000` compares as many.
"""

import math
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS, SamplerTable, build_table
from diffusers_schedulers import ieee_roots, reference, rows

pytestmark = pytest.mark.slow

ROUNDING = 2e-6


@dataclass
class Sweep:
    """Counts of schedules; `refused` by message, `undefined` where diffusers has NaN, `wrong` with a line each."""

    compared: int = 0
    steps: int = 0
    largest: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    undefined: int = 0
    wrong: list[str] = field(default_factory=list)


def draw(rng: np.random.Generator) -> tuple[str, dict[str, Any], int, int]:
    """A scheduler's name, a config, a number of steps and the step to begin at."""

    def one(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    train_steps = int(one(1000, 1000, 1000, 100, 500, 1100, 50, int(rng.integers(2, 2000))))
    start, end = np.sort(10 ** rng.uniform(-5, math.log10(0.2), 2))
    config: dict[str, Any] = {
        "num_train_timesteps": train_steps,
        "prediction_type": one("epsilon", "v_prediction", "sample"),
        "timestep_spacing": one("linspace", "leading", "trailing"),
        "beta_schedule": one("linear", "scaled_linear", "squaredcos_cap_v2"),
        "clip_sample": False,
    }
    if rng.random() < 0.7:
        config |= {"beta_start": 0.00085, "beta_end": 0.012} if rng.random() < 0.5 else {
            "beta_start": float(start), "beta_end": float(end)}  # fmt: skip
    optional = {
        "rescale_betas_zero_snr": lambda: True,
        "use_karras_sigmas": lambda: True,
        "steps_offset": lambda: int(rng.integers(0, 3)),
        "set_alpha_to_one": lambda: False,
        "final_sigmas_type": lambda: "sigma_min",
        "solver_order": lambda: 1,
        "solver_type": lambda: one("midpoint", "heun", "logrho", "bh1", "bh2"),
        "lower_order_final": lambda: False,
        "euler_at_final": lambda: True,
        "disable_corrector": lambda: rng.integers(0, 10, int(rng.integers(0, 4))).tolist(),
        "sigma_min": lambda: float(10 ** rng.uniform(-3, 0)),
        "sigma_max": lambda: float(10 ** rng.uniform(0.5, 2)),
        "lambda_min_clipped": lambda: float(rng.uniform(-6, 1)),
        "original_inference_steps": lambda: int(rng.integers(1, train_steps + 1)),
        "timestep_scaling": lambda: float(rng.uniform(0, 20)),
        "trained_betas": lambda: np.sort(rng.uniform(0.0001, 0.03, train_steps)).tolist(),
        "variance_type": lambda: one("fixed_small", "fixed_large", "fixed_small_log", None),
        "use_dynamic_shifting": lambda: False,
        "timestep_type": lambda: "discrete",
    }
    likely = {"rescale_betas_zero_snr": 0.3, "use_karras_sigmas": 0.3}
    config |= {key: make() for key, make in optional.items() if rng.random() < likely.get(key, 0.15)}
    steps = int(rng.integers(1, 51)) if rng.random() < 0.9 else int(rng.integers(1, min(train_steps, 1000) + 1))
    steps = min(steps, train_steps)
    begin = int(rng.integers(0, steps)) if rng.random() < 0.4 else 0
    return str(one(*SCHEDULERS)), config, steps, begin


def compare(found: Sweep, name: str, config: dict[str, Any], steps: int, begin: int) -> None:
    """Time steps must be equal; noise levels, scales and matrices agree to what float32 leaves of diffusers' sums."""
    what = f"{name}, {steps} steps from {begin}, {config}"
    try:
        table = build_table(name, config, steps, begin)
    except UserError as e:
        reason = str(e)[:40]
        found.refused[reason] = found.refused.get(reason, 0) + 1
        if runs_in_diffusers(name, config, steps, begin):
            found.wrong.append(f"refused ({e}) although diffusers runs: {what}")
        return
    try:
        scheduler = reference(name, config, steps, begin)
        matrices = np.array(list(rows(scheduler, name, begin)))
        single = reference(name, config, steps, begin, double=False)
    except Exception as e:
        found.wrong.append(f"diffusers fails ({type(e).__name__}: {e}): {what}")
        return
    found.compared += 1
    found.steps += len(matrices)
    timesteps = scheduler.timesteps[begin:].numpy().astype(np.float32)
    if timesteps.shape != table.timesteps.shape or not np.array_equal(timesteps, table.timesteps):
        found.wrong.append(f"time steps {timesteps} and {table.timesteps}: {what}")
        return
    if table.coefficients[:, :, 6].any():
        found.wrong.append(f"clips: {what}")
    if name == "unipc" and config.get("solver_type") == "bh1" and np.isnan(matrices[-1]).any():
        # Ending at sigma 0, diffusers multiplies infinity by zero: test_unipc_with_bh1_ends_at_its_prediction.
        matrices[-1] = table.coefficients[-1, :, :6]
    if not np.isfinite(matrices[:, 0]).all():
        # DDIM between two time steps without any signal left: its variance, which is not used, is 0/0.
        found.undefined += 1
        return
    difference = np.abs(table.coefficients[:, :, :6] - matrices) / np.maximum(1, np.abs(matrices))
    largest = float(np.nanmax(difference))
    levels = worst_level(table, single, begin)
    found.largest = max(found.largest, largest, levels)
    if not max(largest, levels) < ROUNDING:
        where = np.unravel_index(np.nanargmax(difference), difference.shape)
        found.wrong.append(f"differs by {largest:.2g} at {where}, levels by {levels:.2g}: {what}")


def runs_in_diffusers(name: str, config: dict[str, Any], steps: int, begin: int) -> bool:
    """Whether it takes as many steps as it was told to, with numbers for coefficients."""
    try:
        with np.errstate(all="ignore"):
            samples = np.array([true[0] for true in rows(reference(name, config, steps, begin), name, begin)])
    except (ValueError, IndexError):
        return False
    return len(samples) == steps - begin and bool(np.isfinite(samples).all())


def worst_level(table: SamplerTable, scheduler: Any, begin: int) -> float:
    """The largest difference in how a schedule is entered, from noise and from latents, relative where above 1."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    t = scheduler.timesteps[begin : begin + 1]
    pairs = [
        (table.add_noise[0], float(scheduler.add_noise(one, zero, t))),
        (table.add_noise[1], float(scheduler.add_noise(zero, one, t))),
        (table.init_noise_sigma, float(scheduler.init_noise_sigma)),
        (table.input_scale, float(scheduler.scale_model_input(one, t[0]))),
    ]
    return max(abs(ours - theirs) / max(1.0, abs(theirs)) for ours, theirs in pairs)


def sweep(count: int, seed: int = 0) -> Sweep:
    found, rng = Sweep(), np.random.default_rng(seed)
    with ieee_roots(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            compare(found, *draw(rng))
    return found


def test_schedules_at_random_are_those_of_diffusers() -> None:
    found = sweep(300)
    assert found.wrong == []
    assert found.compared > 150


if __name__ == "__main__":
    found = sweep(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    print(*found.wrong, sep="\n")
    print({**vars(found), "wrong": len(found.wrong)})
