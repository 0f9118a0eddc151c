"""A module's `config.json`: which values the exported graphs can have, checked before a module is made of it.

A config of diffusers or transformers may hold any key. Those that say what the module computes are listed here with
their types and bounds; every other key is left out, so that the module has the default that the graphs assume. The
bounds are wide for SD-1.x models and small enough that a module without weights is made in seconds.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from ..errors import UserError
from ..messages import printable
from ..schema import Meta, SchemaError, convert, finite

_Channels = Annotated[int, Meta(ge=1, le=8192)]
_Levels = Annotated[list[_Channels], Meta(min_length=1, max_length=6)]
_Layers = Annotated[int, Meta(ge=1, le=8)]
_Size = Annotated[int, Meta(ge=1, le=8192)]
_Sizes = _Size | Annotated[list[_Size], Meta(min_length=2, max_length=2)]
_Heads = Annotated[int, Meta(ge=1, le=1024)]
_HeadsByLevel = _Heads | Annotated[list[_Heads], Meta(min_length=1, max_length=6)]
_Epsilon = Annotated[float, Meta(gt=0, le=1)]
_Factor = Annotated[float, Meta(gt=0, le=1000)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Flag = bool | None
_Activation = Literal["swish", "silu", "mish", "gelu", "relu"]
_Token = Annotated[int, Meta(ge=0, le=1 << 24)] | None


class _Struct(msgspec.Struct, omit_defaults=True):
    """Every key may be missing: then the module's own default counts."""


class _UNetLike(_Struct):
    """What a UNet and its ControlNet have in common."""

    flip_sin_to_cos: _Flag = None
    freq_shift: Annotated[int, Meta(ge=0, le=1)] | None = None
    down_block_types: Annotated[list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]], Meta(max_length=6)] | None = None
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = None
    only_cross_attention: bool | Annotated[list[bool], Meta(max_length=6)] | None = None
    block_out_channels: _Levels | None = None
    layers_per_block: _Layers | None = None
    downsample_padding: Annotated[int, Meta(ge=0, le=1)] | None = None
    mid_block_scale_factor: _Factor | None = None
    act_fn: _Activation | None = None
    norm_num_groups: _Channels | None = None
    norm_eps: _Epsilon | None = None
    cross_attention_dim: _Channels | None = None
    transformer_layers_per_block: Annotated[int, Meta(ge=1, le=4)] | None = None
    attention_head_dim: _HeadsByLevel | None = None
    num_attention_heads: _HeadsByLevel | None = None
    use_linear_projection: _Flag = None
    upcast_attention: _Flag = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] | None = None


class _UNet(_UNetLike):
    sample_size: _Sizes | None = None
    center_input_sample: _Flag = None
    up_block_types: Annotated[list[Literal["CrossAttnUpBlock2D", "UpBlock2D"]], Meta(max_length=6)] | None = None
    dropout: _Share | None = None
    time_cond_proj_dim: _Channels | None = None
    time_embedding_dim: _Channels | None = None
    resnet_skip_time_act: _Flag = None
    resnet_out_scale_factor: _Factor | None = None
    mid_block_only_cross_attention: _Flag = None


class _ControlNet(_UNetLike):
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] | None = None
    conditioning_embedding_out_channels: _Levels | None = None


class _Vae(_Struct):
    down_block_types: (
        Annotated[list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]], Meta(max_length=6)] | None
    ) = None
    up_block_types: Annotated[list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]], Meta(max_length=6)] | None = (
        None
    )
    block_out_channels: _Levels | None = None
    layers_per_block: _Layers | None = None
    act_fn: _Activation | None = None
    norm_num_groups: _Channels | None = None
    sample_size: _Sizes | None = None
    scaling_factor: _Factor | None = None
    force_upcast: _Flag = None
    use_quant_conv: bool | None = None
    use_post_quant_conv: bool | None = None
    mid_block_add_attention: bool | None = None


class _TinyVae(_Struct):
    encoder_block_out_channels: _Levels | None = None
    decoder_block_out_channels: _Levels | None = None
    act_fn: _Activation | None = None
    upsample_fn: Literal["nearest", "bilinear", "bicubic"] | None = None
    num_encoder_blocks: Annotated[list[_Layers], Meta(max_length=6)] | None = None
    num_decoder_blocks: Annotated[list[_Layers], Meta(max_length=6)] | None = None
    latent_magnitude: _Factor | None = None
    latent_shift: Annotated[float, Meta(ge=-100, le=100)] | None = None
    force_upcast: _Flag = None
    scaling_factor: _Factor | None = None


class _TextEncoder(_Struct):
    vocab_size: Annotated[int, Meta(ge=2, le=1 << 20)] | None = None
    hidden_size: _Channels | None = None
    intermediate_size: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    projection_dim: _Channels | None = None
    num_hidden_layers: Annotated[int, Meta(ge=1, le=64)] | None = None
    num_attention_heads: _Heads | None = None
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "relu", "silu", "swish"] | None = None
    layer_norm_eps: _Epsilon | None = None
    max_position_embeddings: Annotated[int, Meta(ge=1, le=1024)] | None = None
    attention_dropout: _Share | None = None
    pad_token_id: _Token = None
    bos_token_id: _Token = None
    eos_token_id: _Token = None


