"""A checkpoint: PyTorch weights in the diffusers layout, opened one component at a time."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, sha256_of
from ..conditions import CONDITIONS
from ..errors import UserError

if TYPE_CHECKING:
    # Only for types: to look at a checkpoint without loading its weights takes no PyTorch, which is slow to import.
    import torch
    from torch import nn

MINIATURE = Path(__file__).parent.parent / "miniature" / "model"


@dataclass(frozen=True)
class Embedded:
    """A variant of the embedded model: the folder of its ControlNets, and the LoRA that is fused into its UNet."""

    controlnets: str = "controlnet"
    lora: Path | None = None


EMBEDDED = {
    "miniature": Embedded(),
    "miniature-lcm": Embedded(lora=MINIATURE / "lora" / "lcm" / "pytorch_lora_weights.safetensors"),
    "miniature-controlnet": Embedded(controlnets="controlnet-plain"),
}

_WEIGHTS = ("*.safetensors", "*.bin")


class Checkpoint:
    """A local folder of SD-1.x architecture in the diffusers layout, with its ControlNets.

    Args:
        model: `miniature`, `miniature-lcm` (the same with its few-step LoRA fused), `miniature-controlnet` (with the
            ControlNets before their fine-tuning for consistency), or the path of a folder with `unet/`, `vae/`,
            `text_encoder/`, `tokenizer/`, `scheduler/`.
        controlnets: ControlNet folders by condition; others are looked for in the model's own `controlnet/<condition>`.
    Raises: UserError where the model is not such a folder.
    """

    def __init__(self, model: str, controlnets: Mapping[str, Path] | None = None) -> None:
        self.name = model
        self.folder = MINIATURE if model in EMBEDDED else Path(model)
        embedded = EMBEDDED.get(model, Embedded())
        self.lora = embedded.lora
        self._controlnets = self.folder / embedded.controlnets
        self.controlnets = dict(controlnets or {})
        if not self.folder.is_dir():
            raise UserError(
                f"no model {model!r}: give `miniature` or the path of a local diffusers folder "
                "(hub ids are not supported yet: download the repository first)"
            )
        config = self.config("unet")
        if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
            raise UserError(f"{model} has a {config['_class_name']}; only SD-1.x models can be exported")
        if config.get("addition_embed_type") or config.get("in_channels", 4) != 4:
            raise UserError(f"{model} is not of SD-1.x architecture (SDXL or inpainting?); only SD-1.x can be exported")
        if config.get("time_cond_proj_dim"):
            raise UserError(f"{model} is a guidance-distilled UNet (time_cond_proj_dim), which is not supported yet")

    def config(self, component: str) -> dict[str, Any]:
        """The component's `config.json` (the scheduler's `scheduler_config.json`)."""
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return _read_json(self.folder / component / name, f"{self.name} has no {component}")

    def setting(self, component: str, key: str) -> Any:
        """A value of the component's config that no model of SD-1.x architecture is without."""
        value = self.config(component).get(key)
        if value is None:
            raise UserError(f"{self.folder / component / 'config.json'} has no {key}: is this an SD-1.x model?")
        return value

    def unet(self, dtype: "torch.dtype") -> "nn.Module":
        from diffusers import UNet2DConditionModel

        folder = self.folder / "unet"
        unet = self._load("unet", lambda: UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype))
        if self.lora is not None:
            from .lora import fuse_lora

            fuse_lora(unet, self.lora)
        return unet

    def vae(self, dtype: "torch.dtype") -> "nn.Module":
        from diffusers import AutoencoderKL

        return self._load("vae", lambda: AutoencoderKL.from_pretrained(self.folder / "vae", torch_dtype=dtype))

    def text_encoder(self, dtype: "torch.dtype") -> "nn.Module":
        from transformers import CLIPTextModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would stand in the middle of the export's own lines
        folder = self.folder / "text_encoder"
        return self._load("text_encoder", lambda: CLIPTextModel.from_pretrained(folder, dtype=dtype))

    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return self._load("tokenizer", lambda: CLIPTokenizer.from_pretrained(self.folder / "tokenizer"))

    def controlnet_folder(self, condition: str) -> Path:
        """Where the condition's ControlNet is.

        Raises: UserError where the condition is unknown or no ControlNet was found.
        """
        if condition not in CONDITIONS:
            raise UserError(f"unknown condition {condition!r}: choose from {', '.join(CONDITIONS)}")
        folder = self.controlnets.get(condition, self._controlnets / condition)
        # Published ControlNet++ folders hold the model itself or one level down.
        for candidate in (folder, folder / "controlnet"):
            if (candidate / "config.json").is_file():
                return candidate
        raise UserError(f"no ControlNet for {condition!r} at {folder}: give one with --controlnet {condition}=PATH")

    def controlnet(self, condition: str, dtype: "torch.dtype") -> "nn.Module":
        """Raises: UserError where it does not fit the UNet."""
        from diffusers import ControlNetModel

        folder = self.controlnet_folder(condition)
        model = self._load(
            f"the {condition} ControlNet", lambda: ControlNetModel.from_pretrained(folder, torch_dtype=dtype)
        )
        unet = self.config("unet")
        for key in ("block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types"):
            ours, theirs = model.config[key], unet.get(key, model.config[key])
            if (list(ours) if isinstance(ours, list | tuple) else ours) != theirs:
                raise UserError(f"the ControlNet at {folder} does not fit this UNet: {key} is {ours}, not {theirs}")
        if model.config.global_pool_conditions:
            raise UserError(f"the ControlNet at {folder} has global_pool_conditions, which is not supported")
        return model

    def extractor_folder(self, condition: str) -> Path | None:
        """Where the condition's extractor is, None where the model has none."""
        folder = self.folder / "extractors" / condition
        return folder if (folder / "config.json").is_file() else None

    def examples(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's defaults (`guidance_scale`, `num_inference_steps`, `scheduler`) and its examples by condition."""
        path = self.folder / "examples" / "examples.json"
        if not path.is_file():
            return {}, {}
        content = _read_json(path, "")
        examples = content.get("examples", {})
        for condition, example in examples.items():
            if not (path.parent / example.get("image", "")).is_file():
                raise UserError(f"{path} names no image for {condition!r} that is there: correct it")
        defaults = content.get("defaults", {})
        if self.lora is not None:
            defaults = {**defaults, **_read_json(self.lora.with_name("defaults.json"), self.name)}
        return defaults, examples

    def fingerprint(self) -> str:
        """SHA-256 over the weights that every condition shares: two bundles of one base model have the same."""
        lora = [self.lora.parent] if self.lora else []
        return _digest(*(self.folder / component for component in ("unet", "vae", "text_encoder")), *lora)

    def controlnet_fingerprint(self, condition: str) -> str:
        """SHA-256 over the weights of the condition's ControlNet."""
        return _digest(self.controlnet_folder(condition))

    def size(self, asked: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels of the images: what was asked for, or the UNet's own sample size.

        Raises: UserError where it cannot be used.
        """
        factor = self.vae_scale_factor
        if asked is None:
            own = self.config("unet").get("sample_size") or 64
            height, width = (own, own) if isinstance(own, int) else own
            return width * factor, height * factor
        if any(s % factor or not 64 <= s <= 2048 for s in asked):
            raise UserError(
                f"size {asked[0]}x{asked[1]} cannot be used: width and height are multiples of {factor}, 64 to 2048"
            )
        return asked

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent in each direction."""
        factor: int = 2 ** (len(self.setting("vae", "block_out_channels")) - 1)
        return factor

    def _load(self, what: str, load: Callable[[], Any]) -> Any:
        try:
            loaded = load()
        except Exception as e:  # whatever diffusers, transformers or safetensors raise, the user needs one line
            reason = " ".join(str(e).split())[:300]
            raise UserError(
                f"cannot load {what} of {self.name}: {reason or type(e).__name__}; check that its files are whole"
            ) from e
        if hasattr(loaded, "requires_grad_"):  # a module, not the tokenizer
            loaded.eval().requires_grad_(False)
        return loaded


def checkpoint_of(
    bundle: Bundle, model: str | None = None, controlnets: Mapping[str, Path] | None = None
) -> Checkpoint:
    """The checkpoint that a bundle was exported from, its weights compared by their digests.

    Args:
        model: where it is; None does for the embedded models, which a bundle names.
    Raises: UserError where it cannot be found, or has other weights.
    """
    made_from = bundle.manifest.model
    if model is None and made_from not in EMBEDDED:
        raise UserError(f"{bundle.folder} was exported from a folder {made_from!r}: say where it is with --model PATH")
    checkpoint = Checkpoint(model or made_from, controlnets)
    if checkpoint.fingerprint() != bundle.manifest.base:
        raise UserError(f"{bundle.folder} was not exported from {checkpoint.name}: its weights are others")
    for condition, recorded in bundle.manifest.conditions.items():
        if checkpoint.controlnet_fingerprint(condition) != recorded.get("controlnet"):
            raise UserError(
                f"the {condition} ControlNet of {bundle.folder} is not {checkpoint.controlnet_folder(condition)}: "
                f"say where it is with --controlnet {condition}=PATH"
            )
    return checkpoint


def _digest(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for pattern in _WEIGHTS:
            for path in sorted(folder.glob(pattern)):
                digest.update(f"{folder.name}/{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{missing}: there is no {path}; is this a diffusers folder?") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
