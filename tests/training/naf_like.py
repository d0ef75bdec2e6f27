"""A convolutional U-Net of simple gates and channel attention, as a file of one's own would hold it."""

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1, self.conv3 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.conv4, self.conv5 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, width, 1, 1)) for _ in range(2))

    def forward(self, x):
        gated = _gate(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.beta * self.conv3(gated * self.attention(gated))
        return x + self.gamma * self.conv5(_gate(self.conv4(self.norm2(x))))


@ARCH_REGISTRY.register()
class NAFLike(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.encoders = nn.ModuleList([nn.Sequential(Block(width))])
        self.down = nn.Conv2d(width, 2 * width, 2, 2)
        self.middle = nn.Sequential(Block(2 * width), Block(2 * width))
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 1, bias=False), nn.PixelShuffle(2))
        self.decoders = nn.ModuleList([nn.Sequential(Block(width))])

    def forward(self, x):
        height, width = x.shape[-2:]
        features = self.encoders[0](self.intro(F.pad(x, (0, width % 2, 0, height % 2))))
        features = self.decoders[0](features + self.up(self.middle(self.down(features))))
        return x + self.ending(features)[..., :height, :width]


def _gate(x):
    first, second = x.chunk(2, dim=1)
    return first * second
