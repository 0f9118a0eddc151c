"""The published extractors with random weights: their files' names, keys, shapes and types, but no sense."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...export.extractors.hed import HED
from ...export.extractors.line_art import LineArtGenerator
from ..miniature.diffusion import write_json
from . import published_configs as published

# Where each is on the hub: what `make_extractor` writes there.
REPOSITORIES: Mapping[str, str] = {
    "seg": "openmmlab/upernet-convnext-small",
    "depth": "Intel/dpt-large",
    "hed": "lllyasviel/Annotators",
    "lineart": "lllyasviel/Annotators",
}


def make_extractor(condition: str, folder: Path, *, tiny: bool = False, seed: int = 0) -> Path:
    """Writes a published extractor's files into `folder`. HED and the line-art generator have their one size.

    Returns:
        The folder, or the one file that holds the network.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if condition == "hed":
        return _save_annotator(_random_hed(), folder / "ControlNetHED.pth")
    if condition == "lineart":
        # sk_model2.pth, the coarse one, lies beside it.
        _save_annotator(_random_line_art(), folder / "sk_model2.pth")
        return _save_annotator(_random_line_art(), folder / "sk_model.pth")
    make = _make_upernet if condition == "seg" else _make_dpt
    make(folder, tiny)
    return folder


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A random picture [H,W,3] of soft shapes, edges and grain, as a photo has them; some of it black and white."""
    import cv2

    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells in (3, 8, 24, 80):
        coarse = random.normal(size=(cells, cells, 3)).astype(np.float32)
        mode = cv2.INTER_NEAREST if cells == 8 else cv2.INTER_CUBIC
        picture += cv2.resize(coarse, (width, height), interpolation=mode) * cells**-0.5
    picture += random.normal(size=picture.shape) * 0.05
    levels: NDArray[np.uint8] = np.clip((picture / picture.std() * 0.25 + 0.5) * 255, 0, 255).astype(np.uint8)
    return levels


def _make_upernet(folder: Path, tiny: bool) -> None:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = published.TINY_UPERNET if tiny else published.UPERNET_CONVNEXT_SMALL
    preprocessor = published.TINY_UPERNET_PREPROCESSOR if tiny else published.UPERNET_PREPROCESSOR
    network = UperNetForSemanticSegmentation(UperNetConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    _spread(network, network.decode_head.classifier, torch.randn(1, 3, *_size(preprocessor)), mean=0.0)
    _save(folder, config, preprocessor, network.state_dict())


def _make_dpt(folder: Path, tiny: bool) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = published.TINY_DPT if tiny else published.DPT_LARGE
    preprocessor = published.TINY_DPT_PREPROCESSOR if tiny else published.DPT_PREPROCESSOR
    network = DPTForDepthEstimation(DPTConfig.from_dict(config)).eval()
    nn.init.normal_(network.dpt.embeddings.position_embeddings)
    # 0 is reached too: real maps have a farthest that is nothing.
    _spread(network, network.head.head[4], torch.randn(1, 3, *_size(preprocessor)), mean=2.0)
    state = {key: t for key, t in network.state_dict().items() if not key.startswith(published.DPT_LACKS)}
    _save(folder, config, preprocessor, state)


def _random_hed() -> nn.Module:
    network = HED().eval()
    nn.init.constant_(network.norm, 120.0)
    for block in (network.block1, network.block2, network.block3, network.block4, network.block5):
        for weight in (p for p in block.convs.parameters() if p.ndim == 4):
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
        _spread(network, block.projection, _batch(), mean=-0.5, spread=3.0)
    return network


def _random_line_art() -> nn.Module:
    network = LineArtGenerator().eval()
    _spread(network, network.model4[1], _batch(), mean=0.0, spread=2.0)
    return network


def _batch() -> Tensor:
    return torch.from_numpy(photo(128, 128))[None]


def _size(preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    size = preprocessor["size"]
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)


def _spread(network: nn.Module, layer: Any, example: Tensor, mean: float, spread: float = 1.0) -> None:
    """Scales a convolution so that each of its channels has this mean and spread over the example.

    Random networks give nearly the same everywhere, which compares well with anything.
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(example)
        hook.remove()
        scale = spread / seen[0].std((0, 2, 3))
        layer.weight *= scale.reshape(-1, 1, 1, 1)
        layer.bias.copy_((layer.bias - seen[0].mean((0, 2, 3))) * scale + mean)


def _save_annotator(network: nn.Module, file: Path) -> Path:
    torch.save(network.state_dict(), file)
    return file


def _save(
    folder: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)
    torch.save(dict(state), folder / "pytorch_model.bin")
