"""Which graphs a bundle has: for each its module, its example inputs and its free dimensions (docs/design.md)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bundles.bundle import Manifest
from ..conditions import CONDITIONS
from . import modules
from .checkpoint import Checkpoint
from .deep_feature import ShallowUNet
from .extractors import open_extractor
from .onnx_graph import ExportSpec
from .sources import Source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
BATCH = {0: "batch"}
IMAGES = {0: "images"}
PROMPT = {0: "batch", 1: "tokens"}


@dataclass(frozen=True)
class GraphDims:
    """Sizes that every graph of a bundle shares; `dtype` is of weights and activations."""

    width: int
    height: int
    latent_channels: int
    vae_scale_factor: int
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, manifest: Manifest) -> "GraphDims":
        """The sizes of a checkpoint at a manifest's size and precision."""
        setting = checkpoint.setting
        return cls(
            manifest.width,
            manifest.height,
            manifest.latent_channels,
            manifest.vae_scale_factor,
            setting("unet", "cross_attention_dim"),
            tuple(setting("unet", "block_out_channels")),
            setting("unet", "layers_per_block"),
            DTYPES[manifest.precision],
        )

    def latent(self, level: int = 0) -> tuple[int, int]:
        """(h, w) of the latents after `level` downsamplings, each of which rounds up."""
        h, w = self.height // self.vae_scale_factor, self.width // self.vae_scale_factor
        for _ in range(level):
            h, w = -(-h // 2), -(-w // 2)
        return h, w

    def residuals(self) -> dict[str, tuple[int, int, int]]:
        """(channels, h, w) of what a ControlNet adds to the UNet's skip connections, by tensor name."""
        channels = self.block_out_channels
        shapes = [(channels[0], *self.latent())]
        for level, c in enumerate(channels):
            shapes += [(c, *self.latent(level))] * self.layers_per_block
            if level < len(channels) - 1:
                shapes.append((c, *self.latent(level + 1)))
        named = {f"down_{i}": shape for i, shape in enumerate(shapes)}
        return {**named, "mid": (channels[-1], *self.latent(len(channels) - 1))}

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random example tensor."""
        return torch.randn(*shape).to(dtype or self.dtype)

    def pixels(self, images: int) -> Tensor:
        """Random images, uint8 [images,H,W,3]."""
        return torch.randint(0, 256, (images, self.height, self.width, 3), dtype=torch.uint8)


Inputs = dict[str, Tensor | tuple[Tensor, ...]]

# A graph is described when it is its turn, so that one component's weights are in memory at a time.
Graphs = Iterator[tuple[str, Callable[[], ExportSpec]]]


def base_graphs(checkpoint: Checkpoint, g: GraphDims, deep_cache: bool = False) -> Graphs:
    """The graphs that every condition shares, smallest first so that trouble shows early.

    Args:
        deep_cache: with `unet_shallow`, and what it reads as an output of `unet`.
    """
    yield "update", lambda: _update(g)
    yield "add_residuals", lambda: _add_residuals(g)
    yield "text_encoder", lambda: _text_encoder(checkpoint, g)
    yield "vae_decoder", lambda: _vae_decoder(checkpoint, g, "vae_decoder", g.dtype)
    if g.dtype != torch.float32:
        # SD 1.5's VAE overflows fp16 on some images: those are decoded again with this one.
        yield "vae_decoder_fp32", lambda: _vae_decoder(checkpoint, g, "vae_decoder_fp32", torch.float32)
    yield "vae_encoder", lambda: _vae_encoder(checkpoint, g, "vae_encoder", g.dtype)
    if g.dtype != torch.float32:
        yield "vae_encoder_fp32", lambda: _vae_encoder(checkpoint, g, "vae_encoder_fp32", torch.float32)
    if deep_cache:
        yield "unet_shallow", lambda: _unet_shallow(checkpoint, g)
    yield "unet", lambda: _unet(checkpoint, g, deep_cache)


def condition_graphs(checkpoint: Checkpoint, condition: str, g: GraphDims) -> Graphs:
    """The graphs that a condition adds: `hint_…`, `controlnet_…` and, where the model has one, `extractor_…`."""
    extractor = checkpoint.resolved.extractor(condition)
    if CONDITIONS[condition].extractor_graph and extractor:
        yield f"extractor_{condition}", lambda: extractor_graph(condition, extractor, g.width, g.height)
    yield f"hint_{condition}", lambda: _hint(condition, checkpoint.controlnet(condition, g.dtype), g)
    yield f"controlnet_{condition}", lambda: _controlnet(condition, checkpoint.controlnet(condition, g.dtype), g)


def extractor_graph(condition: str, source: Source, width: int, height: int) -> ExportSpec:
    """The graph `extractor_<condition>` for images of this size in pixels.

    Raises:
        UserError: As `open_extractor`.
    """
    module = open_extractor(condition, source, width, height)
    image = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    free = {"image": IMAGES, "map": IMAGES}
    return ExportSpec(f"extractor_{condition}", module, {"image": image}, ["map"], {}, free)


def _text_encoder(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    config = checkpoint.config("text_encoder")
    ids = torch.randint(0, config["vocab_size"], (2, config["max_position_embeddings"]))
    # transformers pools at the end-of-text token; random ids might hold none, real prompts always do.
    ids[:, -1] = config.get("eos_token_id", config["vocab_size"] - 1)
    module = modules.TextEncoder(checkpoint.text_encoder(g.dtype))
    inputs: Inputs = {"input_ids": ids, "clip_skip": torch.tensor([0, 1])}
    free = {name: {0: "prompts"} for name in ("input_ids", "clip_skip", "prompt_embeds")}
    return ExportSpec("text_encoder", module, inputs, ["prompt_embeds"], {}, free)


def _unet(checkpoint: Checkpoint, g: GraphDims, deep_cache: bool) -> ExportSpec:
    residuals = g.residuals()
    inputs: Inputs = {**_step_inputs(g), "residuals": tuple(g.randn(4, *shape) for shape in residuals.values())}
    if embedding := checkpoint.config("unet").get("time_cond_proj_dim"):
        inputs["timestep_cond"] = g.randn(2, embedding)
    free = {**_step_free(), **_free("noise_pred", *residuals)}
    if "timestep_cond" in inputs:
        free["timestep_cond"] = IMAGES
    nested = {"residuals": list(residuals)}
    unet = checkpoint.unet(g.dtype)
    if deep_cache:
        free |= _free("deep")
        return ExportSpec("unet", modules.UNetWithDeepFeature(unet), inputs, ["noise_pred", "deep"], nested, free)
    return ExportSpec("unet", modules.UNet(unet), inputs, ["noise_pred"], nested, free)


def _unet_shallow(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    unet: Any = checkpoint.unet(g.dtype)
    # The last layer reads what comes from below beside the first skip connection.
    below = unet.up_blocks[-1].resnets[-1].in_channels - g.block_out_channels[0]
    inputs: Inputs = {
        **_step_inputs(g),
        "down_0": g.randn(4, *g.residuals()["down_0"]),
        "deep": g.randn(4, below, *g.latent()),
    }
    free = {**_step_free(), **_free("noise_pred", "down_0", "deep")}
    if embedding := checkpoint.config("unet").get("time_cond_proj_dim"):
        inputs["timestep_cond"] = g.randn(2, embedding)
        free["timestep_cond"] = IMAGES
    return ExportSpec("unet_shallow", ShallowUNet(unet), inputs, ["noise_pred"], {}, free)


def _controlnet(condition: str, controlnet: nn.Module, g: GraphDims) -> ExportSpec:
    outputs = list(g.residuals())
    inputs = {
        **_step_inputs(g),
        "hint": g.randn(2, g.block_out_channels[0], *g.latent()),
        "scales": torch.rand(len(outputs), 4),
    }
    free = {**_step_free(), **_free(*outputs), "hint": IMAGES, "scales": {1: "batch"}}
    return ExportSpec(f"controlnet_{condition}", modules.ControlNet(controlnet), inputs, outputs, {}, free)


def _hint(condition: str, controlnet: nn.Module, g: GraphDims) -> ExportSpec:
    module = modules.Hint(controlnet)
    return ExportSpec(f"hint_{condition}", module, {"control_image": g.pixels(1)}, ["hint"], {}, {})


def _add_residuals(g: GraphDims) -> ExportSpec:
    names = list(g.residuals())
    inputs: Inputs = {
        which: tuple(g.randn(2, *shape) for shape in g.residuals().values()) for which in ("residuals", "others")
    }
    nested = {"residuals": names, "others": [f"other_{name}" for name in names]}
    outputs = [f"sum_{name}" for name in names]
    free = _free(*nested["residuals"], *nested["others"], *outputs)
    return ExportSpec("add_residuals", modules.AddResiduals(), inputs, outputs, nested, free)


def _update(g: GraphDims) -> ExportSpec:
    c, (h, w) = g.latent_channels, g.latent()
    inputs: Inputs = {
        "noise_pred": g.randn(2, 3, c, h, w),
        "guidance": torch.randn(2, 3),
        "state": torch.randn(4, 3, c, h, w),
        "coefficients": torch.randn(5, 7),
        "x0_limit": torch.tensor([1.0]),
        "noise": torch.randn(3, c, h, w),
    }
    both = {0: "guidance", 1: "images"}
    free = {
        "noise_pred": both,
        "guidance": both,
        "state": {1: "images"},
        "noise": IMAGES,
        "new_state": {1: "images"},
        "model_input": IMAGES,
    }
    return ExportSpec("update", modules.Update(g.dtype), inputs, ["new_state", "model_input", "magnitude"], {}, free)


def _vae_decoder(checkpoint: Checkpoint, g: GraphDims, name: str, dtype: torch.dtype) -> ExportSpec:
    module = modules.VaeDecoder(checkpoint.vae(dtype))
    inputs = {"latents": torch.randn(2, g.latent_channels, *g.latent())}
    free = {"latents": IMAGES, "image": IMAGES}
    return ExportSpec(name, module, inputs, ["image", "magnitude"], {}, free)


def _vae_encoder(checkpoint: Checkpoint, g: GraphDims, name: str, dtype: torch.dtype) -> ExportSpec:
    vae: Any = checkpoint.vae(dtype)
    inputs: Inputs = {"image": g.pixels(2)}
    free = {"image": IMAGES, "latents": IMAGES}
    if vae.config["_class_name"] == "AutoencoderTiny":
        return ExportSpec(name, modules.TinyVaeEncoder(vae), inputs, ["latents"], {}, free)
    inputs["noise"] = torch.randn(2, g.latent_channels, *g.latent())
    return ExportSpec(name, modules.VaeEncoder(vae), inputs, ["latents"], {}, {**free, "noise": IMAGES})


def _step_inputs(g: GraphDims) -> Inputs:
    return {
        "model_input": g.randn(2, g.latent_channels, *g.latent()),
        "timestep": torch.tensor([601.0]),
        # Two chunks: a single one would let the exporter take 77 for granted.
        "prompt_embeds": g.randn(4, 2 * 77, g.cross_attention_dim),
        # Half of it is of half of the images, which is what the graph is compared on.
        "rows": torch.tensor([0, 0, 1, 1]),
    }


def _step_free() -> dict[str, dict[int, str]]:
    return {"model_input": IMAGES, "prompt_embeds": PROMPT, "rows": BATCH}


def _free(*names: str) -> dict[str, dict[int, str]]:
    return {name: BATCH for name in names}
