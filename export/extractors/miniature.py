"""The miniature's extractors as modules: small networks for seg and depth, fixed filters for hed and lineart.

Every module takes image float [B,3,H,W] in [0,1], H and W multiples of 8. All are differentiable up to their last
rounding or argmax, so training can look through them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...messages import unknown_choice
from ...schema import Meta, Record, convert, read_object
from ..weights import check_finite, check_weights, read_weights


class DenseNetwork(nn.Module):
    """image [B,3,H,W] → [B,outputs,H,W]: a small U-Net at 1/2, 1/4 and 1/8 of the size, refined at full size.

    Args:
        width: channels at 1/2; 2·width and 4·width at 1/4 and 1/8.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        w = width
        self.stem = nn.Conv2d(3, w, 5, stride=2, padding=2)
        self.down1, self.down2 = _block(w, 2 * w, 2), _block(2 * w, 4 * w, 2)
        self.mid = nn.Sequential(_block(4 * w, 4 * w), _block(4 * w, 4 * w))
        self.up2, self.up1 = _block(6 * w, 2 * w), _block(3 * w, w)
        self.head = nn.Conv2d(w, outputs, 1)
        self.refine = nn.Sequential(
            nn.Conv2d(outputs + 3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, outputs, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = image * 2 - 1
        half = F.silu(self.stem(x))
        quarter = self.down1(half)
        eighth = self.mid(self.down2(quarter))
        quarter = self.up2(torch.cat([_double(eighth), quarter], 1))
        half = self.up1(torch.cat([_double(quarter), half], 1))
        coarse = F.interpolate(self.head(half), scale_factor=2.0, mode="bilinear", align_corners=False)
        return coarse + self.refine(torch.cat([coarse, x], 1))


class SegmentationNetwork(nn.Module):
    """image → ADE20K labels uint8 [B,H,W]. `labels` holds the ADE20K label of each output channel."""

    labels: Tensor

    def __init__(self, width: int, labels: list[int]) -> None:
        super().__init__()
        self.network = DenseNetwork(width, len(labels))
        self.register_buffer("labels", torch.tensor(labels), persistent=False)

    def logits(self, image: Tensor) -> Tensor:
        """[B,classes,H,W], before argmax."""
        return self.network(image)

    def forward(self, image: Tensor) -> Tensor:
        return self.labels[self.logits(image).argmax(1)].to(torch.uint8)


class DepthNetwork(nn.Module):
    """image → inverse depth [B,H,W] in [0,1]: near is bright, the sky is 0, as MiDaS and DPT give it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = DenseNetwork(width, 1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.sigmoid(self.network(image)).squeeze(1)


class SoftEdges(nn.Module):
    """image → soft edges [B,H,W]: the magnitude of the blurred image's gradient over all three channels.

    What is below `low` counts as texture and becomes 0, `high` and above becomes 1.
    """

    blur: Tensor
    sobel: Tensor

    def __init__(self, sigma: float, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("blur", gaussian(sigma), persistent=False)
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        self.register_buffer("sobel", torch.stack([across, across.T])[:, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        planes = filter_plane(image.reshape(b * c, 1, h, w), self.blur)
        gradient = F.conv2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), self.sobel)
        # The small constant keeps the root's slope finite where the image is flat.
        magnitude = (gradient.reshape(b, 2 * c, h, w).square().sum(1) + 1e-8).sqrt()
        return ((magnitude - self.low) / (self.high - self.low)).clamp(0, 1)


class LineArt(nn.Module):
    """image → white lines on black [B,H,W]: where a channel is darker than around it, by a difference of Gaussians.

    Winnemöller et al., "XDoG", 2012, equation 1, without its sharpening; the strongest of the three channels counts, so
    that a border between colors of one brightness shows too. `low` and `high` as in `SoftEdges`.
    """

    narrow: Tensor
    wide: Tensor

    def __init__(self, sigma: float, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.register_buffer("narrow", gaussian(sigma), persistent=False)
        self.register_buffer("wide", gaussian(1.6 * sigma), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        planes = image.reshape(b * c, 1, h, w)
        darker = filter_plane(planes, self.wide) - filter_plane(planes, self.narrow)
        response = darker.reshape(b, c, h, w).amax(1)
        return ((response - self.low) / (self.high - self.low)).clamp(0, 1)


class MapExtractor(nn.Module):
    """image uint8 [B,H,W,3] → map uint8 [B,H,W], by one of the modules here: labels, or gray levels (1.0 is 255)."""

    def __init__(self, extractor: nn.Module, labels: bool) -> None:
        super().__init__()
        self.extractor = extractor
        self.labels = labels

    def forward(self, image: Tensor) -> Tensor:
        found = self.extractor(image.to(torch.float32).div(255.0).permute(0, 3, 1, 2))
        if not self.labels:
            found = (found.clamp(0, 1) * 255).round()
        return found.to(torch.uint8)


def gaussian(sigma: float) -> Tensor:
    """Normalized kernel [2r+1] with r = ceil(3·sigma)."""
    radius = int(-(-3 * sigma // 1))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    return kernel / kernel.sum()


def filter_plane(plane: Tensor, kernel: Tensor) -> Tensor:
    """[B,1,H,W] convolved with `kernel` along both axes, borders replicated."""
    r = kernel.shape[0] // 2
    padded = F.pad(plane, (r, r, r, r), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.reshape(1, 1, 1, -1)), kernel.reshape(1, 1, -1, 1))


_TYPES: dict[str, type[nn.Module]] = {
    "segmentation_network": SegmentationNetwork,
    "depth_network": DepthNetwork,
    "soft_edges": SoftEdges,
    "line_art": LineArt,
}


class _Network(Record):
    """Four groups of channels are normalized."""

    width: Annotated[int, Meta(ge=4, le=512, multiple_of=4)]


class _Labels(_Network):
    labels: Annotated[list[Annotated[int, Meta(ge=0, le=255)]], Meta(min_length=1, max_length=256)]


class _Filter(Record):
    sigma: Annotated[float, Meta(gt=0, le=20)]
    low: Annotated[float, Meta(ge=0, le=10)]
    high: Annotated[float, Meta(ge=0, le=10)]


_ARGUMENTS: dict[str, type[Record]] = {
    "segmentation_network": _Labels,
    "depth_network": _Network,
    "soft_edges": _Filter,
    "line_art": _Filter,
}


def make_extractor(config: Mapping[str, Any]) -> nn.Module:
    """A new extractor from `{"type": …, **arguments}`.

    Raises:
        ValueError: the type is unknown, or cannot have these arguments.
    """
    kind = config.get("type")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise unknown_choice("extractor type", kind, _TYPES)
    checked = convert({key: value for key, value in config.items() if key != "type"}, _ARGUMENTS[kind])
    if isinstance(checked, _Filter) and not checked.low < checked.high:
        raise ValueError(f"low is {checked.low:g}, high {checked.high:g}: low is the smaller one")
    return _TYPES[kind](**msgspec.to_builtins(checked))


def load_extractor(folder: Path) -> nn.Module:
    """The extractor of a folder with `config.json` and, for a network, `model.safetensors`; float32, for inference.

    Raises:
        ValueError: the config is none.
        UserError: its weights are missing or another network's.
    """
    extractor = make_extractor(read_object(folder / "config.json"))
    if extractor.state_dict():
        state, what = read_weights([folder / "model.safetensors"]), f"the extractor {folder}"
        check_weights(extractor, state, what)
        check_finite(state, what)
        extractor.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return extractor.eval().requires_grad_(False)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
