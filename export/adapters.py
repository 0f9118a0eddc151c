"""PEFT's settings of a LoRA: `adapter_config.json`, or the header that diffusers writes (`lora_adapter_metadata`).

Both come from a file: values are typed and bounded, settings that would change the result and are not implemented are
refused by name, and patterns are matched without the backtracking that a hostile one would cause.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ..errors import UserError
from ..messages import printable
from ..schema import Meta, SchemaError, convert, finite

_Rank = Annotated[int, Meta(ge=1, le=1 << 16)]
_Pattern = Annotated[str, Meta(min_length=1, max_length=512)]
_MAX_PATTERNS = 4096
# Literal characters, `.`, `.*`, `\d+` and groups of alternatives: what PEFT's own documentation and diffusers write.
_SAFE = re.compile(r"\^?(?:[\w-]|\\[.\-dw]\+?|\.[*+]?|\((?:\?:)?[\w|\\.-]+\))*\$?")
_MAX_REPEATS, _MAX_REPEATING = 2, 32

# What says how the adapter was trained, where it was, or how it is loaded, and leaves its weights as they are.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Others begin with the base model's weights changed, of which the adapter knows nothing.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "true", "false")


class _Settings(msgspec.Struct):
    """What is read; every other key must be harmless or empty."""

    peft_type: str | None = None
    r: _Rank | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, float] | None = None
    use_rslora: bool | None = None
    bias: str | None = None
    init_lora_weights: bool | str | None = None


@dataclass(frozen=True)
class Adapter:
    """The settings of one component's LoRA; an empty one gives no alpha."""

    alpha: float | None = None
    rank: int | None = None
    alphas: "Patterns | None" = None
    ranks: "Patterns | None" = None
    use_rslora: bool = False

    def scale(self, layer: str, rank: int, alpha: float | None, what: str) -> float:
        """alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732); 1 without an alpha, as diffusers has it.

        Args:
            layer: the layer's name in its module.
            rank: of its matrices.
            alpha: that a key of the file gives the layer, which counts before the settings.
            what: whose it is, for messages.

        Raises:
            UserError: the settings give the layer another rank.
        """
        stated = self.ranks.value(layer, self.rank) if self.ranks else self.rank
        if stated is not None and stated != rank:
            raise UserError(
                f"{what} has rank {rank} in {layer}, its settings say {stated:g}: they do not belong together"
            )
        if alpha is None:
            alpha = self.alphas.value(layer, self.alpha) if self.alphas else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter(content: Mapping[str, Any], what: str) -> Adapter:
    """An adapter from its settings.

    Args:
        what: whose they are, for messages.

    Raises:
        UserError: they are damaged, or ask for more than a plain LoRA.
    """
    read = {field.name for field in msgspec.structs.fields(_Settings)}
    try:
        settings = convert({key: value for key, value in content.items() if key in read}, _Settings)
    except SchemaError as e:
        raise UserError(f"the settings of {what} are damaged ({e}): download it again") from None
    if not finite([settings.lora_alpha, *(settings.alpha_pattern or {}).values()]):
        raise UserError(f"the settings of {what} have an alpha that is NaN or Inf: download it again")
    if settings.peft_type not in (None, "LORA"):
        raise UserError(f"{what} is of PEFT's kind {printable(settings.peft_type, 40)}: only plain LoRA can be fused")
    if settings.bias not in (None, "none"):
        raise UserError(
            f"{what} trained biases too (bias {printable(settings.bias, 40)}): only plain LoRA can be fused"
        )
    if settings.init_lora_weights not in _INITIALIZATIONS:
        raise UserError(
            f"{what} was begun with {printable(settings.init_lora_weights, 40)}, which changes the base model: convert "
            "it to a plain LoRA (path_initial_model_for_weight_conversion in PEFT's save_pretrained)"
        )
    for key, value in content.items():
        if key not in read | _HARMLESS and value not in (None, False, "", 0, [], {}):
            raise UserError(f"{what} uses {printable(key, 60)}, which is not supported: only plain LoRA can be fused")
    return Adapter(
        settings.lora_alpha,
        settings.r,
        Patterns(settings.alpha_pattern or {}, what),
        Patterns(settings.rank_pattern or {}, what),
        bool(settings.use_rslora),
    )


class Patterns:
    """PEFT's table from patterns of layer names to values (`get_pattern_key` in peft/utils/other.py).

    The first pattern counts that matches a name's end, from its beginning or after a dot.

    Raises:
        UserError: a pattern is none that can be matched in bounded time.
    """

    def __init__(self, table: Mapping[str, float], what: str) -> None:
        if len(table) > _MAX_PATTERNS:
            raise UserError(f"the settings of {what} have {len(table)} patterns, more than {_MAX_PATTERNS}")
        repeating = sum("*" in pattern or "+" in pattern for pattern in table)
        self._table = [(_compiled(pattern, what), value) for pattern, value in table.items()]
        if repeating > _MAX_REPEATING:
            raise UserError(f"the settings of {what} have {repeating} patterns with * or +, more than {_MAX_REPEATING}")

    def value(self, layer: str, default: float | None) -> float | None:
        """The value for a layer: that of the longest pattern that its name ends with, else `default`."""
        name = layer.removeprefix("text_model.")
        starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
        for pattern, value in self._table:
            if any(pattern.fullmatch(name, start) for start in starts):
                return value
        return default


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    # transformers had `text_model.` before the names of CLIP's layers until version 5.
    own = pattern.replace("text_model.", "").replace(r"text_model\.", "")
    repeats = own.count("*") + own.count("+")
    try:
        if _SAFE.fullmatch(own) and repeats <= _MAX_REPEATS:
            return re.compile(f"(?:{own})")
    except re.error:
        pass
    raise UserError(
        f"the settings of {what} have the pattern {printable(repr(pattern), 80)}: only names, . .* and "
        r"\d+ can be matched; write the layers' names"
    )