_SCHEMAS: dict[str, type[_Struct]] = {
    "UNet2DConditionModel": _UNet,
    "ControlNetModel": _ControlNet,
    "AutoencoderKL": _Vae,
    "AutoencoderTiny": _TinyVae,
    "CLIPTextModel": _TextEncoder,
}

# What the graphs' signatures assume: other inputs, or a step that no graph has.
_UNET_LIKE_FIXED: dict[str, tuple[Any, ...]] = {
    "in_channels": (4,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "encoder_hid_dim": (None,),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "UNet2DConditionModel": {
        **_UNET_LIKE_FIXED,
        "out_channels": (4,),
        "dual_cross_attention": (False, None),
        "reverse_transformer_layers_per_block": (None,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default", None),
        "class_embeddings_concat": (False, None),
        "cross_attention_norm": (None,),
    },
    "ControlNetModel": {
        **_UNET_LIKE_FIXED,
        "conditioning_channels": (3,),
        "global_pool_conditions": (False, None),
        "time_cond_proj_dim": (None,),
    },
    "AutoencoderKL": {
        "in_channels": (3,),
        "out_channels": (3,),
        "latent_channels": (4,),
        "shift_factor": (None, 0),
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    "AutoencoderTiny": {
        "in_channels": (3,),
        "out_channels": (3,),
        "latent_channels": (4,),
        "upsampling_scaling_factor": (2,),
        "shift_factor": (None, 0),
    },
    # A prompt's chunk, which the runtime cuts and pads to.
    "CLIPTextModel": {"max_position_embeddings": (77,)},
}
# Of configs whose keys are not listed here: what is a count, and how large any number may be.
_COUNT = re.compile(r"layers|depth|blocks|convs|stages|stacks")
_MAX_COUNT, _MAX_NUMBER, _MAX_ITEMS = 64, 8192, 4096


def checked(kind: str, config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What a config says of a module, as far as the module needs to know it.

    Args:
        kind: the module's class: a key of `_SCHEMAS`.
        what: whose config it is, for messages.

    Raises:
        UserError: a value has another type, is out of bounds, or asks for what the graphs have not.
    """
    for key, allowed in _FIXED[kind].items():
        value = config.get(key, allowed[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed):
            shown = f"{what} has {key} {printable(repr(value), 60)}"
            instead = f"only {allowed[0]!r}" if allowed[0] is not None else "only SD-1.x models, which have none,"
            raise UserError(f"{shown}: {instead} can be exported")
    schema = _SCHEMAS[kind]
    keys = {field.name for field in msgspec.structs.fields(schema)}
    known = {key: value for key, value in config.items() if key in keys}
    try:
        if not finite(known):
            raise SchemaError("a number is NaN or Inf")
        typed = msgspec.to_builtins(convert(known, schema))
    except SchemaError as e:
        raise UserError(f"the config.json of {what} cannot be used: {e}; is it an SD-1.x model's?") from None
    if (end := typed.get("eos_token_id", 0)) >= typed.get("vocab_size", end + 1):
        raise UserError(f"{what} has eos_token_id {end}, but only {typed['vocab_size']} tokens: check its config.json")
    fixed = {key: config[key] for key in _FIXED[kind] if key in config}
    names = {key: config[key] for key in ("_class_name", "architectures") if key in config}
    return {**names, **fixed, **typed}


def require_modest(config: Mapping[str, Any], what: str, largest: int = _MAX_NUMBER) -> None:
    """That no number of another program's config is so large that a module of it would fill the memory.

    Args:
        config: JSON; what its keys mean is the other program's affair.
        what: whose it is, for messages.
        largest: what a number may be.

    Raises:
        UserError: the config has too many items, or a number larger than `largest`.
    """
    _walk(config, "", what, largest)


def _walk(value: Any, key: str, what: str, largest: int) -> None:
    if isinstance(value, Mapping):
        if len(value) > _MAX_ITEMS:
            raise UserError(f"{what} has {len(value)} items in {printable(key, 60)}: check what it is")
        for own, inside in value.items():
            _walk(inside, str(own), what, largest)
    elif isinstance(value, list):
        if len(value) > _MAX_ITEMS:
            raise UserError(f"{what} has {len(value)} items in {printable(key, 60)}: check what it is")
        for inside in value:
            _walk(inside, key, what, largest)
    elif isinstance(value, int | float):
        bound = min(_MAX_COUNT, largest) if _COUNT.search(key) else largest
        if not abs(value) <= bound:  # NaN too
            raise UserError(
                f"{what} has {printable(key, 60)} {printable(value, 40)}: {bound} is the largest that is used"
            )
