"""bundle → the checkpoint that it was exported from, for what compares the two."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ..bundle import Bundle
from ..errors import UserError
from .checkpoint import Checkpoint
from .models import MODELS
from .recipe import EMBEDDED, Recipe


def checkpoint_of(
    bundle: Bundle, model: str | None = None, controlnets: Mapping[str, str | Path] | None = None
) -> Checkpoint:
    """The checkpoint that a bundle was exported from, its weights compared by their digests.

    Args:
        model: where it is; None does for what has a name everywhere: embedded and named models, and the hub's.
        controlnets: those that are not where they were.
    Raises: UserError where it cannot be found, or has other weights.
    """
    recipe = Recipe(**bundle.manifest.recipe)
    if model is None and not _everywhere(recipe.model):
        raise UserError(
            f"{bundle.folder} was exported from a folder {recipe.model!r}: say where it is with --model PATH"
        )
    recipe = replace(recipe, model=model or recipe.model, controlnets={**recipe.controlnets, **(controlnets or {})})
    checkpoint = Checkpoint(**asdict(recipe))
    if checkpoint.fingerprint() != bundle.manifest.base:
        raise UserError(f"{bundle.folder} was not exported from {recipe.model}: its weights are others")
    for condition, recorded in bundle.manifest.conditions.items():
        if checkpoint.controlnet_fingerprint(condition) != recorded.get("controlnet"):
            raise UserError(
                f"the {condition} ControlNet of {bundle.folder} is not "
                f"{checkpoint.places.controlnet(condition).origin}: say where it is with --controlnet {condition}=PATH"
            )
    return checkpoint


def _everywhere(model: str) -> bool:
    return model in EMBEDDED or model in MODELS or ("/" in model.strip("/.") and not Path(model).exists())
