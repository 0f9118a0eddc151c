"""The tables against diffusers' schedulers, without knowing the formulas.

A scheduler's state and inputs are filled with unit vectors (its sample, last sample, model outputs, the model's output,
the noise), one real `step` is taken, and what comes out as sample, last sample and model outputs is the true matrix.
"""

import inspect
from collections.abc import Iterator
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.scheduler_config import DEFAULTS
from cnpp_trt.runtime.schedulers import DEFAULT_SCHEDULER, SCHEDULERS, build_table

TARGETS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_karras", "unipc")
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
ROUNDING = 1.5e-6
"""Measured 9.3e-7 (Euler, 999 steps): diffusers' Euler and DPM-Solver round to float32 whatever they are given."""


def reference(name: str, config: dict, steps: int, begin: int = 0, *, double: bool = True):
    """diffusers' scheduler, ready to step. `double`: its schedule cast to float64, so that formulas are compared."""
    target, overrides = TARGETS[name]
    scheduler = target.from_config(config, **overrides)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # without it, a repeated first time step makes diffusers run off the end
    if double:
        for attribute in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if hasattr(scheduler, attribute):
                setattr(scheduler, attribute, getattr(scheduler, attribute).double())
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


def largest_difference(name: str, config: dict, steps: int) -> float:
    """Of the table from diffusers' true matrices, relative where they exceed 1. Everything else is asserted equal."""
    scheduler = reference(name, config, steps)
    table = build_table(name, config, steps)
    timesteps = scheduler.timesteps.numpy()
    if name == "euler" and config.get("use_karras_sigmas"):
        # Fractional, and interpolated between sigmas whose last bit PyTorch's square root leaves to the machine.
        np.testing.assert_allclose(table.timesteps, timesteps, rtol=0, atol=2e-4)
    else:
        np.testing.assert_array_equal(table.timesteps, timesteps)
    assert table.timesteps.dtype == np.float32
    assert table.coefficients.shape == (steps, 5, 6)
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-7)
    first_input = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), scheduler.timesteps[0])
    assert table.input_scale == pytest.approx(float(first_input), rel=1e-7)
    true = np.array(list(rows(scheduler, name)))
    assert np.isfinite(true[:, 0]).all()
    return float(np.nanmax(np.abs(table.coefficients - true) / np.maximum(1, np.abs(true))))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_matrices_are_those_of_diffusers(name, timestep_spacing, prediction_type):
    config = SD15 | {"timestep_spacing": timestep_spacing, "prediction_type": prediction_type}
    for steps in (1, 2, 3, 4, 5, 8, 20, 50):
        assert largest_difference(name, config, steps) < ROUNDING, steps


