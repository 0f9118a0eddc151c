"""Where the files of each part of a recipe are: its text becomes a folder or file of this machine or of the hub."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..conditions import CONDITIONS
from ..errors import UserError
from ..messages import printable
from ..miniature import EMBEDDED, MODEL_FOLDER
from .models import BASE, LORAS, MODELS, VAES, NamedModel
from .recipe import COMPONENTS, Recipe, parse_embedding, parse_lora, require_condition
from .sources import Finder, LocalTree, Source
from .weight_files import SUFFIXES, Library, variants_of

logger = logging.getLogger(__name__)

CONFIG = "config.json"
# What PEFT's own save_pretrained writes.
ADAPTER = "adapter_model"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """A LoRA to fuse.

    Attributes:
        source: as the user wrote it, for messages.
        weight: what its change to the weights is multiplied by.
        config: PEFT's `adapter_config.json` of the file, where there is one.
    """

    source: str
    file: Path
    weight: float = 1.0
    config: Path | None = None


class ResolvedSources:
    """Where each part of a recipe is. Nothing but lists of files is fetched before a file is asked for.

    Raises:
        UserError: the model or its VAE cannot be found.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._finder = Finder()
        self._without_variant: list[Source] = []  # of which it was said
        self._embedded = EMBEDDED.get(recipe.model)
        self._named = MODELS.get(recipe.model)
        self.model = self._find_model()
        if recipe.config and not self.model.file:
            raise UserError(f"--config is for a model in one file: {recipe.model} has its own configs")
        needs = f"configs and tokenizer of {recipe.model}"
        self._configs = self._find(recipe.config or BASE, needs) if self.model.file else self.model
        self._vae = self._find(VAES.get(recipe.vae, recipe.vae), "VAE") if recipe.vae else None

    @property
    def single_file(self) -> bool:
        """Whether the model is one file."""
        return self.model.file is not None

    @property
    def conditions(self) -> list[str]:
        """The conditions that there may be a ControlNet for: a named model says which, others are asked."""
        return list(self._named.controlnets if self._named else CONDITIONS)

    @property
    def root(self) -> Source:
        """The folder that holds the components' folders."""
        return self._configs

    def component(self, name: str) -> Source:
        """The folder of a component's config, `unet`, `vae`, `text_encoder`, `tokenizer` or `scheduler`."""
        if name == "vae" and self._vae is not None and not self._vae.file:
            return self._other_vae()
        return self._configs.sub(name)

    def weights_source(self, component: str) -> Source:
        """What holds a component's weights: its folder, or a single file."""
        if component == "vae" and self._vae is not None:
            return self._other_vae()
        return self.model if self.model.file else self.component(component)

    def weights(self, component: str) -> tuple[Path, ...]:
        """The files of a component's weights.

        Raises:
            UserError: there are none, or none of the base model's components has the variant asked for.
        """
        library = library_of(component)
        return self.weights_source(component).weights(self._variants.get(component), library)

    @cached_property
    def _variants(self) -> dict[str, str]:
        """The variant to take of each component of the base model, as diffusers has it: the others come without."""
        variant = self._recipe.variant
        if variant is None:
            return {}
        if self.model.file:
            raise UserError(f"{self._recipe.model} is one file, which has no variants: leave --variant out")
        own = {c: self.weights_source(c) for c in COMPONENTS}
        own = {c: source for c, source in own.items() if source.tree == self.model.tree and not source.file}
        found = [c for c, source in own.items() if source.has_variant(variant, library_of(c))]
        if not found:
            there = sorted(set().union(*(variants_of(source.files()) for source in own.values())))
            instead = f", only {', '.join(there)}: choose with --variant" if there else ": leave --variant out"
            shown = printable(repr(variant), 80)
            raise UserError(f"there are no weights of variant {shown} in {self.model.location}{instead}")
        if without := [c for c in own if c not in found]:
            logger.info(f"{' and '.join(without)} of {self._recipe.model} have no {variant} weights: others are taken")
        return dict.fromkeys(found, variant)

    def controlnet(self, condition: str) -> Source:
        """The folder of the condition's ControlNet, or a file that holds it whole.

        Raises:
            UserError: the condition is unknown or no ControlNet was found.
        """
        require_condition(condition)
        given = self._recipe.controlnets.get(condition)
        if named := MODELS.get(str(given)) if given else self._named:
            given = _of_named(named, condition, str(given or self._recipe.model))
        folder = self._embedded.controlnets if self._embedded else "controlnet"
        own = self.model.sub(folder).sub(condition)
        place = self._find(given, f"{condition} ControlNet") if given else own
        # Published ControlNet++ folders hold the model itself or one level down.
        for candidate in (place, place.sub("controlnet")):
            if place.file or candidate.has(CONFIG):
                return candidate
        raise UserError(
            f"no ControlNet for {condition!r} at {place.location}: give one with --controlnet {condition}=PATH, or "
            "ControlNet++'s with --controlnet sd15"
        )

    def controlnet_weights(self, condition: str) -> tuple[Path, ...]:
        """The weights of a condition's ControlNet."""
        source = self.controlnet(condition)
        variant = self._recipe.variant
        if variant is None or source.file:
            return source.weights()
        if source.has_variant(variant):
            return source.weights(variant)
        # A variant of the base model need not be one of the ControlNet.
        if source not in self._without_variant:
            self._without_variant.append(source)
            logger.info(f"the ControlNet {source.uri} has no {variant} weights: others are taken")
        return source.weights()

    def palette(self, condition: str) -> str:
        """What colors the condition's ControlNet reads: `ade20k` or `coco-stuff`."""
        given = self._recipe.controlnets.get(condition)
        named = MODELS.get(str(given)) if given else self._named
        return named.palettes.get(condition, "ade20k") if named else "ade20k"

    def extractor(self, condition: str) -> Source | None:
        """The condition's extractor: the one asked for, a named model's, or the model's own; None where it has none."""
        given = self._recipe.extractors.get(condition)
        if given is None and self._named is None:
            own = self.model.sub("extractors").sub(condition)
            return own if own.has(CONFIG) else None
        named = MODELS.get(given) if given else self._named
        published = named.extractors.get(condition) if named else given
        return self._find(published, f"{condition} extractor") if published else None

    @cached_property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs to fuse, an embedded model's own first."""
        own = self._embedded.lora if self._embedded else None
        found = [Lora("lcm", own, 1.0)] if own else []
        for text in self._recipe.loras:
            name, weight = parse_lora(text)
            source = self._find(LORAS[name].source if name in LORAS else name, "LoRA")
            file = _one_file(source, "LoRA", "pytorch_lora_weights", ADAPTER)
            is_adapter = file.stem == ADAPTER and source.beside.has(ADAPTER_CONFIG)
            found.append(Lora(text, file, weight, source.beside.get(ADAPTER_CONFIG)[0] if is_adapter else None))
        return tuple(found)

    @cached_property
    def embeddings(self) -> tuple[tuple[Path, str | None], ...]:
        """The files of textual inversions, with the token that each was asked for under."""
        found = []
        for text in self._recipe.embeddings:
            name, token = parse_embedding(text)
            source = self._find(name, "textual inversion")
            found.append((_one_file(source, "textual inversion", "learned_embeds"), token))
        return tuple(found)

    def lora_defaults(self) -> dict[str, Any]:
        """The settings that the LoRAs are made for, where they are known by name."""
        defaults: dict[str, Any] = {}
        for text in self._recipe.loras:
            name, _ = parse_lora(text)
            for key, lora in LORAS.items():
                if name in (key, lora.source):
                    defaults |= lora.defaults
        return defaults

    def _find(self, text: str | Path, what: str) -> Source:
        """Finds a source.

        Raises:
            UserError: there is no such source; the message begins with `what`.
        """
        try:
            return self._finder.find(text)
        except UserError as e:
            raise UserError(f"{what}: {e}") from e

    def _find_model(self) -> Source:
        model = self._recipe.model
        if self._embedded:
            return Source(LocalTree(MODEL_FOLDER))
        try:
            return self._finder.find(self._named.base if self._named else model)
        except UserError as e:
            if self._named or "/" in model:
                raise
            names = ", ".join((*EMBEDDED, *MODELS))
            raise UserError(
                f"no model {printable(repr(model), 120)}: choose {names}, a local folder or file, or a hub repository"
            ) from e

    def _other_vae(self) -> Source:
        """The VAE that replaces the model's: its own folder, that of a whole pipeline, or a file."""
        assert self._vae is not None
        within = self._vae.sub("vae")
        return within if not self._vae.file and within.has(CONFIG) and not self._vae.has(CONFIG) else self._vae


def _of_named(named: NamedModel, condition: str, name: str) -> str:
    if condition not in named.controlnets:
        raise UserError(f"{name} has no {condition!r}, only {', '.join(named.controlnets)}")
    return named.controlnets[condition]


def library_of(component: str) -> Library:
    """Whose module a component is, which says how its files are called."""
    return "transformers" if component == "text_encoder" else "diffusers"


def _one_file(source: Source, what: str, *usual: str) -> Path:
    """The file that is meant: the one given, a usual one of a folder, or the only one there."""
    if source.file:
        return source.get(source.file)[0]
    own = [name for name in source.files() if name.endswith(SUFFIXES)]
    usuals = [f"{stem}{suffix}" for stem in usual for suffix in SUFFIXES if f"{stem}{suffix}" in own]
    if not usuals and len(own) != 1:
        there = f"several: {', '.join(printable(name, 80) for name in own[:4])}; name one" if own else "none"
        raise UserError(f"{printable(source.uri)} should hold one {what} file, and holds {there}")
    return source.get((usuals or own)[0])[0]
