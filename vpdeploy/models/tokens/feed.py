"""Learned rows beside an MLP's hidden units: the memory of MemVP (arXiv:2405.05615) without an image to read it from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeedMemory(nn.Module):
    """N further hidden units, without bias: a key and a value each. tokens: [N, 2 c], keys beside values."""

    def __init__(self, tokens: Tensor, *, dropout: float = 0.0):
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.dropout = nn.Dropout(dropout)

    def forward(self, y: Tensor, between: nn.Module) -> Tensor:
        """y: what the MLP reads, [n, L, c] -> [n, L, c]; between: its activation."""
        keys, values = self.dropout(self.tokens).chunk(2, dim=1)
        return between(y @ keys.t()) @ values


@torch.no_grad()
def widen(first: nn.Linear, second: nn.Linear, tokens: Tensor) -> None:
    """Change an MLP's two layers: the units of ``tokens``, [N, 2 c], come after theirs."""
    keys, values = tokens.to(first.weight).chunk(2, dim=1)
    first.weight = nn.Parameter(torch.cat([first.weight, keys]), requires_grad=first.weight.requires_grad)
    if first.bias is not None:
        zeros = first.bias.new_zeros(len(tokens))
        first.bias = nn.Parameter(torch.cat([first.bias, zeros]), requires_grad=first.bias.requires_grad)
    second.weight = nn.Parameter(
        torch.cat([second.weight, values.t()], dim=1), requires_grad=second.weight.requires_grad
    )
    first.out_features, second.in_features = len(first.weight), second.weight.shape[1]
