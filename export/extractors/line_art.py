"""Line art by a generator network: the network and the steps around it of controlnet_aux' `lineart`."""

import torch
from torch import Tensor, nn


class LineArtGenerator(nn.Module):
    """image uint8 [B,H,W,3] → line art uint8 [B,H,W], white lines on black. H and W are multiples of 4.

    Chan, Durand and Isola, "Learning to generate line drawings", arXiv 2203.12691; the names of the weights are those
    of `sk_model.pth` (and of `sk_model2.pth`, the coarse one) in lllyasviel/Annotators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, 64, 7), *_norm(64))
        down1 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        down2 = nn.Conv2d(128, 256, 3, stride=2, padding=1)
        self.model1 = nn.Sequential(down1, *_norm(128), down2, *_norm(256))
        self.model2 = nn.Sequential(*(_Residual(256) for _ in range(3)))
        self.model3 = nn.Sequential(_double(256, 128), *_norm(128), _double(128, 64), *_norm(64))
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32).div(255.0).permute(0, 3, 1, 2)
        drawing = self.model4(self.model3(self.model2(self.model1(self.model0(x)))))
        return (255 - (drawing * 255).floor()).squeeze(1).to(torch.uint8)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), *_norm(channels)]
        second = [nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)]
        self.conv_block = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def _norm(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(channels), nn.ReLU()


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
