"""Prompts that image tokens look at in an attention of their own: CVPT (arXiv:2408.14961), and what it folds to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpdeploy.models.attention.layers import join_heads
from vpdeploy.models.attention.memory import ConstantMemory
from vpdeploy.models.attention.tokens import TokenAttention
from vpdeploy.models.tokens.blocks import Attention


class CrossAttention(nn.Module):
    """Queries of the stream to keys and values of ``memory``, by the projections of the block's own attention, without a norm.
    They are read where they stand, not copied: heads that are removed there are gone here too.
    """

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """x: [n, L, c] -> [n, L, c]."""
        q = attention.queries(x)
        k, v = (
            rows.to(q.dtype) for rows in self.memory(attention)
        )  # of no image: written out, they need not be repeated
        weights = (attention.scale * q @ k.transpose(-2, -1)).softmax(-1)
        return attention.proj(join_heads(weights.to(v.dtype) @ v))


class FoldedCross(nn.Module):
    """``CrossAttention`` as two linear layers: all heads' scores at once, c -> heads * N, softmax over each N, heads * N -> c."""

    def __init__(self, scores: nn.Linear, out: nn.Linear, *, tokens: int):
        super().__init__()
        self.scores, self.out, self.tokens = scores, out, tokens

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        weights = self.scores(x).unflatten(-1, (-1, self.tokens)).softmax(-1)
        return self.out(weights.flatten(-2))


@torch.no_grad()
def fold_cross(tokens: Tensor, attention: Attention) -> nn.Module:
    """The cheapest form in evaluation of a ``CrossAttention`` to ``tokens``, [N, c]: constant keys and values, or two linear
    layers. These take fewer products where N is below c / (heads - 1), if no head is gone, and are possible where nothing stands
    between projection and product.
    """
    rows = tokens.unsqueeze(0)
    k, v = attention.keys(rows), attention.values(rows)  # [1, heads, N, d]
    heads, count, head_dim = k.shape[1:]
    width, inner = tokens.shape[1], heads * head_dim
    if not _is_linear(attention) or 2 * heads * count * width >= 2 * width * inner + 2 * count * inner:
        return CrossAttention(ConstantMemory(k, v))
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


def grows_with_fewer(cross: nn.Module | None, attention: Attention) -> bool:
    """Whether ``cross``, folded, would hold more numbers with fewer tokens: as two linear layers, not as keys and values."""
    return isinstance(cross, CrossAttention) and _is_linear(attention)


def _is_linear(attention: Attention) -> bool:
    if isinstance(attention, TokenAttention):
        return isinstance(attention.q_norm, nn.Identity)
    return getattr(attention, "logit_scale", None) is None
