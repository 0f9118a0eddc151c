"""Soft edges by holistically-nested edge detection: the network and the steps around it of controlnet_aux' `hed`."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HED(nn.Module):
    """image uint8 [B,H,W,3] → soft edges uint8 [B,H,W], white on black.

    Xie and Tu, arXiv 1504.06375, as lllyasviel trained it for ControlNet; the names of the weights are those of
    `ControlNetHED.pth` in lllyasviel/Annotators. H and W from 16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.block1 = _Block(3, 64, 2)
        self.block2 = _Block(64, 128, 2)
        self.block3 = _Block(128, 256, 3)
        self.block4 = _Block(256, 512, 3)
        self.block5 = _Block(512, 512, 3)

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[1:3]
        x = self.block1.features(image.to(torch.float32).permute(0, 3, 1, 2) - self.norm)
        edges = self.block1.projection(x)
        for block in (self.block2, self.block3, self.block4, self.block5):
            x = block.features(F.max_pool2d(x, 2))
            # As cv2.resize does by default: bilinear, the pixels' centers aligned.
            edges = edges + F.interpolate(block.projection(x), size=size, mode="bilinear", align_corners=False)
        return (torch.sigmoid(edges / 5) * 255).floor().squeeze(1).to(torch.uint8)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        channels = [inputs, *[outputs] * layers]
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(channels)))
        self.projection = nn.Conv2d(outputs, 1, 1)

    def features(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x
