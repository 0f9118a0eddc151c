"""The fields of AUTOMATIC1111's interface and of the ControlNet extension's units."""

from typing import Any

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable
from ..runtime.sampling.scheduler_names import A1111, read_scheduler
from ..schema import Record, SchemaError, convert
from .errors import refused_field, unknown_field
from .orders import AskedControl, image_bytes

# What the web UI takes besides, with the values that ask for nothing: others are refused by name.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "script_name": ("", "None"),
    "script_args": ([],),
    "mask": ("",),
    "latent_mask": ("",),
    "refiner_checkpoint": ("", "None"),
    "firstpass_image": ("",),
    "comments": ({},),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "save_images": (False,),
}
# These change nothing here, whatever their value: samplers have no randomness of their own, nothing is saved.
_IGNORED = (
    "denoising_strength", "do_not_save_grid", "do_not_save_samples", "eta", "force_task_id", "hr_additional_modules",
    "hr_cfg", "hr_checkpoint_name", "hr_distilled_cfg", "hr_negative_prompt", "hr_prompt", "hr_resize_x", "hr_resize_y",
    "hr_sampler_name", "hr_scale", "hr_scheduler", "hr_second_pass_steps", "hr_upscaler", "image_cfg_scale",
    "infotext", "initial_noise_multiplier", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_fill",
    "inpainting_mask_invert", "mask_blur", "mask_blur_x", "mask_blur_y", "mask_round", "distilled_cfg_scale",
    "override_settings_restore_afterwards", "refiner_switch_at", "s_churn", "s_min_uncond", "s_noise", "s_tmax",
    "s_tmin", "sampler_index", "subseed", "disable_extra_networks", "resize_mode",
)  # fmt: skip


class UnitFields(Record):
    """A unit of the ControlNet extension. `module` other than `none` extracts the condition from a photo."""

    enabled: bool = True
    image: Any = None
    input_image: Any = None
    module: str | None = None
    model: str | None = None
    weight: float = 1.0
    resize_mode: str | int | None = None
    guidance: float | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    control_mode: str | int | None = None
    guessmode: bool | None = None
    mask: Any = None
    mask_image: Any = None
    effective_region_mask: Any = None
    # These change nothing here: extractors are the model's own, at its own size.
    advanced_weighting: Any = None
    hr_option: Any = None
    input_mode: Any = None
    is_ui: Any = None
    low_vram: Any = None
    lowvram: Any = None
    pixel_perfect: Any = None
    processor_res: Any = None
    pulid_mode: Any = None
    save_detected_map: Any = None
    threshold_a: Any = None
    threshold_b: Any = None
    union_control_type: Any = None


_UNIT_IGNORED = (
    "advanced_weighting", "hr_option", "input_mode", "is_ui", "low_vram", "lowvram", "pixel_perfect", "processor_res",
    "pulid_mode", "save_detected_map", "threshold_a", "threshold_b", "union_control_type",
)  # fmt: skip
_RESIZE = {
    "just resize": "stretch", "resize": "stretch", "0": "stretch",
    "crop and resize": "crop", "scale to fit (inner fit)": "crop", "inner fit (scale to fit)": "crop", "1": "crop",
    "resize and fill": "pad", "envelope (outer fit)": "pad", "outer fit (shrink to fit)": "pad", "2": "pad",
}  # fmt: skip
_WORDS = {
    "seg": ("seg", "segmentation", "ade20k"),
    "canny": ("canny",),
    "hed": ("hed", "softedge"),
    "lineart": ("lineart",),
    "depth": ("depth",),
}
"""What a condition is called in the names of the extension's models and modules."""