@pytest.mark.parametrize("timestep_spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_many_steps(name, timestep_spacing):
    no_schedule = timestep_spacing == "linspace" and name in ("dpmpp_2m", "unipc")  # for 1000 steps, see below
    for steps in (100, 500, 999, *(() if no_schedule else (1000,))):
        assert largest_difference(name, SD15 | {"timestep_spacing": timestep_spacing}, steps) < ROUNDING, steps


CONFIGS = {
    "defaults": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine, karras": {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
    "linear, 100": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01, "num_train_timesteps": 100},
    "trained": {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    "karras": SD15 | {"use_karras_sigmas": True},
    "karras, sigma_min, sigma_max": SD15 | {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    "karras, sigma_min at end": SD15
    | {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "sigma_min": 0.1, "lower_order_final": False},
    "sigma_min at end": SD15 | {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"},
    "no lower order at end": SD15 | {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "euler at end": SD15 | {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "first order": SD15 | {"solver_order": 1},
    "heun": SD15 | {"solver_type": "heun"},
    "bh1": SD15 | {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "corrector off at 0 and 3": SD15 | {"disable_corrector": [0, 3]},
    "lambda clipped": SD15 | {"lambda_min_clipped": -1.5, "timestep_spacing": "linspace"},
    "lambda clipped, leading": SD15 | {"lambda_min_clipped": -1.5},
    "alpha to one": SD15 | {"set_alpha_to_one": True, "steps_offset": 0},
    "zero SNR, v": SD15
    | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "LCM's own": SD15 | {"original_inference_steps": 100, "timestep_scaling": 3.0},
    "defaults once used": SD15 | {"_use_default_values": ["beta_end", "steps_offset", "final_sigmas_type"]},
    "for other classes": SD15 | {"interpolation": "x", "skip_prk_steps": False, "quantization_config": {}},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_configs(name, case):
    config = {"clip_sample": False} | CONFIGS[case]
    # Rescaling takes square roots, whose last bit PyTorch leaves to the machine, and then divides their differences.
    tolerance = 5e-6 if config.get("rescale_betas_zero_snr") else ROUNDING
    for steps in (1, 2, 4, 16, 20):
        assert largest_difference(name, config, steps) < tolerance, steps


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trajectory_of_unmodified_diffusers(name):
    """The whole loop, diffusers in float32 as pipelines run it, with random model outputs and LCM's own noise."""
    for steps in (1, 4, 20, 50):
        scheduler, table = reference(name, SD15, steps, double=False), build_table(name, SD15, steps)
        outputs = np.random.default_rng(steps).standard_normal((steps, 2, 4, 8, 8)).astype(np.float32)
        start = np.random.default_rng(7).standard_normal((2, 4, 8, 8)).astype(np.float32)
        generator, generator_here = (torch.Generator().manual_seed(3) for _ in range(2))
        x = torch.from_numpy(start) * scheduler.init_noise_sigma
        state = np.zeros((4, *start.shape))
        state[0] = start * table.init_noise_sigma
        model_input = table.input_scale * state[0]
        kwargs = {"generator": generator} if name == "lcm" else {}
        for k, t in enumerate(scheduler.timesteps):
            expected_input = scheduler.scale_model_input(x, t).numpy()
            np.testing.assert_allclose(model_input, expected_input, rtol=0, atol=1e-5 * np.abs(expected_input).max())
            x = scheduler.step(torch.from_numpy(outputs[k]), t, x, **kwargs).prev_sample
            noise = torch.randn(x.shape, generator=generator_here).numpy() if table.uses_noise[k] else 0 * start
            *new_state, model_input = np.tensordot(table.coefficients[k], [*state, outputs[k], noise], 1)
            state = np.array(new_state)
            np.testing.assert_allclose(state[0], x.numpy(), rtol=0, atol=1e-5 * x.abs().max().item())
        assert torch.equal(generator.get_state(), generator_here.get_state())


# What differs in how a schedule is entered or left. Every begin of each is compared.
ENTERED = {
    "SD 1.5": SD15,
    "v": SD15 | {"prediction_type": "v_prediction"},
    "linspace": SD15 | {"timestep_spacing": "linspace"},
    "trailing": SD15 | {"timestep_spacing": "trailing"},
    "sigma_min at end": SD15 | {"final_sigmas_type": "sigma_min"},
    "no lower order at end": SD15 | {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "karras": SD15 | {"use_karras_sigmas": True},
    "first order": SD15 | {"solver_order": 1},
    "corrector off at 0 and 3": SD15 | {"disable_corrector": [0, 3]},
    "zero SNR, v": SD15
    | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("case", ENTERED)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_of_unmodified_diffusers(name, case):
    """From every step on: noise added to latents as `StableDiffusionImg2ImgPipeline` adds it, then the whole loop."""
    config = ENTERED[case]
    generator = np.random.default_rng(0)
    latents, start = generator.standard_normal((2, 1, 4, 4, 4)).astype(np.float32)
    for steps in (1, 2, 4, 16):
        for begin in range(steps):
            scheduler = reference(name, config, steps, begin, double=False)
            table = build_table(name, config, steps, begin)
            timesteps = scheduler.timesteps[begin:]
            drawn, drawn_here = (torch.Generator().manual_seed(3) for _ in range(2))
            x = scheduler.add_noise(torch.from_numpy(latents), torch.from_numpy(start), timesteps[:1])
            state = np.zeros((4, *start.shape))
            state[0] = table.add_noise[0] * latents + table.add_noise[1] * start
            model_input = table.input_scale * state[0]
            kwargs = {"generator": drawn} if name == "lcm" else {}
            assert len(table.timesteps) == len(table.coefficients) == len(table.uses_noise) == steps - begin
            np.testing.assert_allclose(table.timesteps, timesteps.numpy(), rtol=0, atol=2e-4)
            largest = 0.0  # sigma is 4096 at zero SNR: what float32 rounds off then, diffusers has lost for good
            for k, t in enumerate(timesteps):
                largest = max(largest, x.abs().max().item())
                expected_input = scheduler.scale_model_input(x, t).numpy()
                atol = 1e-5 * np.abs(expected_input).max() + 2e-7 * largest
                np.testing.assert_allclose(model_input, expected_input, rtol=0, atol=atol)
                output = generator.standard_normal(start.shape).astype(np.float32)
                x = scheduler.step(torch.from_numpy(output), t, x, **kwargs).prev_sample
                noise = torch.randn(x.shape, generator=drawn_here).numpy() if table.uses_noise[k] else 0 * start
                *new_state, model_input = np.tensordot(table.coefficients[k], [*state, output, noise], 1)
                state = np.array(new_state)
                atol = 1e-5 * x.abs().max().item() + 2e-7 * largest
                np.testing.assert_allclose(
                    state[0], x.numpy(), rtol=0, atol=atol, err_msg=f"step {begin + k} of {steps} begun at {begin}"
                )
            assert torch.equal(drawn.get_state(), drawn_here.get_state())


@pytest.mark.parametrize("begin", [-1, 4, 1.5, "1", True, None])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_begin_out_of_range(name, begin):
    with pytest.raises(UserError, match=r"4 steps cannot begin at step .*0 to 3"):
        build_table(name, SD15, 4, begin)


def test_a_begun_schedule_has_the_last_steps_of_the_whole_one():
    """Samplers without a history are the same rows; the others from the third on, where their history is full."""
    for name in SCHEDULERS:
        whole, begun = build_table(name, SD15, 12), build_table(name, SD15, 12, 5)
        history = 2 if name in MULTISTEP else 0
        np.testing.assert_array_equal(whole.coefficients[5 + history :], begun.coefficients[history:])
        assert begun.init_noise_sigma == whole.init_noise_sigma
        if name in MULTISTEP:
            assert not np.array_equal(whole.coefficients[5], begun.coefficients[0])
            assert not begun.coefficients[0][:3, 1:4].any()  # nothing is read of a history that is not there


def test_only_lcm_uses_noise_and_not_in_its_last_step():
    for name in SCHEDULERS:
        table = build_table(name, SD15, 4)
        assert table.uses_noise == ((True, True, True, False) if name == "lcm" else (False,) * 4)
        assert np.array_equal(table.coefficients[:, :4, 5].any(axis=1), table.uses_noise)
    assert build_table("lcm", SD15, 1).uses_noise == (False,)


def test_unipc_with_bh1_ends_at_its_prediction():
    """diffusers multiplies infinity by zero here, and ends in NaN."""
    config = SD15 | {"solver_type": "bh1"}
    assert np.isnan(list(rows(reference("unipc", config, 4), "unipc"))[-1][0]).any()
    last = build_table("unipc", config, 4).coefficients[-1]
    np.testing.assert_allclose(last[0], last[2], rtol=0, atol=1e-12)


def test_a_repeated_first_time_step():
    """diffusers takes its second occurrence for the first step, as in image-to-image, and runs off the end."""
    config = SD15 | {"use_karras_sigmas": True, "sigma_max": 100.0}
    assert largest_difference("dpmpp_2m", config, 20) < ROUNDING  # told to begin at the beginning
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    x = torch.zeros(1, 1)
    with pytest.raises(IndexError):
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample


# -- What is refused -------------------------------------------------------------------------------------------------


def assert_refused(name: str, config: object, steps: object, *words: str) -> None:
    with pytest.raises(UserError) as error:
        build_table(name, config, steps)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name, setting, value",
    [
        ("ddim", "clip_sample", True),
        ("lcm", "clip_sample", True),
        *((name, "thresholding", True) for name in SCHEDULERS if name != "euler"),
        *((name, "beta_schedule", "sigmoid") for name in SCHEDULERS),
        *((name, "prediction_type", "flow_prediction") for name in SCHEDULERS),
        *((name, "timestep_spacing", "uniform") for name in SCHEDULERS if name != "lcm"),
        *((name, "final_sigmas_type", "one") for name in ("euler", *MULTISTEP)),
        *((name, "use_exponential_sigmas", True) for name in ("euler", *MULTISTEP)),
        *((name, "use_beta_sigmas", True) for name in ("euler", *MULTISTEP)),
        *((name, "use_flow_sigmas", True) for name in MULTISTEP),
        *((name, "use_dynamic_shifting", True) for name in MULTISTEP),
        *((name, "solver_order", 3) for name in MULTISTEP),
        *((name, "solver_type", "bh3") for name in MULTISTEP),
        ("euler", "interpolation_type", "log_linear"),
        ("euler", "timestep_type", "continuous"),
        ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++"),
        ("dpmpp_2m", "algorithm_type", "dpmsolver"),
        ("dpmpp_2m_karras", "use_lu_lambdas", True),
        ("dpmpp_2m", "variance_type", "learned_range"),
        ("unipc", "predict_x0", False),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("unipc", "shift_terminal", 0.1),
        *((name, "beta_start", "0.1") for name in SCHEDULERS),
        *((name, "beta_end", None) for name in SCHEDULERS),
        *((name, "beta_end", float("nan")) for name in SCHEDULERS),
        *((name, "num_train_timesteps", 0) for name in SCHEDULERS),
        *((name, "num_train_timesteps", 1000.5) for name in SCHEDULERS),
        *((name, "trained_betas", [0.1, 0.2]) for name in SCHEDULERS),
        *((name, "sigma_min", "small") for name in ("euler", *MULTISTEP)),
        ("lcm", "original_inference_steps", 1001),
        ("lcm", "original_inference_steps", 0),
    ],
)
def test_what_a_config_asks_for_in_vain_is_refused_by_name(name, setting, value):
    assert_refused(name, SD15 | {setting: value}, 4, setting)


def test_a_default_of_diffusers_that_is_not_supported_is_refused_as_such():
    """Without the key, diffusers' DDIM clips."""
    config = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert reference("ddim", config, 4).config.clip_sample is True
    assert_refused("ddim", config, 4, "clip_sample", "default", "DDIMScheduler")


def test_what_only_other_schedulers_read_is_not_refused():
    config = SD15 | {"clip_sample": True, "thresholding": True, "solver_order": 3, "algorithm_type": "dpmsolver"}
    assert largest_difference("euler", config, 4) < ROUNDING


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", True, None, float("nan")])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_numbers_of_steps_out_of_range(name, steps):
    assert_refused(name, SD15, steps, repr(steps), "1 to 1000")


def test_numpy_integers_are_numbers_of_steps():
    assert len(build_table("ddim", SD15, np.int64(4)).timesteps) == 4


LEADING, LINSPACE, TRAILING = ({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing"))


@pytest.mark.parametrize(
    "name, steps, change, message",
    [
        ("lcm", 51, {}, "at most original_inference_steps=50"),
        ("ddim", 1000, {}, "beyond 999: use fewer"),
        ("ddim", 20, TRAILING | {"rescale_betas_zero_snr": True}, "use a v_prediction model"),
        ("lcm", 4, {"rescale_betas_zero_snr": True}, "use a v_prediction model"),
        ("unipc", 20, {"lower_order_final": False}, "set final_sigmas_type"),
        *((name, 999, LEADING, "on one noise level: use fewer") for name in ("dpmpp_2m", "unipc")),
        *((name, 1000, LINSPACE, "on one noise level: use fewer") for name in ("dpmpp_2m", "unipc")),
        *((name, 61, TRAILING, "use 60 or 62") for name in ("ddim", "euler", "dpmpp_2m", "unipc")),
        ("euler", 20, {"beta_start": 0.0, "beta_end": 0.0}, "no finite coefficients"),
    ],
)
def test_numbers_of_steps_without_a_schedule(name, steps, change, message):
    """Refused, and rightly: diffusers raises, runs another number of steps, or makes NaN and infinity of it."""
    config = SD15 | change
    assert_refused(name, config, steps, message)
    try:
        with np.errstate(all="ignore"):
            scheduler = reference(name, config, steps)
            samples = np.array([true[0] for true in rows(scheduler, name)])
    except (ValueError, IndexError):
        return
    assert len(samples) != steps or not np.isfinite(samples).all()


@pytest.mark.parametrize("wrong, right", [("UniPC", "unipc"), ("dpm++_2m", "dpmpp_2m"), ("eular", "euler")])
def test_unknown_scheduler(wrong, right):
    assert_refused(wrong, SD15, 4, repr(wrong), f"did you mean '{right}'", *SCHEDULERS)


def test_names():
    assert tuple(TARGETS) == SCHEDULERS
    assert DEFAULT_SCHEDULER == "unipc"
    assert_refused("", SD15, 4, *SCHEDULERS)


# Arguments without an effect as long as the settings that are accepted stay as they are.
IDLE = {
    "clip_sample_range": "clip_sample",
    "dynamic_thresholding_ratio": "thresholding",
    "sample_max_value": "thresholding",
    "flow_shift": "use_flow_sigmas",
    "time_shift_type": "use_dynamic_shifting",
}


@pytest.mark.parametrize("target", DEFAULTS)
def test_every_argument_of_diffusers_is_known_with_its_default(target):
    """A new argument of a scheduler fails here until someone has decided what becomes of it."""
    signature = inspect.signature(getattr(diffusers, target).__init__).parameters
    theirs = {key: p.default for key, p in signature.items() if key != "self"}
    ours = dict(DEFAULTS[target])
    for key in ("sigma_min", "sigma_max") if target == "DPMSolverMultistepScheduler" else ():
        assert ours.pop(key) is None
    idle = {key for key, needs in IDLE.items() if needs in ours}
    if target == "LCMScheduler":
        idle |= {"set_alpha_to_one", "steps_offset", "timestep_spacing"}
    assert set(theirs) - idle == set(ours)
    ours["disable_corrector"] = list(ours.get("disable_corrector", ()))
    assert {key: theirs.get(key, []) for key in ours} == ours
