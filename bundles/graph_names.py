"""What the graphs of a bundle are called, and which of them a request needs."""

from collections.abc import Container, Iterable

OF_A_CONDITION = ("extractor", "hint", "text_kv", "time_embeds", "controlnet")
"""Graphs that a condition may have of its own, `<role>_<condition>`."""

SHALLOW = "unet_shallow"
"""The graph of a UNet's outermost layer, which bundles have that were exported for it."""

OF_THE_UNET = ("text_kv", "time_embeds", SHALLOW, "unet", "unet_encoder", "unet_decoder")
"""Graphs with weights of the UNet, as far as a bundle has them."""

BESIDE = ("unet_encoder",)
"""Graphs that may run beside a ControlNet."""

STEPS_AT_ONCE = 16
"""Steps of a schedule whose time embeddings one launch computes, so that a plan has one size for any schedule."""

_ALWAYS = ("text_encoder", *(name for name in OF_THE_UNET if name != SHALLOW), "update", "vae_decoder")


def condition_of(graph: str) -> str:
    """The condition that a graph belongs to; empty where it serves every condition."""
    for role in OF_A_CONDITION:
        if graph.startswith(f"{role}_"):
            return graph.removeprefix(f"{role}_")
    return ""


def always_needed(graphs: Container[str]) -> list[str]:
    """Of these graphs of a bundle, those that every request needs."""
    return [name for name in _ALWAYS if name in graphs]


def needed_for(conditions: Iterable[str], graphs: Container[str]) -> list[str]:
    """Of these graphs of a bundle, those that a condition adds to a request; a bundle without them lacks the rest.

    Its extractor is no part of a request.
    """
    roles = [role for role in OF_A_CONDITION if role != "extractor"]
    required = ("hint", "controlnet")
    names = ((role, f"{role}_{condition}") for condition in conditions for role in roles)
    return [name for role, name in names if role in required or name in graphs]
