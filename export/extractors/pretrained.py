"""transformers' networks for segmentation and depth, with its image processors' work as a part of them."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .pillow_resize import PillowResize


class Preprocess(nn.Module):
    """image uint8 [B,H,W,3] → pixel_values float32 [B,3,h,w]: resized, rescaled and normalized as `processor` does it.

    Args:
        processor: an image processor of transformers, of its `pil` backend.
        what: whose it is, for messages.

    Raises:
        UserError: the processor does anything else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any, width: int, height: int, what: str) -> None:
        super().__init__()
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        # The processor itself says what size it makes: it may keep the aspect ratio, or round to some multiple.
        expected = processor(noise, return_tensors="np").pixel_values
        self.resize = PillowResize((height, width), expected.shape[2:], int(processor.resample or 0))
        # Divided, not multiplied: that rounds as the processor's own float64 product with 1/255 does.
        self.divisor = 1 / processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        found = self(torch.from_numpy(noise)[None]).numpy()
        if not np.allclose(found, expected, atol=1e-4):
            raise UserError(
                f"the preprocessor_config.json of {what} asks for more than to resize, rescale and normalize: "
                "that cannot be a part of the graph"
            )

    def forward(self, image: Tensor) -> Tensor:
        pixels = self.resize(image.to(torch.float32).permute(0, 3, 1, 2))
        return (pixels / self.divisor - self.mean) / self.std


class Segmentation(nn.Module):
    """image uint8 [B,H,W,3] → labels uint8 [B,H,W].

    Args:
        network: pixel_values → logits, with at most 256 labels.
    """

    def __init__(self, preprocess: Preprocess, network: Any) -> None:
        super().__init__()
        self.preprocess, self.network = preprocess, network

    def forward(self, image: Tensor) -> Tensor:
        logits = self.network(self.preprocess(image)).logits
        # As transformers' post_process_semantic_segmentation brings them to the image's own size.
        logits = F.interpolate(logits, size=image.shape[1:3], mode="bilinear", align_corners=False)
        return logits.argmax(1).to(torch.uint8)


class Depth(nn.Module):
    """image uint8 [B,H,W,3] → inverse depth uint8 [B,H,W], near is bright, 255 is the nearest of each image.

    As the depth-estimation pipeline of transformers 4.38 does it, which the official demo pins; today's pipeline also
    subtracts the smallest value. What bicubic interpolation brings below 0 is 0 here; there it wraps around.

    Args:
        network: pixel_values → predicted_depth.
    """

    def __init__(self, preprocess: Preprocess, network: Any) -> None:
        super().__init__()
        self.preprocess, self.network = preprocess, network

    def forward(self, image: Tensor) -> Tensor:
        depth = self.network(self.preprocess(image)).predicted_depth.unsqueeze(1)
        depth = F.interpolate(depth, size=image.shape[1:3], mode="bicubic", align_corners=False)
        nearest = depth.amax((2, 3), keepdim=True).clamp(min=1e-9)  # of an image without any depth
        return (depth * 255 / nearest).clamp(0, 255).floor().squeeze(1).to(torch.uint8)
