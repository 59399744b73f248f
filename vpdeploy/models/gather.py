"""Subsample by stride and place channels: a shortcut without weights whose two sides can be pruned apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelGather(nn.Module):
    """The zero-padded shortcut of CIFAR ResNets ("option A", arXiv:1512.03385 section 4.2) as a gather.

    x: [n, in, h, w] -> [n, out, ceil(h / stride), ceil(w / stride)]. Source channel j is placed at output channel
    j + (out - in) // 2; all other output channels are zero.

    A slice and a pad tie the residual streams on both sides together by position. Here the position is data: a
    channel is removed from the input side by selecting from ``source`` [in] (the original ids still present), from the
    output side by selecting from ``target`` [out] (the original id that each output channel shows, or -1 for zero),
    and then calling ``reindex``. No buffer is persistent, so checkpoints of the plain network load as they are.
    """

    source: Tensor
    target: Tensor
    index: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        placed = torch.arange(out_channels) - (out_channels - in_channels) // 2
        present = (placed >= 0) & (placed < in_channels)
        self.register_buffer("source", torch.arange(in_channels), persistent=False)
        self.register_buffer("target", placed.where(present, torch.tensor(-1)), persistent=False)
        self.register_buffer("index", torch.empty(0, dtype=torch.int64), persistent=False)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.reindex()

    def reindex(self) -> None:
        """Recompute ``index`` [out] and the channel counts from ``source`` and ``target``.

        ``index`` is the position in ``source`` of each target, or len(source), the appended zero channel, where the
        target is -1 or its source was removed.
        """
        self.in_channels, self.out_channels = len(self.source), len(self.target)
        same = self.target[:, None] == self.source[None, :]  # [out, in]; -1 equals no id
        self.index = same.int().argmax(dim=1).masked_fill(~same.any(dim=1), self.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        # [n, in, h, w] -> [n, in + 1, h, w] -> [n, out, h, w]
        return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
