"""The CIFAR ResNets (arXiv:1512.03385 section 4.2), in the layout of the widely used checkpoints for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import ModelError
from vpdeploy.models.gather import ChannelGather


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights. [n, in, h, w] -> [n, out, h / stride, w / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ChannelGather(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels. [n, 3, h, w] -> [n, k], for any h and w."""

    def __init__(self, blocks_per_stage: int, classes: int):
        super().__init__()
        n = blocks_per_stage
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1, blocks=n)
        self.layer2 = _stage(16, 32, stride=2, blocks=n)
        self.layer3 = _stage(32, 64, stride=2, blocks=n)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels: int, out_channels: int, *, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, classes: int = 10) -> nn.Module:
    """A freshly initialised CIFAR ResNet of ``depth`` = 6n + 2 layers: [n, 3, h, w] -> [n, classes].

    Raises: ModelError for any other depth.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ModelError(f"cifar_resnet: got depth {depth}; expected 6n + 2, such as 8, 14, 20, 32, 44, 56 or 110")
    return CifarResNet(blocks, classes)
