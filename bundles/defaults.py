"""The sampling settings of a model: its own, and diffusers' where it has none."""

from dataclasses import dataclass

from .manifest import Manifest


@dataclass(frozen=True)
class SamplingDefaults:
    """What a request samples with where it says nothing else: the one home of these numbers.

    Attributes:
        num_inference_steps: 20, the ControlNet++ paper's, where the model has none of its own.
        guidance_scale: 7.5, as in diffusers' pipelines.
        scheduler: a name of `SCHEDULERS`.
        timestep_spacing, guidance_start, guidance_end, guidance_interval, controlnet_interval, cache_interval: as in
            `Request`; nothing is left out.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str = "unipc"
    timestep_spacing: str | None = None
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_interval: int = 1
    controlnet_interval: int = 1
    cache_interval: int = 1

    @classmethod
    def of(cls, manifest: Manifest) -> "SamplingDefaults":
        """The manifest's, over those of this class."""
        return cls(**manifest.defaults)
