"""What an export writes, known before it begins."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..conditions import CONDITIONS
from ..errors import UserError
from .checkpoint import Checkpoint
from .sources import Source
from .space import amount, require_space

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_BYTES = {"fp32": 4, "fp16": 2}
# Of a graph beside its weights: SD 1.5's UNet has 4 MB of nodes, and constants besides.
_NODES = 5_000_000


def space_needed(checkpoint: Checkpoint, base: bool, conditions: Iterable[str], precision: str) -> int:
    """Bytes of the graphs of an export, from the shapes of weights alone.

    Args:
        base: whether the graphs that every condition shares are written.
    """
    size = _BYTES[precision]
    total = 0
    if base:
        text_encoder, vae = _count(checkpoint.empty("text_encoder")), _count(checkpoint.empty("vae"))
        # The VAE is written in halves, in fp16 bundles once more in fp32.
        total += size * (_count(checkpoint.empty("unet")) + text_encoder + vae) + 5 * _NODES
        total += 4 * vae if precision == "fp16" else 0
    for condition in conditions:
        total += size * _count(checkpoint.empty(f"controlnet_{condition}")) + _NODES
        extractor = checkpoint.resolved.extractor(condition)
        if extractor and CONDITIONS[condition].extractor_graph:
            total += sum(file.stat().st_size for file in _weights(extractor)) + _NODES
    return total


def check_disk_space(folder: Path, nbytes: int) -> None:
    """Says what will be written below `folder`, and what is free there.

    Raises:
        UserError: it does not fit.
    """
    free = require_space(folder.parent, nbytes, "free some, or choose another --out")
    logger.info(f"writes about {amount(nbytes)} to {folder}; {amount(free)} are free")


def _count(module: "nn.Module") -> int:
    return sum(weight.numel() for weight in module.parameters())


def _weights(extractor: Source) -> tuple[Path, ...]:
    """None of the miniature's extractors that are fixed filters."""
    try:
        return extractor.weights(library="transformers")
    except UserError:
        return ()
