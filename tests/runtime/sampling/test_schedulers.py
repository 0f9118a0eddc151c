"""The tables against diffusers' schedulers, without knowing the formulas (tests/diffusers_schedulers.py)."""

import inspect
import json
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from cnpp_trt.bundles.defaults import SamplingDefaults
from cnpp_trt.errors import UserError
from cnpp_trt.runtime.sampling.scheduler_config import DEFAULTS
from cnpp_trt.runtime.sampling.schedulers import SCHEDULERS, UNLIMITED, build_table
from diffusers_schedulers import TARGETS, ieee_roots, reference, rows

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
ROUNDING = 1.5e-6
"""Measured 9.3e-7 (Euler, 999 steps): diffusers' Euler and DPM-Solver round to float32 whatever they are given."""


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
    assert table.coefficients.shape == (steps, 5, 7) and not table.coefficients[:, :, 6].any()
    assert table.x0_limit == UNLIMITED
    assert table.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-7)
    first_input = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), scheduler.timesteps[0])
    assert table.input_scale == pytest.approx(float(first_input), rel=1e-7)
    true = np.array(list(rows(scheduler, name)))
    assert np.isfinite(true[:, 0]).all()
    return float(np.nanmax(np.abs(table.coefficients[:, :, :6] - true) / np.maximum(1, np.abs(true))))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep_spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_matrices_are_those_of_diffusers(name, timestep_spacing, prediction_type):
    config = SD15 | {"timestep_spacing": timestep_spacing, "prediction_type": prediction_type}
    for steps in (1, 2, 3, 4, 5, 8, 20, 50):
        assert largest_difference(name, config, steps) < ROUNDING, steps


