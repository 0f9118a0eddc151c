"""What the search may change: each choice is a few words for people and fields of `Levers`."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ..bundles.bundle import Bundle
from ..bundles.defaults import SamplingDefaults
from ..bundles.graph_names import SHALLOW
from ..runtime.settings.preset import Levers

FEW_STEPS = (1, 2)  # of models that are made for few
STEPS = (3, 4, 5, 6, 8, 10, 12, 15, 20)
SAMPLERS = (
    "unipc", "unipc ays", "unipc karras", "unipc trailing",
    "dpmpp_2m", "dpmpp_2m ays", "dpmpp_2m karras", "dpmpp_2m trailing",
    "euler ays", "euler karras", "euler trailing",
    "ddim", "ddim trailing",
)  # fmt: skip
# Both ends: arXiv 2404.07724 leaves guidance out at the first and last steps, arXiv 2506.08351 at all but the first.
GUIDANCE = ((0.0, 1.0), (0.0, 0.75), (0.0, 0.5), (0.0, 0.25), (0.25, 1.0), (0.5, 1.0), (0.25, 0.75), (0.1, 0.6))
CONTROL = ((0.0, 1.0), (0.0, 0.8), (0.0, 0.6), (0.2, 1.0))
GUIDANCE_INTERVALS = (1, 2, 3)
CONTROLNET_INTERVALS = (1, 2, 3)
CACHE_INTERVALS = (1, 2, 3)


class Choices(Protocol):
    """An optuna trial, as far as it is needed here."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""
        ...


def suggest(trial: Choices, bundle: Bundle) -> Levers:
    """Levers of an optuna trial, of those that a bundle has."""
    own = SamplingDefaults.of(bundle.manifest)
    steps = trial.suggest_categorical("steps", (*(FEW_STEPS if _takes_few_steps(own) else ()), *STEPS))
    sampler = trial.suggest_categorical("sampler", tuple(dict.fromkeys((*SAMPLERS, own.scheduler))))
    guidance = trial.suggest_categorical("guidance", tuple(map(_text, GUIDANCE)))
    control = trial.suggest_categorical("control", tuple(map(_text, CONTROL)))
    reused = trial.suggest_categorical("guidance_interval", GUIDANCE_INTERVALS)
    interval = trial.suggest_categorical("controlnet_interval", CONTROLNET_INTERVALS)
    # Only bundles that were exported for it can cache.
    cache = trial.suggest_categorical("cache_interval", CACHE_INTERVALS) if SHALLOW in bundle.manifest.graphs else 1
    return levers_of(steps, sampler, _pair(guidance), _pair(control), reused, interval, cache)


def levers_of(
    steps: int,
    sampler: str,
    guidance: tuple[float, float] = (0.0, 1.0),
    control: tuple[float, float] = (0.0, 1.0),
    guidance_interval: int = 1,
    controlnet_interval: int = 1,
    cache_interval: int = 1,
) -> Levers:
    """Levers from the words of this module."""
    scheduler, _, spacing = sampler.partition(" ")
    return Levers(
        num_inference_steps=steps,
        scheduler=scheduler,
        timestep_spacing=spacing or None,
        guidance_start=guidance[0],
        guidance_end=guidance[1],
        control_guidance_start=control[0],
        control_guidance_end=control[1],
        guidance_interval=guidance_interval,
        controlnet_interval=controlnet_interval,
        cache_interval=cache_interval,
    )


def first_guesses(bundle: Bundle) -> Iterator[Mapping[str, Any]]:
    """What papers recommend, and combinations of it: where the search begins."""
    plain: dict[str, Any] = {"guidance": _text(GUIDANCE[0]), "control": _text(CONTROL[0])}
    plain |= {"guidance_interval": 1, "controlnet_interval": 1}
    own = SamplingDefaults.of(bundle.manifest)
    if _takes_few_steps(own):
        for steps in (4, 2, 1):
            yield {**plain, "steps": steps, "sampler": own.scheduler}
    for sampler in ("dpmpp_2m ays", "unipc", "dpmpp_2m karras", "ddim trailing"):
        for steps in (10, 6):
            yield {**plain, "steps": steps, "sampler": sampler}
    for steps in (8, 6, 5):
        for guidance in ((0.0, 0.5), (0.5, 1.0)):
            levers = {"guidance": _text(guidance), "controlnet_interval": 2}
            yield {**plain, "steps": steps, "sampler": "dpmpp_2m ays", **levers}
    for steps in (8, 5):
        levers = {"guidance_interval": 2, "controlnet_interval": 2}
        yield {**plain, "steps": steps, "sampler": "dpmpp_2m ays", **levers}
    if SHALLOW in bundle.manifest.graphs:
        for interval in (2, 3):
            yield {**plain, "steps": 10, "sampler": "dpmpp_2m ays", "cache_interval": interval}


def _takes_few_steps(own: SamplingDefaults) -> bool:
    return own.num_inference_steps <= 8


def describe(levers: Levers) -> str:
    """Levers in a few words, those that are off left out: `8 steps of dpmpp_2m ays, guidance 0-0.5`."""
    sampler = " ".join(filter(None, (levers.scheduler, levers.timestep_spacing)))
    parts = [f"{levers.num_inference_steps} steps of {sampler}"]
    if (levers.guidance_start, levers.guidance_end) != (0, 1):
        parts.append(f"guidance {_text((levers.guidance_start, levers.guidance_end))}")
    if (levers.control_guidance_start, levers.control_guidance_end) != (0, 1):
        parts.append(f"control {_text((levers.control_guidance_start, levers.control_guidance_end))}")
    if levers.guidance_interval > 1:
        parts.append(f"guidance every {levers.guidance_interval} steps")
    if levers.controlnet_interval > 1:
        parts.append(f"ControlNet every {levers.controlnet_interval} steps")
    if levers.cache_interval > 1:
        parts.append(f"DeepCache every {levers.cache_interval} steps")
    return ", ".join(parts)


def _text(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}-{pair[1]:g}"


def _pair(text: str) -> tuple[float, float]:
    start, _, end = text.partition("-")
    return float(start), float(end)
