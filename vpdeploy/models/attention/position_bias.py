"""Biases of attention scores by the relative position of two tokens; one per head.

Both give [1, heads, L, L]. ``index`` is [L * L]: which of the relative positions each pair of tokens has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TableBias(nn.Module):
    """The bias of every relative position is a parameter. table: [positions, heads]."""

    index: Tensor

    def __init__(self, table: nn.Parameter, index: Tensor, *, tokens: int, persistent: bool):
        super().__init__()
        self.tokens = tokens
        self.table = table
        self.register_buffer("index", index, persistent=persistent)

    def forward(self) -> Tensor:
        return _by_pair(self.table, self.index, self.tokens)


class MlpBias(nn.Module):
    """The bias is a small network's answer to the log-spaced distance of two tokens (Swin V2, arXiv:2111.09883).

    mlp: [positions, 2] -> [positions, heads]; coordinates: [..., 2], positions in all. With a ``gain`` the biases lie
    between 0 and ``gain``, by a sigmoid.
    """

    index: Tensor
    coordinates: Tensor

    def __init__(
        self, mlp: nn.Module, coordinates: Tensor, index: Tensor, *, tokens: int, gain: float | None, persistent: bool
    ):
        super().__init__()
        self.tokens = tokens
        self.gain = gain
        self.mlp = mlp
        self.register_buffer("coordinates", coordinates.reshape(-1, 2), persistent=persistent)
        self.register_buffer("index", index, persistent=persistent)

    def forward(self) -> Tensor:
        bias = _by_pair(self.mlp(self.coordinates), self.index, self.tokens)
        return bias if self.gain is None else self.gain * torch.sigmoid(bias)


def _by_pair(table: Tensor, index: Tensor, tokens: int) -> Tensor:
    """table: [positions, heads] -> [1, heads, L, L]."""
    return table[index].unflatten(0, (tokens, -1)).permute(2, 0, 1).unsqueeze(0).contiguous()
