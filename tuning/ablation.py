"""Which lever gives what: settings that differ from the exact one in few things."""

from msgspec.structs import replace

from ..bundles.bundle import Bundle
from ..bundles.graph_names import SHALLOW
from ..runtime.settings.preset import Levers


def single_levers(exact: Levers, bundle: Bundle) -> list[Levers]:
    """The exact setting with one thing changed at a time, and what papers combine, of what the bundle has."""
    half = max(exact.num_inference_steps // 2, 1)
    ays = {"num_inference_steps": half, "scheduler": "dpmpp_2m", "timestep_spacing": "ays"}
    caches = [replace(exact, cache_interval=n) for n in (2, 3)] if SHALLOW in bundle.manifest.graphs else []
    return [
        replace(exact, num_inference_steps=half),
        replace(exact, num_inference_steps=half, timestep_spacing="ays"),
        replace(exact, **ays),
        replace(exact, num_inference_steps=half, timestep_spacing="karras"),
        replace(exact, num_inference_steps=half, timestep_spacing="trailing"),
        replace(exact, guidance_end=0.5),
        replace(exact, guidance_start=0.5),
        replace(exact, guidance_start=0.25, guidance_end=0.75),
        replace(exact, guidance_interval=2),
        replace(exact, guidance_interval=3),
        replace(exact, control_guidance_end=0.6),
        replace(exact, control_guidance_start=0.2),
        replace(exact, controlnet_interval=2),
        replace(exact, controlnet_interval=3),
        replace(exact, guidance_interval=2, controlnet_interval=2),
        *caches,
        replace(exact, **ays, guidance_end=0.5, controlnet_interval=2),
    ]
