"""Which graphs a bundle has: for each its module, its example inputs and its free dimensions (docs/design.md)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..bundles.bundle import Manifest
from ..bundles.graph_names import SHALLOW
from ..bundles.manifest import GraphOptions
from ..conditions import CONDITIONS
from . import hoists, modules
from .checkpoint import Checkpoint
from .extractors import open_extractor
from .onnx_graph import ExportSpec
from .sources import Source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
BATCH = {0: "batch"}
IMAGES = {0: "images"}
PROMPT = {0: "batch", 1: "tokens"}


@dataclass(frozen=True)
class GraphDims:
    """Sizes that every graph of a bundle shares; `dtype` is of weights and activations.

    `options` say how the networks are divided into graphs.
    """

    width: int
    height: int
    latent_channels: int
    vae_scale_factor: int
    cross_attention_dim: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    dtype: torch.dtype
    options: GraphOptions

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
            manifest.options,
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


def base_graphs(checkpoint: Checkpoint, g: GraphDims) -> Graphs:
    """The graphs that every condition shares, smallest first so that trouble shows early."""
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
    yield from _hoisted("", lambda: checkpoint.unet(g.dtype), g, checkpoint.config("unet").get("time_cond_proj_dim"))
    if g.options.split_unet:
        yield "unet_encoder", lambda: _unet_encoder(checkpoint, g)
        yield "unet_decoder", lambda: _unet_decoder(checkpoint, g)
        return
    if g.options.deep_cache:
        yield SHALLOW, lambda: _unet_shallow(checkpoint, g)
    yield "unet", lambda: _unet(checkpoint, g)


def condition_graphs(checkpoint: Checkpoint, condition: str, g: GraphDims) -> Graphs:
    """The graphs that a condition adds: `hint_…`, `controlnet_…` with what is hoisted out of it, and `extractor_…`.

    The last where the model has one.
    """
    extractor = checkpoint.resolved.extractor(condition)
    if CONDITIONS[condition].extractor_graph and extractor:
        yield f"extractor_{condition}", lambda: extractor_graph(condition, extractor, g.width, g.height)
    yield f"hint_{condition}", lambda: _hint(condition, checkpoint.controlnet(condition, g.dtype), g)
    yield from _hoisted(f"_{condition}", lambda: checkpoint.controlnet(condition, g.dtype), g)
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


def _hoisted(suffix: str, load: Callable[[], nn.Module], g: GraphDims, guidance_width: int | None = None) -> Graphs:
    """What runs before the loop for one network, whose graphs end in `suffix`."""
    if g.options.hoist_prompt:
        yield f"text_kv{suffix}", lambda: _text_kv(f"text_kv{suffix}", load(), g)
    if g.options.hoist_time:
        yield f"time_embeds{suffix}", lambda: _time_embeds(f"time_embeds{suffix}", load(), guidance_width)


def _text_kv(name: str, model: nn.Module, g: GraphDims) -> ExportSpec:
    outputs = _kv_names(range(len(hoists.kv_widths(model))))
    inputs: Inputs = {"prompt_embeds": g.randn(4, 2 * 77, g.cross_attention_dim)}
    free = {tensor: PROMPT for tensor in ("prompt_embeds", *outputs)}
    return ExportSpec(name, hoists.TextKv(model), inputs, outputs, {}, free)


def _time_embeds(name: str, model: nn.Module, guidance_width: int | None) -> ExportSpec:
    inputs: Inputs = {"timesteps": torch.tensor([601.0, 41.0])}
    free = {"timesteps": {0: "steps"}, "time_embeds": {0: "steps"}}
    if guidance_width:
        inputs["timestep_cond"] = torch.randn(2, guidance_width).to(next(model.parameters()).dtype)
        free["timestep_cond"] = IMAGES
        free["time_embeds"] = {0: "steps", 1: "images"}
    return ExportSpec(name, hoists.TimeEmbeds(model), inputs, ["time_embeds"], {}, free)


def _unet(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    unet, residuals = checkpoint.unet(g.dtype), g.residuals()
    step = _StepInputs.of(g, unet, checkpoint.config("unet").get("time_cond_proj_dim"))
    inputs: Inputs = {
        "model_input": step.model_input,
        **step.time,
        **step.text,
        "rows": step.rows,
        "residuals": tuple(g.randn(4, *shape) for shape in residuals.values()),
        **step.cond,
    }
    free = {**step.free(), **_free("noise_pred", *residuals)}
    nested = {**step.nested, "residuals": list(residuals)}
    if g.options.deep_cache:
        free |= _free("deep")
        module = modules.UNetWithDeepFeature(unet, g.options)
        return ExportSpec("unet", module, inputs, ["noise_pred", "deep"], nested, free)
    return ExportSpec("unet", modules.UNet(unet, g.options), inputs, ["noise_pred"], nested, free)


def _unet_shallow(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    unet: Any = checkpoint.unet(g.dtype)
    total = len(hoists.kv_widths(unet))
    layers = range(total - hoists.count_last(unet), total)
    step = _StepInputs.of(g, unet, checkpoint.config("unet").get("time_cond_proj_dim"), layers)
    # The last layer reads what comes from below beside the first skip connection.
    below = unet.up_blocks[-1].resnets[-1].in_channels - g.block_out_channels[0]
    inputs: Inputs = {
        "model_input": step.model_input,
        **step.time,
        **step.text,
        "rows": step.rows,
        "down_0": g.randn(4, *g.residuals()["down_0"]),
        "deep": g.randn(4, below, *g.latent()),
        **step.cond,
    }
    free = {**step.free(), **_free("noise_pred", "down_0", "deep")}
    return ExportSpec(SHALLOW, modules.ShallowUNet(unet, g.options), inputs, ["noise_pred"], step.nested, free)


def _unet_encoder(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    unet, skips = checkpoint.unet(g.dtype), _skip_names(g)
    layers = range(len(hoists.kv_widths(unet)) - hoists.count_up(unet))
    step = _StepInputs.of(g, unet, checkpoint.config("unet").get("time_cond_proj_dim"), layers)
    inputs: Inputs = {"model_input": step.model_input, **step.time, **step.text, "rows": step.rows, **step.cond}
    free = {**step.free(), **_free(*skips)}
    return ExportSpec("unet_encoder", modules.UNetEncoder(unet, g.options), inputs, skips, step.nested, free)


def _unet_decoder(checkpoint: Checkpoint, g: GraphDims) -> ExportSpec:
    unet, residuals, skips = checkpoint.unet(g.dtype), g.residuals(), _skip_names(g)
    total = len(hoists.kv_widths(unet))
    layers = range(total - hoists.count_up(unet), total)
    step = _StepInputs.of(g, unet, checkpoint.config("unet").get("time_cond_proj_dim"), layers)
    *shapes, middle = residuals.values()
    inputs: Inputs = {
        **step.time,
        **step.text,
        **({"rows": step.rows} if step.of_images else {}),
        "skips": tuple(g.randn(4, *shape) for shape in shapes),
        "encoded": g.randn(4, *middle),
        "residuals": tuple(g.randn(4, *shape) for shape in residuals.values()),
        **step.cond,
    }
    free = {**step.free(), **_free("noise_pred", *residuals, *skips)}
    nested = {**step.nested, "skips": skips[:-1], "residuals": list(residuals)}
    return ExportSpec("unet_decoder", modules.UNetDecoder(unet, g.options), inputs, ["noise_pred"], nested, free)


def _controlnet(condition: str, controlnet: nn.Module, g: GraphDims) -> ExportSpec:
    outputs = list(g.residuals())
    step = _StepInputs.of(g, controlnet)
    inputs: Inputs = {
        "model_input": step.model_input,
        **step.time,
        **step.text,
        "rows": step.rows,
        "hint": g.randn(2, g.block_out_channels[0], *g.latent()),
        "scales": torch.rand(len(outputs), 4),
    }
    free = {**step.free(), **_free(*outputs), "hint": IMAGES, "scales": {1: "batch"}}
    module = modules.ControlNet(controlnet, g.options)
    return ExportSpec(f"controlnet_{condition}", module, inputs, outputs, step.nested, free)


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


@dataclass(frozen=True)
class _StepInputs:
    """Example inputs that a UNet and its ControlNets have in common, as the options have them.

    Attributes:
        time: the time step, or what is made of it.
        text: prompt_embeds, or the keys and values of some cross-attentions.
        cond: timestep_cond of a distilled UNet, where its graph reads it.
        of_images: whether the time embedding has a row for each image.
        nested: as in `ExportSpec`.
    """

    model_input: Tensor
    time: Inputs
    text: Inputs
    rows: Tensor
    cond: Inputs
    of_images: bool
    nested: dict[str, list[str]]

    @classmethod
    def of(
        cls, g: GraphDims, model: nn.Module, guidance_width: int | None = None, layers: Iterable[int] | None = None
    ) -> "_StepInputs":
        """Of a model that is whole yet.

        Args:
            guidance_width: E of timestep_cond.
            layers: the cross-attentions whose keys and values the graph reads; None for all.
        """
        widths = hoists.kv_widths(model)
        layers = range(len(widths)) if layers is None else list(layers)
        # Two chunks: a single one would let the exporter take 77 for granted.
        tokens = 2 * 77
        cond: Inputs = {"timestep_cond": g.randn(2, guidance_width)} if guidance_width else {}
        if g.options.hoist_time:
            rows_of_time = g.randn(2 if guidance_width else 1, hoists.time_width(model))
            time: Inputs = {"time_embeds": rows_of_time}
            cond = {}
        else:
            time = {"timestep": torch.tensor([601.0])}
        text: Inputs = {"prompt_embeds": g.randn(4, tokens, g.cross_attention_dim)}
        nested = {}
        if g.options.hoist_prompt:
            text = {"keys_values": tuple(g.randn(4, tokens, widths[i]) for i in layers for _ in "kv")}
            nested = {"keys_values": _kv_names(layers)}
        # Half of the rows are of half of the images, which is what the graph is compared on.
        rows = torch.tensor([0, 0, 1, 1])
        model_input = g.randn(2, g.latent_channels, *g.latent())
        return cls(model_input, time, text, rows, cond, guidance_width is not None, nested)

    def free(self) -> dict[str, dict[int, str]]:
        """The free dimensions of all of them."""
        own = {"model_input": IMAGES, "rows": BATCH, "prompt_embeds": PROMPT, "timestep_cond": IMAGES}
        if self.of_images:
            own["time_embeds"] = IMAGES
        return {**own, **dict.fromkeys(self.nested.get("keys_values", ()), PROMPT)}


def _kv_names(layers: Iterable[int]) -> list[str]:
    return [f"{which}_{i}" for i in layers for which in "kv"]


def _skip_names(g: GraphDims) -> list[str]:
    """What the encoder of a divided UNet gives: a skip connection for each `down_…` residual, and `encoded`."""
    return [name.replace("down", "skip").replace("mid", "encoded") for name in g.residuals()]


def _free(*names: str) -> dict[str, dict[int, str]]:
    return {name: BATCH for name in names}
