"""The published extractors, those of the official ControlNet++ demo, from their files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...conditions import ADE20K_PALETTE
from ...errors import UserError
from ...messages import one_line, printable
from ...schema import read_object
from ..configs import require_modest
from ..sources import Source
from ..weights import check_finite, load_weights, make_empty, read_weights
from .hed import HED
from .line_art import LineArtGenerator
from .pretrained import Depth, Preprocess, Segmentation

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
# On a side, of what a network reads.
_MAX_PIXELS = 2048


@dataclass(frozen=True)
class _Annotator:
    """A network in one file of lllyasviel/Annotators."""

    file: str
    network: Callable[[], nn.Module]


@dataclass(frozen=True)
class _Pretrained:
    """A network of transformers.

    Attributes:
        unused: layers that are never run; a file may have them or not.
    """

    architecture: str
    extractor: Callable[[Preprocess, nn.Module], nn.Module]
    unused: tuple[str, ...]


_ANNOTATORS = {
    "hed": _Annotator("ControlNetHED.pth", HED),
    "lineart": _Annotator("sk_model.pth", LineArtGenerator),
}
_PRETRAINED = {
    "seg": _Pretrained("UperNetForSemanticSegmentation", Segmentation, ("auxiliary_head",)),
    # The file of Intel/dpt-large lacks the first, the deepest layer of the fusion has nothing to add.
    "depth": _Pretrained("DPTForDepthEstimation", Depth, ("neck.fusion_stage.layers.0.residual_layer1", "dpt.pooler")),
}


def load_published(condition: str, source: Source, width: int, height: int) -> nn.Module:
    """image uint8 [B,H,W,3] → map uint8 [B,H,W], float32 within, for inference.

    Args:
        condition: `seg` or `depth`, whose source is a folder in transformers' layout with a UPerNet or DPT of any size;
            `hed` or `lineart`, whose source is `ControlNetHED.pth` or `sk_model.pth`, or a folder that has it.
        width, height: of the images, in pixels.

    Raises:
        UserError: the source is none of these, or its weights are damaged or another network's.
    """
    what = f"the {condition} extractor {source.uri}"
    if annotator := _ANNOTATORS.get(condition):
        return _load_annotator(annotator, source, what)
    if pretrained := _PRETRAINED.get(condition):
        return _load_pretrained(pretrained, source, what, width, height)
    raise UserError(f"no extractor network for {condition} is known: leave --extractor {condition} out")


def read_config(source: Source) -> dict[str, Any]:
    """The `config.json` of a folder; empty where the source has none.

    Raises:
        UserError: it is damaged, or holds numbers that no such network has.
    """
    if source.file or not source.has(CONFIG):
        return {}
    return read_object(source.get(CONFIG)[0])


def _load_annotator(annotator: _Annotator, source: Source, what: str) -> nn.Module:
    if not source.file:
        if not source.has(annotator.file):
            raise UserError(f"{what} has no {annotator.file}: give that file")
        source = Source(source.tree, source.folder, annotator.file)
    state = read_weights(source.weights())
    network = load_weights(make_empty(annotator.network), state, what, torch.float32)
    check_finite(state, what)
    return network


def _load_pretrained(kind: _Pretrained, source: Source, what: str, width: int, height: int) -> nn.Module:
    if source.file:
        raise UserError(f"{what} is a file: give the folder or repository that has its config.json")
    config = read_config(source)
    require_modest(config, f"the {CONFIG} of {what}")
    names = config.get("architectures")
    found = names[0] if isinstance(names, list) and names else config.get("model_type", "network of unknown kind")
    if found != kind.architecture:
        raise UserError(f"{what} is a {printable(found, 60)}, not a {kind.architecture}: give another")
    network = _network(kind, config, what)
    preprocess = _preprocess(source, what, width, height)
    unused = tuple(f"{name}." for name in kind.unused)
    state = {
        key: t for key, t in read_weights(source.weights(library="transformers")).items() if not key.startswith(unused)
    }
    module = kind.extractor(preprocess, load_weights(network, state, what, torch.float32)).eval()
    check_finite(state, what)
    try:
        with torch.no_grad():
            module(torch.zeros(1, height, width, 3, dtype=torch.uint8))
    except Exception as e:  # what its config allows and no image fits
        raise _unusable(CONFIG, what, e) from e
    return module


def _network(kind: _Pretrained, config: dict[str, Any], what: str) -> nn.Module:
    """On the meta device, without the layers that are never run."""
    import transformers

    architecture = getattr(transformers, kind.architecture)
    try:
        network: Any = make_empty(lambda: architecture(architecture.config_class.from_dict(config)))
    except Exception as e:  # whatever transformers raises, the user needs one line
        raise _unusable(CONFIG, what, e) from e
    if kind.extractor is Segmentation and network.config.num_labels != len(ADE20K_PALETTE):
        raise UserError(f"{what} has {network.config.num_labels} labels, not the {len(ADE20K_PALETTE)} of ADE20K")
    for name in set(kind.unused).intersection(name for name, _ in network.named_modules()):
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, None)
    return network


def _preprocess(source: Source, what: str, width: int, height: int) -> Preprocess:
    from transformers import AutoImageProcessor

    folder = source.get(PREPROCESSOR, CONFIG)[0].parent
    require_modest(read_object(folder / PREPROCESSOR), f"the {PREPROCESSOR} of {what}", _MAX_PIXELS)
    try:
        # The official demo's versions resized with Pillow too.
        # Not asked for, code that comes with the files would be offered to the user: transformers waits for a `y`.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        return Preprocess(processor, width, height, what)
    except UserError:
        raise
    except Exception as e:
        if "trust_remote_code" in str(e):
            raise UserError(f"the {PREPROCESSOR} of {what} names code of its own, which is never run") from None
        raise _unusable(PREPROCESSOR, what, e) from e


def _unusable(file: str, what: str, error: Exception) -> UserError:
    return UserError(f"the {file} of {what} cannot be used: {one_line(error)}")
