"""The settings that a diffusers scheduler class takes from a scheduler_config.json, whichever class wrote the file.

The rules are those of diffusers' `TargetScheduler.from_config(config)` (`ConfigMixin.extract_init_dict` in
configuration_utils.py): keys that the target class has are honoured, keys that the file lacks take the target class's
own default, keys that the target class does not know are dropped. What the target class would honour and the tables of
schedulers.py do not is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UserError

Settings = Mapping[str, Any]

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_SIGMAS: dict[str, Any] = _SCHEDULE | {
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    # No arguments of DPMSolverMultistepScheduler, but from_config leaves them where its Karras schedule looks.
    "sigma_min": None,
    "sigma_max": None,
}
_MULTISTEP: dict[str, Any] = _SIGMAS | {
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}

DEFAULTS: Mapping[str, Settings] = {
    "DDIMScheduler": _SCHEDULE
    | {
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "leading",
    },
    "EulerDiscreteScheduler": _SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": _MULTISTEP
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": _MULTISTEP
    | {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": (),
        "solver_p": None,
        "shift_terminal": None,
    },
    # LCM's time steps come from its distillation: its class has timestep_spacing and steps_offset, and reads neither.
    "LCMScheduler": _SCHEDULE
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "clip_sample": False,
        "thresholding": False,
    },
}
"""Defaults of the arguments that matter here, by diffusers class."""

_ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "clip_sample": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "predict_x0": (True,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "shift_terminal": (None,),
    "solver_order": (1, 2),
    "solver_p": (None,),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "thresholding": (False,),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "timestep_type": ("discrete",),
    "use_beta_sigmas": (False, None),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None,),
}
"""What each setting may be. A scheduler is checked for the settings that its diffusers class has, and for no others."""


def from_config(target: str, config: Mapping[str, Any], **overrides: Any) -> Settings:
    """`target.from_config(config, **overrides)`: a value for every key of `DEFAULTS[target]`, checked.

    Raises:
        UserError: a value that is not supported or of the wrong type.
    """
    defaults = DEFAULTS[target]
    dropped = config.get("_use_default_values") or ()
    present = {key: value for key, value in config.items() if key in defaults and key not in dropped}
    settings = {**defaults, **present, **overrides}
    for key, value in settings.items():
        source = "in scheduler_config.json" if key in present else f"(the default of diffusers' {target})"
        accepted = _ACCEPTED.get(key)
        if accepted is not None and value not in accepted:
            choices = " or ".join(map(repr, accepted))
            raise UserError(f"{key} {value!r} {source} is not supported: set it to {choices}, or use another scheduler")
        number = type(defaults[key]) in (int, float) or (key in ("sigma_min", "sigma_max") and value is not None)
        if number and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
            raise UserError(f"{key} {value!r} {source} is not a number: correct it")
    train_steps, betas = settings["num_train_timesteps"], settings["trained_betas"]
    if not isinstance(train_steps, int) or train_steps < 1:
        raise UserError(f"num_train_timesteps {train_steps!r} in scheduler_config.json must be a whole number above 0")
    if betas is not None and np.shape(betas) != (train_steps,):
        raise UserError(f"trained_betas in scheduler_config.json must be a list of {train_steps} (num_train_timesteps)")
    return settings
