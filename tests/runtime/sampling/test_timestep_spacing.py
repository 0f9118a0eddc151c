"""Schedules that a request names, against diffusers' schedulers that are given the same."""

from typing import Any

import numpy as np
import pytest
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.scheduler_config import TIMESTEP_SPACINGS
from cnpp_trt.runtime.sampling.schedulers import build_table
from diffusers.schedulers.scheduling_utils import AysSchedules
from diffusers_schedulers import reference, rows

SD15 = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
ROUNDING = 1.5e-6
MULTISTEP = ("dpmpp_2m", "unipc")


def require_same(table, scheduler, name):
    true = np.array(list(rows(scheduler, name)))
    differences = np.abs(table.coefficients[:, :, :6] - true) / np.maximum(1, np.abs(true))
    assert np.nanmax(differences) < ROUNDING
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)


@pytest.mark.parametrize("name", ["euler", *MULTISTEP])
def test_align_your_steps_is_diffusers_table(name):
    published = AysSchedules["StableDiffusionTimesteps"]
    table, scheduler = (
        build_table(name, SD15, 10, timestep_spacing="ays"),
        reference(name, SD15, 10, timesteps=published),
    )
    np.testing.assert_array_equal(table.timesteps, published)
    require_same(table, scheduler, name)


def loglinear(levels, count):
    """`loglinear_interp` as the page of Align Your Steps describes it: positions and logarithms, both from the end."""
    positions = np.linspace(0, 1, len(levels))
    return np.exp(np.interp(np.linspace(0, 1, count), positions, np.log(levels[::-1])))[::-1]


@pytest.mark.parametrize("steps", [4, 5, 7, 16, 20])
@pytest.mark.parametrize("name", ["euler", *MULTISTEP])
def test_other_counts_are_interpolated_in_log_sigma(name, steps):
    levels = [*AysSchedules["StableDiffusionSigmas"][:-1], 0.029]
    train = np.sqrt(1 / np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) - 1)
    wanted = np.interp(np.log(loglinear(levels, steps + 1)[:steps]), np.log(train), np.arange(1000))
    table = build_table(name, SD15, steps, timestep_spacing="ays")
    assert np.abs(table.timesteps - wanted).max() < 1.2  # its published sigmas have three digits, time steps are whole
    timesteps = [int(t) for t in table.timesteps]
    require_same(table, reference(name, SD15, steps, timesteps=timesteps), name)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [(n, s) for n in ("euler", *MULTISTEP) for s in ("karras", "trailing")] + [("ddim", "trailing")],
)
def test_karras_and_trailing_are_settings_of_diffusers_classes(name, schedule, steps):
    config: dict[str, Any] = {"karras": {"use_karras_sigmas": True}, "trailing": {"timestep_spacing": "trailing"}}
    table = build_table(name, SD15, steps, timestep_spacing=schedule)
    require_same(table, reference(name, SD15 | config[schedule], steps), name)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_schedule_replaces_karras_sigmas_of_the_config(name):
    karras = SD15 | {"use_karras_sigmas": True}
    for schedule in ("ays", "trailing"):
        asked, plain = (build_table(name, config, 8, timestep_spacing=schedule) for config in (karras, SD15))
        np.testing.assert_array_equal(asked.coefficients, plain.coefficients)


def test_image_to_image_enters_a_schedule_midway():
    whole, begun = (build_table("euler", SD15, 10, begin, "ays") for begin in (0, 4))
    np.testing.assert_array_equal(whole.timesteps[4:], begun.timesteps)


@pytest.mark.parametrize("name", ["ddim", "lcm", "dpmpp_2m_karras"])
def test_a_schedule_that_a_scheduler_cannot_follow_is_refused(name):
    with pytest.raises(UserError, match=f"^{name} has no timestep_spacing 'ays': it has "):
        build_table(name, SD15, 10, timestep_spacing="ays")


def test_every_schedule_is_tested():
    assert set(TIMESTEP_SPACINGS) == {"ays", "karras", "trailing"}
