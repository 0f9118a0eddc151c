"""The settings that a diffusers scheduler class takes from a scheduler config, whichever class wrote the file.

The rules are those of diffusers' `TargetScheduler.from_config(config)` (`ConfigMixin.extract_init_dict` in
configuration_utils.py): keys that the target class has are honored, keys that the file lacks take the target class's
own default, keys that the target class does not know are dropped. Values of other classes that the target class
replaces or never reads (`algorithm_type` "deis", `variance_type` "fixed_small") have no effect, as in diffusers.
What the target class would honor and the tables of schedulers.py do not is refused by name.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from ...errors import UserError
from ...messages import printable
from ...schema import Meta, SchemaError, convert

Settings = Mapping[str, Any]

MAX_TRAIN_STEPS = 100_000

ALIGN_YOUR_STEPS = "align_your_steps"
"""A setting of this project's own, which no file has: diffusers takes the table as an argument of `set_timesteps`."""

TIMESTEP_SPACINGS: Mapping[str, Mapping[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "ays": {ALIGN_YOUR_STEPS: True, "use_karras_sigmas": False, "final_sigmas_type": "zero"},
    "trailing": {"timestep_spacing": "trailing", "use_karras_sigmas": False},
}
"""What a request's `timestep_spacing` replaces in the model's scheduler config."""

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_CLIPPING: dict[str, Any] = _SCHEDULE | {"clip_sample_range": 1.0, "thresholding": False}
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
    "DDIMScheduler": _CLIPPING
    | {
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
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
    "LCMScheduler": _CLIPPING
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "clip_sample": False,
    },
}
"""Defaults of the arguments that matter here, by diffusers class."""

_Flag = bool | None  # diffusers tests flags for truth only
_Beta = Annotated[float, Meta(ge=0, le=1)]
_Sigma: TypeAlias = Annotated[float, Meta(gt=0, le=1e9)] | None
_Betas: TypeAlias = Annotated[list[_Beta], Meta(max_length=MAX_TRAIN_STEPS)] | None
_Lambda: TypeAlias = Annotated[float, Meta(le=1e9)] | Literal["-Infinity"] | None

_TYPES: Mapping[str, Any] = {
    "num_train_timesteps": Annotated[int, Meta(ge=1, le=MAX_TRAIN_STEPS)],
    "beta_start": _Beta,
    "beta_end": _Beta,
    "trained_betas": _Betas,
    "steps_offset": Annotated[int, Meta(ge=0, le=MAX_TRAIN_STEPS)],
    "sigma_min": _Sigma,
    "sigma_max": _Sigma,
    "lambda_min_clipped": _Lambda,
    "clip_sample_range": Annotated[float, Meta(gt=0, le=1e9)],
    "disable_corrector": Annotated[list[int], Meta(max_length=MAX_TRAIN_STEPS)],
    "original_inference_steps": Annotated[int, Meta(ge=1, le=MAX_TRAIN_STEPS)],
    "timestep_scaling": Annotated[float, Meta(ge=0, le=1e9)],
    "variance_type": str | None,
}
"""Types and ranges of the values that are not one of a few words or numbers; what is in `_FLAGS` is a `_Flag`."""

_FLAGS = frozenset(key for settings in DEFAULTS.values() for key, value in settings.items() if isinstance(value, bool))

_ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++",),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
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
    "use_beta_sigmas": (False,),
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None,),
}
"""What each setting may be. A scheduler is checked for the settings that its diffusers class has, and for no others."""

REMEDY = "take another scheduler, or correct scheduler/scheduler_config.json in the checkpoint and export it again"


def from_config(target: str, config: Mapping[str, Any], **overrides: Any) -> Settings:
    """`target.from_config(config, **overrides)`: a value for every key of `DEFAULTS[target]`, checked.

    Raises:
        UserError: a value that is not supported, of the wrong type or out of range.
    """
    defaults = DEFAULTS[target]
    dropped = _converted("_use_default_values", config.get("_use_default_values"), list[str] | None, "") or ()
    present = {key: value for key, value in config.items() if key in defaults and key not in dropped}
    sources = {key: "" if key in present else f" (the default of diffusers' {target})" for key in defaults}
    settings = {**defaults, **present, **overrides}
    for key, value in settings.items():
        if key in _TYPES:
            settings[key] = _converted(key, value, _TYPES[key], sources[key])
        elif key in _FLAGS:
            settings[key] = bool(_converted(key, value, _Flag, sources[key]))
    _drop_what_is_not_read(target, settings)
    for key, accepted in _ACCEPTED.items():
        if key in settings and not any(type(settings[key]) is type(a) and settings[key] == a for a in accepted):
            raise _unusable(key, settings[key], sources[key], f"only {_choices(accepted)} is supported")
    train_steps, betas = settings["num_train_timesteps"], settings["trained_betas"]
    if betas is not None and len(betas) != train_steps:
        why = f"it has {len(betas)} numbers for num_train_timesteps {train_steps}"
        raise _unusable("trained_betas", betas, "", why)
    return settings


def spacing_overrides(target: str, timestep_spacing: str | None) -> Mapping[str, Any]:
    """What a spacing replaces of the settings that a diffusers class has; None replaces nothing."""
    replaced = {} if timestep_spacing is None else TIMESTEP_SPACINGS[timestep_spacing]
    return {key: value for key, value in replaced.items() if key in DEFAULTS[target] or key == ALIGN_YOUR_STEPS}


def _drop_what_is_not_read(target: str, settings: dict[str, Any]) -> None:
    """Sets what the class's own `__init__` replaces, and what none of its methods would look at, to its default."""
    if target == "DPMSolverMultistepScheduler":
        if settings["lambda_min_clipped"] in (None, "-Infinity"):  # which JSON has no number for
            settings["lambda_min_clipped"] = -math.inf
        if settings["algorithm_type"] == "deis":  # left behind by DEISMultistepScheduler
            settings["algorithm_type"] = "dpmsolver++"
        # Only these two change anything (the model's output is cut), and only that of a model that predicts noise.
        learned = settings["variance_type"] in ("learned", "learned_range")
        if not learned or settings["prediction_type"] != "epsilon":
            settings["variance_type"] = None
        settings["use_dynamic_shifting"] = False  # it acts through an argument of set_timesteps that pipelines lack
        if settings["use_karras_sigmas"]:
            settings["use_lu_lambdas"] = False
    continuous = settings.get("timestep_type") == "continuous"  # Euler's, and of v-prediction models only
    if continuous and settings["prediction_type"] != "v_prediction":
        settings["timestep_type"] = "discrete"


def _converted(key: str, value: Any, kind: Any, source: str) -> Any:
    try:
        return convert(value, kind)
    except SchemaError as e:
        raise _unusable(key, value, source, str(e)) from None


def _unusable(key: str, value: Any, source: str, why: str) -> UserError:
    # A list may be of any length, and nested more deeply than `repr` goes.
    brackets: dict[type, str] = {list: "[…]", dict: "{…}"}
    shown = brackets[type(value)] if type(value) in brackets else printable(repr(value), 60)
    return UserError(f"{key} {shown} in the model's scheduler config{source} cannot be used: {why}; {REMEDY}")


def _choices(accepted: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, accepted))
