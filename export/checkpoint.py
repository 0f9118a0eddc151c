"""A checkpoint: PyTorch weights of SD-1.x architecture, opened one component at a time."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import sha256_of
from ..messages import one_line, printable
from ..miniature import EMBEDDED
from ..schema import read_object
from .architecture import require_fitting, require_sd1_configs, require_sd1_file
from .configs import checked
from .recipe import COMPONENTS, Recipe
from .resolved_sources import CONFIG, ResolvedSources
from .sources import LocalTree, Source

if TYPE_CHECKING:
    # Only for types: to look at a checkpoint without loading its weights takes no PyTorch, which is slow to import.
    import torch
    from torch import Tensor, nn

    from .embeddings import Embedding
    from .lora import LoraMatch

_KINDS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}


class Checkpoint:
    """A base model with what is put into it, and its ControlNets and extractors.

    Args:
        model, controlnets, parts: of a `Recipe`, which says what they may be.

    Raises:
        UserError: the model cannot be found, or is of another architecture.
    """

    def __init__(self, model: str, controlnets: Mapping[str, str | Path] | None = None, **parts: Any) -> None:
        self.recipe = Recipe(model, controlnets or {}, **parts)
        self.resolved = ResolvedSources(self.recipe)
        self._configs: dict[str, dict[str, Any]] = {}
        self._require_configs()

    @property
    def name(self) -> str:
        """The model's name, as its bundle is called."""
        return self.recipe.name

    def config(self, component: str) -> dict[str, Any]:
        """What is read of the component's `config.json`, checked (the scheduler's `scheduler_config.json`, whole).

        Raises:
            UserError: there is none, or it has a value that cannot be exported.
        """
        if component == "scheduler":
            return self._json(self.resolved.component(component), "scheduler_config.json", component)
        if component not in self._configs:
            raw, what = self._json(self.resolved.component(component), CONFIG, component), self._what(component)
            kind = self._kind(component, raw, what)
            self._configs[component] = {"_class_name": kind, **checked(kind, raw, what)}
        return self._configs[component]

    def setting(self, component: str, key: str) -> Any:
        """A value of the component's config that no model of SD-1.x architecture is without."""
        value = self.config(component).get(key)
        if value is None:
            place = self.resolved.component(component).uri
            raise UserError(f"{place}/{CONFIG} has no {key}: is this an SD-1.x model?")
        return value

    def size(self, asked: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels of the images: what was asked for, or the UNet's own sample size.

        Raises:
            UserError: it cannot be used.
        """
        factor = self.vae_scale_factor
        if asked is None:
            own = self.config("unet").get("sample_size", 64)
            height, width = (own, own) if isinstance(own, int) else own
            size, advice = (width * factor, height * factor), ": give one with --size"
        else:
            size, advice = asked, ""
        if any(s % factor or not 64 <= s <= 2048 for s in size):
            raise UserError(
                f"size {size[0]}x{size[1]} cannot be used: width and height are multiples of {factor}, "
                f"64 to 2048{advice}"
            )
        return size

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent in each direction."""
        tiny = self.config("vae").get("decoder_block_out_channels")  # what AutoencoderTiny calls them
        factor: int = 2 ** (len(tiny or self.setting("vae", "block_out_channels")) - 1)
        return factor

    def examples(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's defaults (`guidance_scale`, `num_inference_steps`, `scheduler`) and its examples by condition."""
        folder = self.resolved.model.sub("examples")
        content = self._json(folder, "examples.json", "examples") if folder.has("examples.json") else {}
        examples = content.get("examples", {})
        for condition, example in examples.items():
            if not folder.has(example.get("image", "")):
                raise UserError(
                    f"{folder.uri}/examples.json names no image for {condition!r} that is there: correct it"
                )
        defaults = content.get("defaults", {})
        embedded = EMBEDDED.get(self.recipe.model)
        if embedded and embedded.lora:
            defaults = {**defaults, **self._json(Source(LocalTree(embedded.lora.parent)), "defaults.json", "defaults")}
        return {**defaults, **self.resolved.lora_defaults()}, examples

    def example_image(self, name: str) -> Path:
        """The image file of one of `examples`."""
        return self.resolved.model.sub("examples").get(name)[0]

    def check_controlnet(self, condition: str) -> None:
        """Checks the config of the condition's ControlNet.

        Raises:
            UserError: there is no ControlNet of the condition, or it does not fit the UNet.
        """
        self._controlnet_config(condition)

    def sources(self) -> dict[str, str]:
        """Where each component of the base model comes from."""
        found = {component: self.resolved.weights_source(component).uri for component in COMPONENTS}
        return {**found, "tokenizer": self.resolved.component("tokenizer").uri}

    # Digests

    def fingerprint(self) -> str:
        """SHA-256 over the weights that every condition shares, and what is put into them."""
        if self.resolved.single_file:
            other = [("vae", self.resolved.weights("vae"))] if self.recipe.vae else []
            digest = _digest(("single", self.resolved.weights("unet")), *other)
        else:
            digest = _digest(*((component, self.resolved.weights(component)) for component in COMPONENTS))
        for lora in self.resolved.loras:
            settings = f" {sha256_of(lora.config)}" if lora.config else ""
            digest.update(f"lora {sha256_of(lora.file)} {lora.weight!r}{settings}\n".encode())
        for file, token in self.resolved.embeddings:
            digest.update(f"embedding {token} {sha256_of(file)}\n".encode())
        return digest.hexdigest()

    def controlnet_fingerprint(self, condition: str) -> str:
        """SHA-256 over the weights of the condition's ControlNet."""
        return _digest(("controlnet", self.resolved.controlnet_weights(condition))).hexdigest()

    # Modules

    def empty(self, component: str) -> "nn.Module":
        """`unet`, `vae`, `text_encoder` or `controlnet_<condition>` as its config says, on the meta device."""
        import diffusers
        import transformers

        from .weights import make_empty

        of_condition = component.startswith("controlnet_")
        condition = component.removeprefix("controlnet_")
        config = self._controlnet_config(condition) if of_condition else self.config(component)

        def make() -> "nn.Module":
            if component == "text_encoder":
                own = {key: value for key, value in config.items() if key not in ("_class_name", "architectures")}
                return transformers.CLIPTextModel._from_config(transformers.CLIPTextConfig(**own))
            return getattr(diffusers, config["_class_name"]).from_config(config)

        try:
            return make_empty(make)
        except Exception as e:  # whatever diffusers and transformers raise, the user needs one line
            raise UserError(f"the {CONFIG} of {self._what(component)} cannot be used: {one_line(e)}") from e

    def unet(self, dtype: "torch.dtype") -> "nn.Module":
        """With the LoRAs fused."""
        unet = self._load("unet", dtype)
        self._fuse(unet, "unet")
        return unet

    def vae(self, dtype: "torch.dtype") -> "nn.Module":
        """An AutoencoderKL or an AutoencoderTiny."""
        return self._load("vae", dtype)

    def text_encoder(self, dtype: "torch.dtype") -> "nn.Module":
        """With the LoRAs fused and the vectors of the textual inversions."""
        text_encoder = self._load("text_encoder", dtype)
        self._fuse(text_encoder, "text_encoder")
        if self.resolved.embeddings:
            from .embeddings import add_embeddings

            add_embeddings(self._plain_tokenizer(), text_encoder, self.embeddings())
        return text_encoder

    def tokenizer(self) -> Any:
        """With the tokens of the textual inversions."""
        tokenizer = self._plain_tokenizer()
        if self.resolved.embeddings:
            from .embeddings import add_tokens

            add_tokens(tokenizer, self.embeddings())
        return tokenizer

    def controlnet(self, condition: str, dtype: "torch.dtype") -> "nn.Module":
        """Loads the condition's ControlNet.

        Raises:
            UserError: it does not fit the UNet.
        """
        self.check_controlnet(condition)
        return self._load(f"controlnet_{condition}", dtype)

    def embeddings(self) -> "list[Embedding]":
        """The textual inversions.

        Raises:
            UserError: one does not fit the text encoder.
        """
        if not self.resolved.embeddings:
            return []  # without PyTorch
        from .embeddings import check_width, read_embedding

        found = [read_embedding(file, token) for file, token in self.resolved.embeddings]
        check_width(found, self.setting("text_encoder", "hidden_size"))
        return found

    def match_loras(self) -> "list[LoraMatch]":
        """How each LoRA fits, before any weights of the base model are read.

        Raises:
            UserError: one does not.
        """
        from .lora import match_loras

        return (
            match_loras(self.resolved.loras, self.empty("unet"), self.empty("text_encoder"))
            if self.resolved.loras
            else []
        )

    def check_weights(self, components: Iterable[str]) -> None:
        """Looks at the names and shapes of weights, which takes no time, before what takes minutes begins.

        Their numbers are looked at too, which reads the files once: under 1 s a gigabyte, which a digest of the same
        files has brought into memory.

        Args:
            components: as `empty`.

        Raises:
            UserError: weights are missing, damaged, not those of their config, or NaN or Inf.
        """
        from .weights import check_finite, check_weights

        for component in components:
            module = self.empty(component)
            state, what = self._weights(component, module, None)
            check_weights(module, state, what)
            check_finite({key: state[key] for key in module.state_dict()}, what)

    def check_tokenizer(self) -> None:
        """Whether the runtime can read the tokenizer, and the text encoder has a row for every token.

        Raises:
            UserError: the tokenizer cannot be read, or has more tokens than the text encoder has rows.
        """
        from .clip_tokenizer import check_tokenizer

        what = f"the tokenizer {self.resolved.component('tokenizer').uri}"
        check_tokenizer(self._plain_tokenizer(), self.setting("text_encoder", "vocab_size"), what)

    def _load(self, component: str, dtype: "torch.dtype") -> "nn.Module":
        from .weights import load_weights

        module = self.empty(component)
        return load_weights(module, *self._weights(component, module, dtype), dtype)

    def _weights(
        self, component: str, module: "nn.Module", dtype: "torch.dtype | None"
    ) -> "tuple[dict[str, Tensor], str]":
        """The weights under the module's names, and whose they are."""
        from .layouts import as_module_names
        from .weights import read_weights

        if component.startswith("controlnet_"):
            condition = component.removeprefix("controlnet_")
            place = self.resolved.controlnet(condition)
            if place.file:
                state = self._controlnet_file(condition)
            else:
                state = read_weights(self.resolved.controlnet_weights(condition), dtype)
            return as_module_names(state, module), f"the ControlNet {place.uri}"
        source = self.resolved.weights_source(component)
        # A single file has more in it than this component: what is not used is best left unread.
        state = read_weights(self.resolved.weights(component), None if source.file else dtype)
        if source.file:
            state = self._converted(component, state, source)
        return as_module_names(state, module), f"the {component} of {source.uri}"

    def _converted(self, component: str, state: "dict[str, Tensor]", source: Source) -> "dict[str, Tensor]":
        """What a single file holds of a component."""
        from . import layouts

        if source == self.resolved.model:
            require_sd1_file(state, source.uri, vae=not self.recipe.vae)
        if component == "unet":
            return layouts.unet_of(state, self.config("unet"))
        return layouts.vae_of(state, self.config("vae")) if component == "vae" else layouts.text_encoder_of(state)

    def _controlnet_file(self, condition: str) -> "dict[str, Tensor]":
        """The weights of a ControlNet in one file, in diffusers' names."""
        from .controlnet_file import controlnet_of
        from .weights import read_weights

        place = self.resolved.controlnet(condition)
        state = read_weights(self.resolved.controlnet_weights(condition))
        return controlnet_of(state, self.setting("unet", "layers_per_block"), f"the ControlNet {place.uri}")

    def _controlnet_config(self, condition: str) -> dict[str, Any]:
        """The `config.json` of a ControlNet; of one in a file without it, what the weights' shapes say."""
        if (name := f"controlnet_{condition}") not in self._configs:
            place = self.resolved.controlnet(condition)
            if place.file:
                from .controlnet_file import config_of

                folder = place.beside
                beside = self._json(folder, CONFIG, "ControlNet") if folder.has(CONFIG) else None
                what = f"the ControlNet {place.uri}"
                config = config_of(self._controlnet_file(condition), self.config("unet"), beside, what)
            else:
                config = self._json(place, CONFIG, "ControlNet")
            what = f"the ControlNet at {place.uri}"
            require_fitting(config, self.config("unet"), what, self.vae_scale_factor)
            self._configs[name] = {"_class_name": "ControlNetModel", **checked("ControlNetModel", config, what)}
        return self._configs[name]

    def _fuse(self, module: "nn.Module", component: str) -> None:
        if self.resolved.loras:
            from .lora import fuse

            fuse(module, self.resolved.loras, component)

    def _plain_tokenizer(self) -> Any:
        from .clip_tokenizer import load_tokenizer

        return load_tokenizer(self.resolved.component("tokenizer"), self.recipe.model)

    def _require_configs(self) -> None:
        """Checks what configs tell of whether the model can be exported.

        Raises:
            UserError: the model, or a component of it, cannot be exported.
        """
        root, model = self.resolved.root, self.recipe.model
        index = self._json(root, "model_index.json", "index") if root.has("model_index.json") else {"unet": []}
        if "unet" not in index:
            kind = printable(index.get("_class_name", "pipeline of another kind"), 60)
            raise UserError(f"{model} is a {kind} without a UNet: only SD-1.x models can be exported")
        unet, text_encoder = (self._json(self.resolved.component(c), CONFIG, c) for c in ("unet", "text_encoder"))
        require_sd1_configs(unet, text_encoder, model)
        for component in COMPONENTS:
            self.config(component)

    def _what(self, component: str) -> str:
        """Whose a component is, for messages."""
        if component.startswith("controlnet_"):
            return f"the ControlNet {self.resolved.controlnet(component.removeprefix('controlnet_')).uri}"
        return f"the {component} of {self.recipe.model}"

    def _kind(self, component: str, config: Mapping[str, Any], what: str) -> str:
        """The class of a component in diffusers or transformers.

        Raises:
            UserError: it is none that the component may have.
        """
        kinds = _KINDS[component]
        kind = config.get("_class_name", kinds[0])
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"{what} is a {printable(kind, 60)}, not a {kinds[0]}: check what it is")
        return kind

    def _json(self, folder: Source, name: str, what: str) -> dict[str, Any]:
        if not folder.has(name):
            place = f"{folder.uri}/{name}{folder.tree.partial_listing_note}"
            raise UserError(f"{self.recipe.model} has no {what}: there is no {place}; is this a diffusers folder?")
        return read_object(folder.get(name)[0])


def _digest(*components: tuple[str, Iterable[Path]]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for component, files in components:
        for path in files:
            digest.update(f"{component}/{path.name} {sha256_of(path)}\n".encode())
    return digest
