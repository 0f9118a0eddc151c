"""Pillow's resize of 8-bit images as matrix products: the same values, inside a graph of a fixed size."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# Pillow's libImaging/Resample.c: coefficients are whole multiples of 2^-22, every pass rounds to 8 bits.
_BITS = 22
# They are split in two, so that every product and sum is a whole number that float32 holds exactly (and a factor one
# that TF32 holds).
_HALF = 2.0 ** (_BITS // 2)


class PillowResize(nn.Module):
    """Whole numbers 0–255, float32 [B,C,H,W] → [B,C,h,w]: what `Image.resize` makes of 8-bit images.

    Args:
        size, new_size: (height, width) in pixels.
        resample: Pillow's number of the filter, `Image.Resampling`.
    """

    def __init__(self, size: tuple[int, int], new_size: tuple[int, int], resample: int) -> None:
        super().__init__()
        passes = [_Pass(axis, size[axis], new_size[axis], resample) for axis in (1, 0) if size[axis] != new_size[axis]]
        self.passes = nn.Sequential(*passes)
        # Pillow 12.0 resizes along the rows first, 13.0 begins with what costs less. As each pass rounds, the order
        # matters (by one level): the Pillow that is installed is asked.
        noise = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        expected = np.array(Image.fromarray(noise).resize((new_size[1], new_size[0]), Image.Resampling(resample)))
        if not np.array_equal(self(torch.from_numpy(noise).float()[None, None])[0, 0].numpy(), expected):
            self.passes = nn.Sequential(*reversed(passes))

    def forward(self, image: Tensor) -> Tensor:
        return self.passes(image)


class _Pass(nn.Module):
    """[B,C,H,W] resized along its height (axis 0) or its width (1)."""

    high: Tensor
    low: Tensor

    def __init__(self, axis: int, old: int, new: int, resample: int) -> None:
        super().__init__()
        self.axis = axis
        # Resized as 32-bit integers, the identity matrix becomes the coefficients, rounded as Pillow rounds them.
        identity = Image.fromarray(np.eye(old, dtype=np.int32) << _BITS)
        coefficients = np.array(identity.resize((new, old), Image.Resampling(resample)), np.int64)
        high = coefficients // int(_HALF)
        self.register_buffer("high", torch.from_numpy(high).float(), persistent=False)
        self.register_buffer("low", torch.from_numpy(coefficients - high * int(_HALF)).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.axis == 1 else x.transpose(2, 3)
        whole = x @ self.high + torch.floor((x @ self.low) / _HALF)
        new = torch.floor(whole / _HALF + 0.5).clamp(0, 255)
        return new if self.axis == 1 else new.transpose(2, 3)