class TextFields(Record):
    """A request of `/sdapi/v1/txt2img`; `score`: each image's condition is extracted again and compared."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    score: bool = False
    timeout: float | None = None
    comments: Any = None
    denoising_strength: Any = None
    disable_extra_networks: Any = None
    distilled_cfg_scale: Any = None
    do_not_save_grid: Any = None
    do_not_save_samples: Any = None
    enable_hr: Any = None
    eta: Any = None
    firstpass_image: Any = None
    firstphase_height: Any = None
    firstphase_width: Any = None
    force_task_id: Any = None
    hr_additional_modules: Any = None
    hr_cfg: Any = None
    hr_checkpoint_name: Any = None
    hr_distilled_cfg: Any = None
    hr_negative_prompt: Any = None
    hr_prompt: Any = None
    hr_resize_x: Any = None
    hr_resize_y: Any = None
    hr_sampler_name: Any = None
    hr_scale: Any = None
    hr_scheduler: Any = None
    hr_second_pass_steps: Any = None
    hr_upscaler: Any = None
    infotext: Any = None
    override_settings_restore_afterwards: Any = None
    refiner_checkpoint: Any = None
    refiner_switch_at: Any = None
    restore_faces: Any = None
    s_churn: Any = None
    s_min_uncond: Any = None
    s_noise: Any = None
    s_tmax: Any = None
    s_tmin: Any = None
    save_images: Any = None
    script_args: Any = None
    script_name: Any = None
    seed_resize_from_h: Any = None
    seed_resize_from_w: Any = None
    styles: Any = None
    subseed: Any = None
    subseed_strength: Any = None
    tiling: Any = None


class ImageToImageFields(TextFields):
    """A request of `/sdapi/v1/img2img`: one image in base64 to begin with."""

    init_images: list[str] | None = None
    resize_mode: int | None = None
    include_init_images: bool = False
    image_cfg_scale: Any = None
    initial_noise_multiplier: Any = None
    inpaint_full_res: Any = None
    inpaint_full_res_padding: Any = None
    inpainting_fill: Any = None
    inpainting_mask_invert: Any = None
    latent_mask: Any = None
    mask: Any = None
    mask_blur: Any = None
    mask_blur_x: Any = None
    mask_blur_y: Any = None
    mask_round: Any = None


def ignored_of(fields: TextFields, used: tuple[str, ...] = ()) -> list[str]:
    """The fields that were sent and change nothing.

    Raises:
        ServiceError: one asks for what there is not.
    """
    for name, values in _NOTHING.items():
        value = getattr(fields, name, None)
        if value is not None and value not in values:
            raise refused_field(name, f"is not supported here: leave it out, or send {values[0]!r}")
    return [name for name in _IGNORED if name not in used and getattr(fields, name, None) is not None]


def scheduler_of(sampler: str | None, schedule: str | None) -> str | None:
    """The short name of a sampler and its schedule type; None is the model's own.

    Raises:
        UserError: there is no such sampler, or not with this schedule.
    """
    type_ = "" if schedule is None or schedule.lower() in ("automatic", "") else schedule
    if not sampler:
        if type_:
            raise UserError("scheduler is a sampler's schedule type: send sampler_name too")
        return None
    name = read_scheduler(sampler)
    if not type_ or type_ == A1111[name][1]:
        return name
    for other, (title, own) in A1111.items():
        if title == A1111[name][0] and (own or "uniform").lower() == type_.lower():
            return other
    raise UserError(f"scheduler {printable(repr(schedule), 60)} is not there for {A1111[name][0]}: send `automatic`")


def units_of(scripts: dict[str, Any], image: str | None = None) -> tuple[list[AskedControl], bool, list[str]]:
    """The controls of `alwayson_scripts`, whether ControlNet is more important, and what was ignored.

    Args:
        image: of units that have none: the image to begin with, in base64.

    Raises:
        UserError, ServiceError: another script, or a unit that cannot be used.
    """
    controls: list[AskedControl] = []
    guess: set[bool] = set()
    ignored: list[str] = []
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else None
        if name.lower() != "controlnet":
            if _does_nothing(arguments):
                ignored.append(f"alwayson_scripts.{printable(name, 40)}")
                continue
            raise unknown_field(name, "alwayson_scripts")
        if not isinstance(arguments, list):
            raise UserError("alwayson_scripts.controlnet must be {'args': [unit, …]}")
        for i, argument in enumerate(arguments):
            if argument is None or argument is False or argument is True:
                continue
            try:
                unit = convert(argument, UnitFields)
            except SchemaError as e:
                raise SchemaError(f"controlnet unit {i}: {e}") from None
            if not unit.enabled:
                continue
            controls.append(_control(unit, i, image))
            guess.add(_more_important(unit))
            ignored += [f"controlnet.{field}" for field in _UNIT_IGNORED if getattr(unit, field) is not None]
    if len(guess) > 1:
        raise UserError("control_mode must be the same in every unit")
    return controls, guess == {True}, list(dict.fromkeys(ignored))


def condition_of(name: str | None, what: str) -> str:
    """The condition that a model or module of the extension stands for.

    Raises:
        UserError: there is none.
    """
    words = "".join(c if c.isalnum() else " " for c in (name or "")[:200].lower()).split()
    found = [
        condition
        for condition, known in _WORDS.items()
        if any(word.startswith(start) for word in words for start in known)
    ]
    if len(found) != 1:
        shown = printable(repr(name), 60)
        raise UserError(f"{what} {shown} is not served: choose from {', '.join(CONDITIONS)}")
    return found[0]


def _control(unit: UnitFields, i: int, default: str | None) -> AskedControl:
    for name in ("mask", "mask_image", "effective_region_mask"):
        if getattr(unit, name) not in (None, ""):
            raise refused_field(f"controlnet unit {i}: {name}", "is not supported: a control applies everywhere")
    photo = unit.module is not None and unit.module.lower() not in ("none", "")
    named = unit.model if unit.model and unit.model.lower() != "none" else unit.module
    condition = condition_of(named, f"controlnet unit {i}: model")
    if photo and condition_of(unit.module, f"controlnet unit {i}: module") != condition:
        raise UserError(f"controlnet unit {i}: module and model are of two conditions")
    image = unit.image if unit.image not in (None, "") else unit.input_image
    if isinstance(image, dict):  # as the extension's page sends it
        if image.get("mask") not in (None, ""):
            raise refused_field(f"controlnet unit {i}: mask", "is not supported: a control applies everywhere")
        image = image.get("image")
    image = image if image not in (None, "") else default
    if not isinstance(image, str) or not image:
        raise UserError(f"controlnet unit {i}: image is missing: send it in base64")
    mode = "crop" if unit.resize_mode is None else _RESIZE.get(str(unit.resize_mode).lower())
    if mode is None:
        shown = printable(repr(unit.resize_mode), 40)
        raise UserError(
            f"controlnet unit {i}: unknown resize_mode {shown}: send Just Resize, Crop and Resize or Resize and Fill"
        )
    end = unit.guidance_end if unit.guidance is None else unit.guidance
    name = f"the image of controlnet unit {i}"
    return AskedControl(
        condition, image_bytes(image, name), photo, mode, unit.weight, unit.guidance_start, end, name=name
    )


def _more_important(unit: UnitFields) -> bool:
    mode = unit.control_mode
    if unit.guessmode:
        return True
    if mode in (None, 0, "0") or str(mode).lower() == "balanced":
        return False
    if mode in (2, "2") or str(mode).lower() == "controlnet is more important":
        return True
    raise refused_field("control_mode", "must be Balanced or ControlNet is more important")


def _does_nothing(arguments: Any) -> bool:
    """Whether a script is switched off: clients list scripts of other extensions so."""
    return arguments in (None, [], [False]) or (isinstance(arguments, list) and arguments[:1] == [False])
