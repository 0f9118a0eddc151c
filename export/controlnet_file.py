"""A ControlNet in one file, in diffusers' names or in the original ones, with or without a config beside it.

The mapping of original names is diffusers' own (loaders/single_file_utils.py). What a config would say is read off the
weights' shapes; the rest is the UNet's, as `ControlNetModel.from_unet` takes it from there.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..messages import one_line, some
from .weights import State

_PREFIX = "control_model."
# Of a diffusers file, an original file.
_DIFFUSERS, _ORIGINAL = "controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"
# What keys of other kinds hold.
_OTHER_KINDS = {
    "lora_controlnet": "a Control-LoRA",
    "difference": "the difference to a base model, not a whole ControlNet",
    "add_embedding.linear_1.weight": "a ControlNet for SDXL",
    "label_emb.0.0.weight": "a ControlNet for SDXL",
    "control_add_embedding.linear_1.weight": "a ControlNet of several conditions (union)",
    "task_embedding": "a ControlNet of several conditions (union)",
    "adapter.body.0.in_conv.weight": "a T2I-Adapter",
    "body.0.in_conv.weight": "a T2I-Adapter",
    "x_embedder.weight": "a ControlNet for a transformer",
}
# What a ControlNet has in common with its UNet.
_SHARED = (
    "in_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "use_linear_projection",
    "upcast_attention",
    "resnet_time_scale_shift",
)
# Of a config beside the file: where these differ from the weights' shapes, it is another model's.
_SHAPES = ("conditioning_channels", "conditioning_embedding_out_channels", "block_out_channels", "cross_attention_dim")


def controlnet_of(state: Mapping[str, Tensor], layers_per_block: int, what: str) -> State:
    """The ControlNet's own part of a file's weights, in diffusers' names.

    Args:
        layers_per_block: of the UNet.
        what: whose they are, for messages.

    Raises:
        UserError: it is no ControlNet, or one of another kind.
    """
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    inside = any(key.startswith(_PREFIX) for key in state)
    own = {key.removeprefix(_PREFIX): t for key, t in state.items() if not inside or key.startswith(_PREFIX)}
    for key, kind in _OTHER_KINDS.items():
        if key in own:
            raise UserError(f"{what} is {kind}: only a ControlNet for SD 1.x can be exported")
    if _DIFFUSERS in own:
        return own
    if _ORIGINAL not in own:
        raise UserError(f"{what} is no ControlNet in one file (it has {some(state)}): check what it is")
    try:
        converted = convert_controlnet_checkpoint(own, {"layers_per_block": layers_per_block})
    except Exception as e:  # whatever a missing key makes of it
        raise UserError(f"the names in {what} cannot be read ({one_line(e, 120)}): is it whole, and for SD 1.x?") from e
    return {key: t for key, t in converted.items() if t is not None}


def config_of(state: State, unet: Mapping[str, Any], beside: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """The `config.json` of a ControlNet that comes without one.

    Args:
        state: its weights in diffusers' names.
        unet: the config of the UNet that it is for.
        beside: the config in the file's folder, which counts where it is this ControlNet's.

    Raises:
        UserError: the weights are not a ControlNet's.
    """
    shapes = _shapes(state, what)
    same = beside and all(beside.get(key, value) == value for key, value in shapes.items())
    if beside and same and beside.get("_class_name") == "ControlNetModel":
        return dict(beside)
    shared = {key: unet[key] for key in _SHARED if key in unet}
    return {"_class_name": "ControlNetModel", **shared, **shapes}


def _shapes(state: State, what: str) -> dict[str, Any]:
    """What the weights' shapes say of the config."""

    def size(key: str, axis: int) -> int:
        if key not in state or state[key].ndim != 4:
            raise UserError(f"{what} has no convolution {key}: is it whole, and for SD 1.x?")
        return int(state[key].shape[axis])

    embedding = "controlnet_cond_embedding"
    # Two convolutions for each level, the second of which widens it.
    widths = [size(f"{embedding}.conv_in.weight", 0)]
    while f"{embedding}.blocks.{2 * len(widths) - 1}.weight" in state:
        widths.append(size(f"{embedding}.blocks.{2 * len(widths) - 1}.weight", 0))
    blocks: list[int] = []
    while f"down_blocks.{len(blocks)}.resnets.0.conv1.weight" in state:
        blocks.append(size(f"down_blocks.{len(blocks)}.resnets.0.conv1.weight", 0))
    keys = (t for key, t in state.items() if key.endswith(".attn2.to_k.weight") and t.ndim == 2)
    first = next(keys, None)
    return {
        "conditioning_channels": size(f"{embedding}.conv_in.weight", 1),
        "conditioning_embedding_out_channels": widths,
        "block_out_channels": blocks,
        **({} if first is None else {"cross_attention_dim": int(first.shape[1])}),
    }
