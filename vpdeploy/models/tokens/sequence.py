"""Tokens in the sequence (VPT, arXiv:2203.12119): from the first block to the last, or those of one block alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpdeploy.models.attention.memory import LearnedTokens, Projection
from vpdeploy.models.tokens.blocks import stand_for


class WithTokens(LearnedTokens):
    """Blocks, one after the other, and learned tokens that go through them behind those of the image.

    What comes of them is dropped. The blocks keep their names.
    """

    def __init__(
        self, blocks: nn.Sequential, tokens: Tensor, *, dropout: float = 0.0, projection: Projection | None = None
    ):
        super().__init__(tokens, dropout=dropout, projection=projection)
        stand_for(self, blocks)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, L, c] -> [n, L, c]."""
        length = x.shape[1]
        x = torch.cat([x, self.dropped().to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        for block in self.children():
            x = block(x)
        return x[:, :length]  # fewer where the last block computes fewer


class InSequence(nn.Module):
    """A block as VPT-deep is published: its tokens stand in the sequence, and what comes of them is dropped. Nothing trains or
    ships so: it is what keys and values are compared with.
    """

    def __init__(self, block: nn.Module, tokens: Tensor):
        super().__init__()
        self.block = block
        self.tokens = nn.Parameter(tokens, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, L, c] -> [n, L, c]."""
        rows = self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return self.block(torch.cat([x, rows], dim=1))[:, : x.shape[1]]
