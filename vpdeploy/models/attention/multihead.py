"""nn.MultiheadAttention with projections of their own (torchvision's ViT, nn.Transformer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.models.attention.layers import Copy, join_heads, layer, split_heads, thirds
from vpdeploy.models.attention.memory import recall, widened


class MultiheadAttention(nn.Module):
    """Attention of queries to keys and values, called like nn.MultiheadAttention. ``memory`` gives further keys and values.

    ``rows``: how many of the first queries are computed; None for all.
    """

    # nn.TransformerEncoderLayer and nn.TransformerEncoder read these to see whether their fused kernel, which wants one
    # packed projection, can be called. It cannot.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        proj: nn.Module,
        *,
        head_dim: int,
        dropout: float,
        batch_first: bool,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.dropout = dropout
        self.batch_first = batch_first
        self.q, self.k, self.v, self.proj = q, k, v, proj
        self.memory: nn.Module | None = None
        self.rows: int | None = None

    def queries(self, x: Tensor) -> Tensor:
        return split_heads(self.q(x), self.head_dim)

    def keys(self, x: Tensor) -> Tensor:
        return split_heads(self.k(x), self.head_dim)

    def values(self, x: Tensor) -> Tensor:
        return split_heads(self.v(x), self.head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the weights where needed. Everything as nn.MultiheadAttention has it:

        query: [n, L, c] (or [L, n, c], or [L, c] unbatched); key, value: [n, S, ...]; key_padding_mask: [n, S];
        attn_mask: [L, S] or [n * heads, L, S]; boolean masks are True where nobody may look, others are added to the
        scores. Weights: [n, L, S], or [n, heads, L, S] when not averaged.

        Raises: ValueError for ``is_causal``, a mere hint, without the mask it hints at.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: got True without attn_mask; expected the mask that it is a hint at")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q = self.queries(query if self.rows is None else query[:, : self.rows])
        k, v = recall(self.memory, self, self.keys(key), self.values(value))
        mask = _merge(attn_mask, key_padding_mask, q)
        mask = None if mask is None else widened(mask, k)
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, self.dropout, self.training)
            out = weights @ v
        else:
            dropout = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=self.scale)
        out = self.proj(join_heads(out))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores, to be broadcast to [n, heads, L, S]. q: [n, heads, L, d]."""
    parts = []
    if attn_mask is not None:
        parts.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (q.shape[0], -1)))
    if key_padding_mask is not None:
        parts.append(key_padding_mask.unsqueeze(1).unsqueeze(1))
    parts = [_additive(part, q.dtype) for part in parts]
    return sum(parts[1:], start=parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def unfit_multihead(module: nn.MultiheadAttention) -> str | None:
    """Why ``module`` has no equal with separate heads."""
    if module.bias_k is not None:
        return "add_bias_kv appends a learned key and value to every sequence"
    if module.add_zero_attn:
        return "add_zero_attn appends a key and value of zeros to every sequence"
    return None


def build_multihead(module: nn.MultiheadAttention, copied: Copy) -> MultiheadAttention:
    """The equal of ``module``."""
    if module.in_proj_weight is None:
        weights = [copied(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    else:
        weights = thirds(module.in_proj_weight)
    biases = [None] * 3 if module.in_proj_bias is None else thirds(module.in_proj_bias)
    q, k, v = (layer(w, b) for w, b in zip(weights, biases, strict=True))
    # Its own class of linear layer only keeps quantisation away.
    proj = layer(copied(module.out_proj.weight), copied(module.out_proj.bias))
    return MultiheadAttention(
        q, k, v, proj, head_dim=module.head_dim, dropout=module.dropout, batch_first=module.batch_first
    )
