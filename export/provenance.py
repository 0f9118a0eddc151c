"""bundle → the checkpoint that it was exported from, for what compares the two."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..bundles.bundle import Bundle
from ..bundles.library import text_identity
from ..errors import UserError
from ..messages import printable
from .checkpoint import Checkpoint
from .recipe import Recipe


def find_source_checkpoint(
    bundle: Bundle, model: str | None = None, controlnets: Mapping[str, str | Path] | None = None
) -> Checkpoint:
    """The checkpoint that a bundle was exported from, its weights compared by their digests.

    A bundle knows local sources by the last part of their path alone. So a model's place is asked for, and other local
    parts (a LoRA, a VAE) are found in the folder where this runs.

    Args:
        model: where it is; None does for what has a name everywhere: embedded and named models, and the hub's.
        controlnets: those that are not where they were.

    Raises:
        UserError: it cannot be found, or has other weights.
    """
    m = bundle.manifest
    recorded: dict[str, Any] = {"model": "", **m.recipe}
    named = str(recorded["model"])
    if model is None and (not named or text_identity(named) != m.identity):
        raise UserError(
            f"{bundle.folder} was exported from a local model, {printable(repr(named))}: say where it is with "
            "--model PATH"
        )
    recipe = Recipe(**recorded)
    recipe = replace(recipe, model=model or named, controlnets={**recipe.controlnets, **(controlnets or {})})
    checkpoint = Checkpoint(**asdict(recipe))
    if checkpoint.fingerprint() != m.base:
        raise UserError(f"{bundle.folder} was not exported from {printable(recipe.model)}: its weights are others")
    for condition, entry in m.conditions.items():
        advice = f"say where it is with --controlnet {condition}=PATH"
        try:
            fingerprint = checkpoint.controlnet_fingerprint(condition)
        except UserError as e:
            raise UserError(f"{e}; {advice}") from None
        if fingerprint != entry.get("controlnet"):
            uri = checkpoint.resolved.controlnet(condition).uri
            raise UserError(f"the {condition} ControlNet of {bundle.folder} is not {uri}: {advice}")
    return checkpoint
