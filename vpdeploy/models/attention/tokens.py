"""Self-attention among the tokens of a sequence, as timm's vision transformers have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.models.attention.layers import join_heads, split_heads
from vpdeploy.models.attention.memory import recall, widened


class TokenAttention(nn.Module):
    """Attention among L tokens. x: [n, L, c] -> [n, L, c].

    ``q_norm`` and ``k_norm`` work on each head of its own, [n, heads, L, d]. ``gate``, [n, L, c] -> [n, L, heads * d],
    multiplies by its sigmoid what proj reads. The first ``prefix`` tokens have no place in the image to turn by.
    ``memory`` gives keys and values beside those of x. ``rows``: how many of the first tokens ask; None for all.
    """

    def __init__(
        self,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        proj: nn.Module,
        *,
        q_norm: nn.Module,
        k_norm: nn.Module,
        gate: nn.Module | None,
        head_dim: int,
        dropout: float,
        proj_dropout: float,
        prefix: int = 0,
        rotate_half: bool = False,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.dropout = dropout
        self.proj_dropout = proj_dropout
        self.prefix = prefix
        self.rotate_half = rotate_half
        self.q, self.k, self.v, self.proj = q, k, v, proj
        self.q_norm, self.k_norm, self.gate = q_norm, k_norm, gate
        self.memory: nn.Module | None = None
        self.rows: int | None = None

    def queries(self, x: Tensor) -> Tensor:
        return self.q_norm(split_heads(self.q(x), self.head_dim))

    def keys(self, x: Tensor) -> Tensor:
        return self.k_norm(split_heads(self.k(x), self.head_dim))

    def values(self, x: Tensor) -> Tensor:
        return split_heads(self.v(x), self.head_dim)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, rope: Tensor | None = None
    ) -> Tensor:
        """``attn_mask`` is True where a token may look, or added to the scores; it broadcasts to [n, heads, L, L].

        rope: [..., L - prefix, 2 * d], sines and cosines by which q and k are turned.
        """
        asking = x if self.rows is None else x[:, : self.rows]
        q, k, v = self.queries(asking), self.keys(x), self.values(x)
        if rope is not None:
            q, k = self._turned(q, rope), self._turned(k, rope)
        # Norms and rotations may widen half precision; the kernel wants one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        k, v = recall(self.memory, self, k, v)
        mask = None if attn_mask is None else widened(attn_mask, k)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale)
        out = join_heads(out)
        if self.gate is not None:
            out = out * self.gate(asking).sigmoid()
        return F.dropout(self.proj(out), self.proj_dropout, self.training)

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotary position embedding (arXiv:2104.09864). x: [n, heads, L, d]."""
        first, rest = x[:, :, : self.prefix], x[:, :, self.prefix :]
        sine, cosine = rope.chunk(2, dim=-1)
        if self.rotate_half:  # pairs (i, i + d / 2)
            a, b = rest.chunk(2, dim=-1)
            turned = torch.cat((-b, a), dim=-1)
        else:  # pairs (2 i, 2 i + 1)
            a, b = rest[..., ::2], rest[..., 1::2]
            turned = torch.stack((-b, a), dim=-1).flatten(-2)
        return torch.cat((first, (rest * cosine + turned * sine).to(x.dtype)), dim=2)


class RotaryAttention(nn.Module):
    """`TokenAttention`, called like timm's AttentionRope. x: [n, L, c] -> [n, L, c]."""

    def __init__(self, attention: TokenAttention):
        super().__init__()
        self.attention = attention

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.attention(x, attn_mask, is_causal, rope=rope)
