"""Schedulers as users know them: AUTOMATIC1111's sampler menu, diffusers' classes, and this project's short names."""

from ...messages import unknown_choice
from .schedulers import SCHEDULERS

A1111: dict[str, tuple[str, str | None]] = {
    "ddim": ("DDIM", None),
    "euler": ("Euler", None),
    "dpmpp_2m": ("DPM++ 2M", None),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "unipc": ("UniPC", None),
    "lcm": ("LCM", None),
}
"""The sampler's name in the web UI's menu, and its schedule type."""

SCHEDULE_TYPES: dict[str, str] = {"ays": "Align Your Steps", "karras": "Karras", "trailing": "trailing"}
"""A `timestep_spacing` as the web UI's menu of schedule types has it, or as diffusers, where that has none."""

_CLASSES = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


def read_scheduler(text: str) -> str:
    """The short name of what a user calls a scheduler, as in `DPM++ 2M Karras`; case and punctuation do not count.

    Raises:
        UserError: it is none of those that there are.
    """
    found = _names().get(_key(text))
    if found is None:
        raise unknown_choice("scheduler", text, SCHEDULERS)
    return found


def _names() -> dict[str, str]:
    titles = {f"{sampler} {schedule or ''}": name for name, (sampler, schedule) in A1111.items()}
    return {_key(word): name for word, name in {**_CLASSES, **titles, **{s: s for s in SCHEDULERS}}.items()}


def _key(text: str) -> str:
    plain = "".join(c for c in text[:100].lower().replace("dpm++", "dpmpp") if c.isalnum())
    return plain.removesuffix("scheduler")
