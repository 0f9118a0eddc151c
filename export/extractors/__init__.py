"""Extractors: a photo's control image, and from a generated image again, as modules of one signature.

`miniature` has the embedded model's, `published` those of the official ControlNet++ demo.
"""

from torch import nn

from ...errors import UserError
from ...messages import one_line
from ..sources import Source
from .miniature import MapExtractor, load_extractor
from .published import load_published, read_config


def open_extractor(condition: str, source: Source, width: int, height: int) -> nn.Module:
    """image uint8 [B,H,W,3] → map uint8 [B,H,W]: ADE20K labels for `seg`, else gray levels.

    Args:
        source: a folder of the miniature's kind (its `config.json` has a `type`), or as `load_published` takes it.
        width, height: of the images, in pixels.

    Raises:
        UserError: As `load_published`.
    """
    if "type" in read_config(source):
        try:
            network = load_extractor(source.local(("config.json", "model.safetensors")))
        except ValueError as e:
            raise UserError(f"the extractor {source.uri} cannot be used: {one_line(e)}") from e
        return MapExtractor(network, labels=condition == "seg")
    return load_published(condition, source, width, height)
