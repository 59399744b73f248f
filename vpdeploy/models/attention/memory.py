"""Keys and values that attention reads beside those of its tokens: what prompts amount to whose outputs nobody reads.

A prompt that is replaced before every block (VPT-deep, arXiv:2203.12119) matters as a key and a value alone: its query, its
attention, projection and MLP are dead work. So it never enters the sequence here, neither in training nor in the file.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(Protocol):
    """What a memory asks of the attention that reads it. x: [n, L, c] -> [n, heads, L, d], as it compares and sums them."""

    def queries(self, x: Tensor) -> Tensor: ...

    def keys(self, x: Tensor) -> Tensor: ...

    def values(self, x: Tensor) -> Tensor: ...


Projection = tuple[nn.Parameter, nn.Parameter]  # weight [c, w] and bias [c], of all tokens of one network together


class LearnedTokens(nn.Module):
    """Tokens [N, c]; or [N, w], with a ``projection`` that learns beside them."""

    projection_weight: nn.Parameter | None
    projection_bias: nn.Parameter | None

    def __init__(self, tokens: Tensor, *, dropout: float, projection: Projection | None):
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.rate = dropout
        weight, bias = projection or (None, None)
        self.register_parameter("projection_weight", weight)
        self.register_parameter("projection_bias", bias)

    def rows(self) -> Tensor:
        """What they are to their block: [N, c]."""
        weight = self.projection_weight
        return self.tokens if weight is None else F.linear(self.tokens, weight, self.projection_bias)

    def dropped(self) -> Tensor:
        """The same; in training some entries are 0."""
        return F.dropout(self.rows(), self.rate, self.training)


class PromptTokens(LearnedTokens):
    """Tokens that stand before ``norm``, the layer whose output attention reads. Those of no token: [0, c]."""

    def __init__(self, tokens: Tensor, norm: nn.Module, *, dropout: float = 0.0, projection: Projection | None = None):
        super().__init__(tokens, dropout=dropout, projection=projection)
        self._norm = (norm,)  # in a tuple: it is the block's, which holds its parameters

    def forward(self, attention: Attention) -> tuple[Tensor, Tensor]:
        """Keys and values: [1, heads, N, d] each."""
        (norm,) = self._norm
        rows = norm(self.dropped().unsqueeze(0))
        return attention.keys(rows), attention.values(rows)


class ConstantMemory(nn.Module):
    """Keys and values as they are: [1, heads, N, d] each."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key = nn.Parameter(key, requires_grad=False)  # a parameter, as it was, and counts as one
        self.value = nn.Parameter(value, requires_grad=False)

    def forward(self, attention: Attention) -> tuple[Tensor, Tensor]:
        return self.key, self.value


def recall(memory: nn.Module | None, attention: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``k`` and ``v``, [n, heads, L, d], and after them what ``memory`` holds."""
    if memory is None:
        return k, v
    # Repeated, not expanded: an ONNX graph writes the other sizes, heads among them, for the latter.
    more = (
        rows.to(own.dtype).repeat(own.shape[0], 1, 1, 1) for rows, own in zip(memory(attention), (k, v), strict=True)
    )
    k, v = (torch.cat(both, dim=2) for both in zip((k, v), more, strict=True))
    return k, v


def widened(mask: Tensor, keys: Tensor) -> Tensor:
    """``mask``, [..., L, L], for keys [n, heads, L + N, d]: every token may look at what is remembered, which has no position."""
    more = keys.shape[2] - mask.shape[-1]
    return F.pad(mask, (0, more), value=mask.dtype == torch.bool) if more else mask
