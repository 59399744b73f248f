"""Prompts that image tokens look at in an attention of their own: CVPT (arXiv:2408.14961), and what it folds to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.models.attention.layers import join_heads
from vpdeploy.models.attention.tokens import TokenAttention
from vpdeploy.models.tokens.blocks import Attention


class CrossTokens(nn.Module):
    """Queries of the stream, keys and values of learned tokens [N, c], by the projections of the block's own attention; no norm
    before. They are read where they stand, not copied: heads that are removed there are gone here too.
    """

    def __init__(self, tokens: Tensor, *, dropout: float = 0.0):
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """x: [n, L, c] -> [n, L, c]."""
        rows = self.dropout(self.tokens).unsqueeze(0)
        return _attend(x, attention, attention.keys(rows), attention.values(rows))


class ConstantCross(nn.Module):
    """``CrossTokens`` with its keys and values as they are: [1, heads, N, d] each."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key = nn.Parameter(key, requires_grad=False)
        self.value = nn.Parameter(value, requires_grad=False)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        return _attend(x, attention, self.key, self.value)


class FoldedCross(nn.Module):
    """``CrossTokens`` as two linear layers: all heads' scores at once, c -> heads * N, softmax over each N, heads * N -> c."""

    def __init__(self, scores: nn.Linear, out: nn.Linear, *, tokens: int):
        super().__init__()
        self.scores, self.out, self.tokens = scores, out, tokens

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        weights = self.scores(x).unflatten(-1, (-1, self.tokens)).softmax(-1)
        return self.out(weights.flatten(-2))


def _attend(x: Tensor, attention: Attention, k: Tensor, v: Tensor) -> Tensor:
    q = attention.queries(x)
    k, v = (rows.to(q.dtype).expand(q.shape[0], -1, -1, -1) for rows in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return attention.proj(join_heads(out))


@torch.no_grad()
def fold_cross(cross: CrossTokens, attention: Attention) -> nn.Module:
    """The cheapest equal of ``cross`` in evaluation: with constant keys and values, or as two linear layers, which takes less
    where N is below about d / (heads - 1) * heads, and is possible where nothing stands between projection and product.
    """
    rows = cross.tokens.unsqueeze(0)
    k, v = attention.keys(rows), attention.values(rows)  # [1, heads, N, d]
    heads, count, head_dim = k.shape[1:]
    width, inner = cross.tokens.shape[1], heads * head_dim
    if not _is_linear(attention) or 2 * heads * count * width >= 2 * width * inner + 2 * count * inner:
        return ConstantCross(k, v)
    q, proj = attention.q, attention.proj
    assert isinstance(q, nn.Linear) and isinstance(proj, nn.Linear)
    by_head = q.weight.unflatten(0, (heads, head_dim))  # [heads, d, c]
    scores = nn.Linear(width, heads * count).to(q.weight)
    scores.weight.copy_(attention.scale * (k[0] @ by_head).flatten(0, 1))
    bias = torch.zeros_like(q.weight[:, 0]) if q.bias is None else q.bias
    scores.bias.copy_(attention.scale * (k[0] @ bias.view(heads, head_dim, 1)).flatten())
    out = nn.Linear(heads * count, proj.out_features, bias=proj.bias is not None).to(proj.weight)
    from_head = proj.weight.unflatten(1, (heads, head_dim)).permute(1, 2, 0)  # [heads, d, c]
    out.weight.copy_((v[0] @ from_head).flatten(0, 1).t())
    if proj.bias is not None:
        out.bias.copy_(proj.bias)
    return FoldedCross(scores, out, tokens=count)


def _is_linear(attention: Attention) -> bool:
    if isinstance(attention, TokenAttention):
        return isinstance(attention.q_norm, nn.Identity) and attention.gate is None
    return getattr(attention, "logit_scale", None) is None