@pytest.mark.slow
@pytest.mark.parametrize("timestep_spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_many_steps(name, timestep_spacing):
    no_schedule = timestep_spacing == "linspace" and name in ("dpmpp_2m", "unipc")  # for 1000 steps, see below
    for steps in (100, 500, 999, *(() if no_schedule else (1000,))):
        assert largest_difference(name, SD15 | {"timestep_spacing": timestep_spacing}, steps) < ROUNDING, steps


CONFIGS: dict[str, dict[str, Any]] = {
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


def distinct(name: str) -> list[str]:
    """The cases that differ in what this class reads of them, and the one that is about the other classes' keys."""
    target, overrides = TARGETS[name]
    kept: dict[str, str] = {}
    for case, config in CONFIGS.items():
        read = target.from_config({"clip_sample": False} | config, **overrides).config
        settings = {key: read[key] for key in inspect.signature(target.__init__).parameters if key in read}
        kept.setdefault(case if case == "for other classes" else json.dumps(settings, sort_keys=True), case)
    return list(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [(name, case) for name in SCHEDULERS for case in distinct(name)])
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
            *new_state, model_input = np.tensordot(table.coefficients[k, :, :6], [*state, outputs[k], noise], 1)
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


@pytest.mark.slow
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
                *new_state, model_input = np.tensordot(table.coefficients[k, :, :6], [*state, output, noise], 1)
                state = np.array(new_state)
                atol = 1e-5 * x.abs().max().item() + 2e-7 * largest
                np.testing.assert_allclose(
                    state[0], x.numpy(), rtol=0, atol=atol, err_msg=f"step {begin + k} of {steps} begun at {begin}"
                )
            assert torch.equal(drawn.get_state(), drawn_here.get_state())


@pytest.mark.parametrize("begin", [-1, 4, 1.5, "1", True, None])
def test_a_begin_out_of_range(begin):
    for name in SCHEDULERS:
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
    scheduler: Any = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    x = torch.zeros(1, 1)
    with pytest.raises(IndexError):
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample


# -- clip_sample -----------------------------------------------------------------------------------------------------


def advance(table, k: int, state: np.ndarray, output: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """One step as the graph `update` is documented to take it, in float64: [5, ...]."""
    linear = np.tensordot(table.coefficients[k, :, :6], [*state, output, noise], 1)
    clipped = linear[2].clip(-table.x0_limit, table.x0_limit) - linear[2]
    return linear + np.multiply.outer(table.coefficients[k, :, 6], clipped)


@pytest.mark.parametrize("clip_sample_range", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_clipping_of_unmodified_diffusers(name, prediction_type, clip_sample_range):
    """The whole loop, from its beginning and entered later, at every range some of the predictions are clipped."""
    config = SD15 | {"clip_sample": True, "clip_sample_range": clip_sample_range, "prediction_type": prediction_type}
    generator = np.random.default_rng(0)
    for steps, begin in ((1, 0), (4, 0), (20, 0), (20, 13)):
        scheduler, table = reference(name, config, steps, begin, double=False), build_table(name, config, steps, begin)
        assert table.x0_limit == clip_sample_range
        drawn, drawn_here = (torch.Generator().manual_seed(3) for _ in range(2))
        start = generator.standard_normal((2, 4, 8, 8)).astype(np.float32)
        x, state, shares = torch.from_numpy(start), np.array([start, *[0 * start] * 3], np.float64), []
        kwargs = {"generator": drawn} if name == "lcm" else {}
        for k, t in enumerate(scheduler.timesteps[begin:]):
            output = generator.standard_normal(start.shape).astype(np.float32)
            out = scheduler.step(torch.from_numpy(output), t, x, **kwargs)
            x = out.prev_sample
            noise = torch.randn(x.shape, generator=drawn_here).numpy() if table.uses_noise[k] else 0 * start
            state = advance(table, k, state, output, noise)[:4]
            shares.append((np.abs(state[2]) == clip_sample_range).mean())
            np.testing.assert_allclose(state[0], x.numpy(), rtol=0, atol=1e-5)
            if name == "ddim":
                np.testing.assert_allclose(state[2], out.pred_original_sample.numpy(), rtol=0, atol=1e-5)
        assert 0 < np.mean(shares) < 1


def test_ddim_clips_where_a_config_does_not_say():
    """diffusers' default; what Euler, DPM-Solver and LMS write has no `clip_sample`. LCM's default is not to."""
    config = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert build_table("ddim", config, 4).x0_limit == 1.0 and reference("ddim", config, 4).config.clip_sample
    assert build_table("lcm", config, 4).x0_limit == UNLIMITED and not reference("lcm", config, 4).config.clip_sample


# -- Schedules that are strange --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_steps", [100, 500, 1000, 1100])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_karras_time_steps_of_a_cosine_schedule(train_steps, zero_snr):
    """diffusers cuts these to whole numbers, so that the last bit of a square root may be a whole time step."""
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": train_steps, "use_karras_sigmas": True}
    config |= {"rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    with ieee_roots():
        for name in ("dpmpp_2m", "unipc", "euler"):
            scheduler = TARGETS[name][0].from_config(config)
            for steps in range(1, 76):
                scheduler.set_timesteps(steps)
                table = build_table(name, config, steps)
                np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy().astype(np.float32))


BROKEN = {"beta_start": 0.01, "beta_end": 0.2, "num_train_timesteps": 1100, "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("timestep_spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_betas_that_leave_no_signal_before_the_end(name, timestep_spacing, prediction_type):
    """Their rescaled product ends in NaN. What diffusers runs is run, what is NaN there is refused."""
    config = BROKEN | {"timestep_spacing": timestep_spacing, "prediction_type": prediction_type, "clip_sample": False}
    ran = 0
    with ieee_roots(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for begin in range(8):
            true = np.array(list(rows(reference(name, config, 8, begin), name, begin)))
            if not np.isfinite(true[:, 0]).all():
                with pytest.raises(UserError, match=r"no finite coefficients|no signal to predict from"):
                    build_table(name, config, 8, begin)
                continue
            ran += 1
            table = build_table(name, config, 8, begin)
            np.testing.assert_array_equal(table.timesteps, reference(name, config, 8).timesteps[begin:].numpy())
            difference = np.abs(table.coefficients[:, :, :6] - true) / np.maximum(1, np.abs(true))
            assert np.nanmax(difference) < ROUNDING
    assert ran > 0


# -- What is refused -------------------------------------------------------------------------------------------------


def assert_refused(name: str, config: Any, steps: Any, *words: str) -> None:
    with pytest.raises(UserError) as error:
        build_table(name, config, steps)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name, setting, value",
    [
        *((name, "thresholding", True) for name in SCHEDULERS if name != "euler"),
        *((name, "beta_schedule", "sigmoid") for name in SCHEDULERS),
        *((name, "prediction_type", "flow_prediction") for name in SCHEDULERS),
        *((name, "timestep_spacing", "uniform") for name in SCHEDULERS if name != "lcm"),
        *((name, "final_sigmas_type", "one") for name in ("euler", *MULTISTEP)),
        *((name, "use_exponential_sigmas", True) for name in ("euler", *MULTISTEP)),
        *((name, "use_beta_sigmas", True) for name in ("euler", *MULTISTEP)),
        *((name, "use_flow_sigmas", True) for name in MULTISTEP),
        ("unipc", "use_dynamic_shifting", True),
        *((name, "solver_order", 3) for name in MULTISTEP),
        *((name, "solver_type", "bh3") for name in MULTISTEP),
        ("euler", "interpolation_type", "log_linear"),
        ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++"),
        ("dpmpp_2m", "algorithm_type", "dpmsolver"),
        ("dpmpp_2m", "use_lu_lambdas", True),
        ("dpmpp_2m", "variance_type", "learned_range"),
        ("unipc", "predict_x0", False),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}),
        ("unipc", "shift_terminal", 0.1),
        *((name, "beta_start", "0.1") for name in SCHEDULERS),
        *((name, "beta_end", None) for name in SCHEDULERS),
        *((name, "beta_end", float("nan")) for name in SCHEDULERS),
        *((name, "num_train_timesteps", 0) for name in SCHEDULERS),
        *((name, "num_train_timesteps", value) for name in SCHEDULERS for value in (1000.5, 1000.0, 10**9, 10**400)),
        *((name, "trained_betas", [0.1, 0.2]) for name in SCHEDULERS),
        *((name, "sigma_min", "small") for name in ("euler", *MULTISTEP)),
        ("lcm", "original_inference_steps", 1001),
        ("lcm", "original_inference_steps", 0),
    ],
)
def test_what_a_config_asks_for_in_vain_is_refused_by_name(name, setting, value):
    assert_refused(name, SD15 | {setting: value}, 4, setting)


def test_what_only_other_schedulers_read_is_not_refused():
    config = SD15 | {"clip_sample": True, "thresholding": True, "solver_order": 3, "algorithm_type": "dpmsolver"}
    assert largest_difference("euler", config, 4) < ROUNDING


@pytest.mark.parametrize(
    "name, config",
    [
        *(("dpmpp_2m", {"variance_type": v}) for v in ("fixed_small", "fixed_small_log", "fixed_large", "learned?")),
        ("dpmpp_2m", {"variance_type": "learned_range", "prediction_type": "v_prediction"}),
        ("dpmpp_2m", {"use_dynamic_shifting": True}),
        ("dpmpp_2m", {"algorithm_type": "deis", "final_sigmas_type": "sigma_min", "solver_type": "logrho"}),
        ("dpmpp_2m_karras", {"use_lu_lambdas": True}),
        ("euler", {"timestep_type": "continuous"}),
        ("euler", {"timestep_type": "continuous", "prediction_type": "sample"}),
        ("unipc", {"solver_type": "midpoint"}),
        ("ddim", {"variance_type": "learned_range", "algorithm_type": "deis"}),
    ],
)
def test_what_changes_nothing_in_diffusers_is_not_refused(name, config):
    for steps in (1, 4, 20):
        assert largest_difference(name, SD15 | config, steps) < ROUNDING


def test_deis_left_behind():
    """diffusers takes `deis` for dpmsolver++, but refuses it where it ends at sigma 0: its check comes first."""
    config = json.loads(diffusers.DEISMultistepScheduler(**{k: SD15[k] for k in BETAS}).to_json_string())
    with pytest.raises(ValueError, match="final_sigmas_type"):
        diffusers.DPMSolverMultistepScheduler.from_config(config)
    assert config["algorithm_type"] == "deis"
    table = build_table("dpmpp_2m", config, 20)
    np.testing.assert_array_equal(
        table.coefficients, build_table("dpmpp_2m", config | {"algorithm_type": "dpmsolver++"}, 20).coefficients
    )
    assert largest_difference("dpmpp_2m", config | {"algorithm_type": "dpmsolver++"}, 20) < ROUNDING


BETAS = ("beta_start", "beta_end", "beta_schedule")
WRITERS = [
    kind
    for kind in dir(diffusers)
    if kind in {e.name for e in diffusers.schedulers.KarrasDiffusionSchedulers} and kind != "EDMEulerScheduler"
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_config_of_every_class_that_sd_has_as_it_writes_it(name, kind):
    """Without `clip_sample` in it, diffusers' DDIM clips; nothing else keeps a named sampler from running."""
    try:
        config = json.loads(getattr(diffusers, kind)(**{k: SD15[k] for k in BETAS}).to_json_string())
    except ImportError as e:
        pytest.skip(str(e))
    if name == "unipc" and not config.get("lower_order_final", True):
        assert_refused(name, config, 20, "cannot end at sigma 0")  # as in diffusers, which makes NaN of it
        assert not np.isfinite([true[0] for true in rows(reference(name, config, 20), name)]).all()
        return
    table = build_table(name, config, 20)
    if config.get("algorithm_type") == "deis":
        config["algorithm_type"] = "dpmsolver++"  # test_deis_left_behind
    scheduler = reference(name, config, 20)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy().astype(np.float32))
    if name in ("ddim", "lcm"):
        assert table.x0_limit == (1.0 if scheduler.config.clip_sample else UNLIMITED)
    if table.x0_limit == UNLIMITED:
        assert largest_difference(name, config, 20) < ROUNDING


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", True, None, float("nan")])
def test_numbers_of_steps_out_of_range(steps):
    for name in SCHEDULERS:
        assert_refused(name, SD15, steps, repr(steps), "1 to 1000")


def test_numpy_integers_are_numbers_of_steps():
    steps: Any = np.int64(4)
    assert len(build_table("ddim", SD15, steps).timesteps) == 4


LEADING, LINSPACE, TRAILING = ({"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing"))


@pytest.mark.slow
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
    assert SamplingDefaults().scheduler == "unipc"
    assert_refused("", SD15, 4, *SCHEDULERS)


# Arguments without an effect as long as the settings that are accepted stay as they are.
IDLE = {
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
