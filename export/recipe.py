"""A recipe: the model and the parts that a user asks to export, with the names and digests of what was asked for."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundles.library import fitting, local_path, recipe_identity, short_name, source_identity, text_identity
from ..bundles.manifest import RecipeRecord
from ..conditions import CONDITIONS
from ..errors import UserError
from ..miniature import EMBEDDED
from .models import LORAS, MODELS, VAES
from .sources import mode_of

COMPONENTS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class Recipe:
    """What an export is asked for.

    Attributes:
        model: `miniature`, `miniature-lcm` (the same with its few-step LoRA fused), `miniature-controlnet` (with the
            ControlNets before their fine-tuning for consistency), a key of `MODELS`, or a source (sources.py): a
            diffusers folder with `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`, or one file in the
            original Stable Diffusion layout.
        controlnets: a source for each condition, or a key of `MODELS` for that model's; other conditions have the
            model's own.
        vae: a source that replaces the VAE, or a key of `VAES`.
        loras: `SOURCE` or `SOURCE:weight`, or a key of `LORAS`; fused into UNet and text encoder in this order.
        embeddings: textual inversions, `SOURCE` or `SOURCE:token`.
        extractors: as `controlnets`.
        variant: of the base model's weights, as diffusers has it: `fp16`; components that have none come without.
        config: the source of a single file's configs and tokenizer; None is Stable Diffusion 1.5's repository.

    Raises:
        UserError: a ControlNet or an extractor is for a condition that is not known.
    """

    model: str
    controlnets: Mapping[str, str | Path] = field(default_factory=dict)
    vae: str | None = None
    loras: Sequence[str] = ()
    embeddings: Sequence[str] = ()
    extractors: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        for condition in (*self.controlnets, *self.extractors):
            require_condition(condition)

    @property
    def name(self) -> str:
        """A short name for the model and what is put into it: what its bundles are called.

        Where short names do not say all (a place, an owner, another ControlNet, …), it ends in digits of `digest`.
        """
        put_in = [*self.loras, *([self.vae] if self.vae else []), *self.embeddings]
        name = "-".join(map(short_name, (self.model, *put_in)))
        known = self.loras_are_named and self.vae in (None, *VAES) and self.model in (*EMBEDDED, *MODELS)
        others = self.embeddings or self.controlnets or self.extractors or self.variant or self.config
        # The embedded `miniature-lcm` is not `miniature` with `--lora lcm`.
        taken = bool(put_in) and name in (*EMBEDDED, *MODELS)
        return fitting(name, "" if known and not others and not taken else self.digest)

    @property
    def loras_are_named(self) -> bool:
        """Whether every LoRA is one of the named ones."""
        return all(lora in LORAS for lora in self.loras)

    @property
    def identity(self) -> str:
        """SHA-256 of which model it is: by its name where that is known, else by its place."""
        return _identity(self.model, (*EMBEDDED, *MODELS))

    @property
    def digest(self) -> str:
        """SHA-256 of what was asked for; a local file or folder counts by where it is."""
        loras = [[_identity(name, LORAS), weight] for name, weight in map(parse_lora, self.loras)]
        embeddings = [[source_identity(name), token] for name, token in map(parse_embedding, self.embeddings)]
        parts = {
            "model": self.identity,
            "controlnets": {c: _identity(source, MODELS) for c, source in self.controlnets.items()},
            "vae": self.vae and _identity(self.vae, VAES),
            "loras": loras,
            "embeddings": embeddings,
            "extractors": {c: _identity(source, MODELS) for c, source in self.extractors.items()},
            "variant": self.variant,
            "config": self.config and source_identity(self.config),
        }
        return recipe_identity({key: value for key, value in parts.items() if value})

    def recorded(self) -> RecipeRecord:
        """What was asked for, for a bundle's manifest: of a local file or folder, the last part of its path alone."""

        def public(text: str | Path, names: Collection[str] = (), end: str = "") -> str:
            path = None if text in names else local_path(text)
            return f"{text if path is None else path.name or 'model'}{end}"

        def suffixed(text: str, name: str, names: Collection[str] = ()) -> str:
            return public(name, names, text.removeprefix(name))

        found: RecipeRecord = {"model": public(self.model, (*EMBEDDED, *MODELS))}
        if self.controlnets:
            found["controlnets"] = {c: public(source, MODELS) for c, source in self.controlnets.items()}
        if self.vae:
            found["vae"] = public(self.vae, VAES)
        if self.loras:
            found["loras"] = [suffixed(text, parse_lora(text)[0], LORAS) for text in self.loras]
        if self.embeddings:
            found["embeddings"] = [suffixed(text, parse_embedding(text)[0]) for text in self.embeddings]
        if self.extractors:
            found["extractors"] = {c: public(source, MODELS) for c, source in self.extractors.items()}
        if self.variant:
            found["variant"] = self.variant
        if self.config:
            found["config"] = public(self.config)
        return found

    def to_json(self) -> dict[str, Any]:
        """What was asked for, JSON-able, for another process of this machine: `Recipe(**…)` is the same again."""
        fields = {**asdict(self), "controlnets": {c: str(source) for c, source in self.controlnets.items()}}
        return {key: value for key, value in fields.items() if value}


def _identity(source: str | Path, names: Collection[str]) -> str:
    """Of a source that may also be one of `names`, which come before a local file or folder that is called so."""
    return text_identity(str(source)) if source in names else source_identity(source)


def require_condition(name: str) -> None:
    """Checks the name of a condition.

    Raises:
        UserError: there is no condition of that name.
    """
    if name not in CONDITIONS:
        raise UserError(f"unknown condition {name!r}: choose from {', '.join(CONDITIONS)}")


def parse_lora(text: str) -> tuple[str, float]:
    """`SOURCE` or `SOURCE:weight` → (source, weight); a weight is any finite number, 1 where there is none.

    Raises:
        UserError: the weight is no such number.
    """
    source, colon, weight = text.rpartition(":")
    # A colon may belong to a path: of a file that is there, or of a drive (C:\lora.safetensors).
    if not colon or mode_of(Path(text)) or "/" in weight or "\\" in weight:
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not source:
        raise UserError(f"{weight!r} is no weight for the LoRA {source!r}: write SOURCE:0.8, or SOURCE alone for 1")
    return source, number


def parse_embedding(text: str) -> tuple[str, str | None]:
    """`SOURCE` or `SOURCE:token` → (source, token), None where there is no token.

    Raises:
        UserError: the token cannot be one.
    """
    source, colon, token = text.rpartition(":")
    # A colon may belong to a path: of a file that is there, or of a drive (C:\cat.pt).
    if not colon or mode_of(Path(text)) or "/" in token or "\\" in token:
        return text, None
    if not source or not token or token.split() != [token]:
        raise UserError(f"{token!r} cannot be the word for an embedding in {text!r}: write SOURCE:word")
    return source, token
