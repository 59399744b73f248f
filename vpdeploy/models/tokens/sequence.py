"""Tokens in the sequence (VPT, arXiv:2203.12119): from the first block to the last, or those of one block alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpdeploy.models.tokens.blocks import stand_for


class WithTokens(nn.Module):
    """Blocks, one after the other, and learned tokens [N, c] that go through them behind those of the image.

    What comes of them is dropped. The blocks keep their names.
    """

    def __init__(self, blocks: nn.Sequential, tokens: Tensor, *, dropout: float = 0.0):
        super().__init__()
        stand_for(self, blocks)
        self.tokens = nn.Parameter(tokens)
        self.rate = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, L, c] -> [n, L, c]."""
        rows = nn.functional.dropout(self.tokens, self.rate, self.training)
        length = x.shape[1]
        x = torch.cat([x, rows.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
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
