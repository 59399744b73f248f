"""Attention inside windows, with a bias by relative position: torchvision's and timm's Swin (V1 and V2), MaxViT."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpdeploy.models.attention.layers import join_heads, split_heads
from vpdeploy.models.attention.memory import recall, widened


class WindowAttention(nn.Module):
    """Attention among the L tokens of each window. x: [..., L, c] -> [..., L, c].

    ``logit_scale``, [heads, 1, 1], makes it cosine attention (arXiv:2111.09883): q and k count by their direction only,
    and the scale, at most 100, is learned as its logarithm; then ``scale`` is 1. ``memory`` gives every window keys and values
    beside those of its tokens.
    """

    def __init__(
        self,
        q: nn.Module,
        k: nn.Module,
        v: nn.Module,
        proj: nn.Module,
        *,
        position_bias: nn.Module,
        head_dim: int,
        scale: float,
        logit_scale: nn.Parameter | None = None,
        dropout: float,
        proj_dropout: float,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = dropout
        self.proj_dropout = proj_dropout
        self.q, self.k, self.v, self.proj = q, k, v, proj
        self.position_bias = position_bias
        self.logit_scale = logit_scale
        self.memory: nn.Module | None = None

    def queries(self, x: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.head_dim)
        if self.logit_scale is None:
            return q
        return F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp()

    def keys(self, x: Tensor) -> Tensor:
        k = split_heads(self.k(x), self.head_dim)
        return k if self.logit_scale is None else F.normalize(k, dim=-1)

    def values(self, x: Tensor) -> Tensor:
        return split_heads(self.v(x), self.head_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` is added to the scores. mask: [windows, L, L], where x is [n * windows, L, c]."""
        windows = x.flatten(0, -3)  # [..., L, c] -> [n, L, c]: the ONNX exporter knows 4-dimensional attention only
        q, k, v = self.queries(windows), self.keys(windows), self.values(windows)
        # Normalising and scaling may widen half precision; the kernel wants one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        bias = self.position_bias()  # [1, heads, L, L]
        if mask is not None:
            bias = bias + mask.unsqueeze(1)  # [windows, heads, L, L]
            bias = bias.expand(windows.shape[0] // mask.shape[0], -1, -1, -1, -1).flatten(0, 1)
        k, v = recall(self.memory, self, k, v)
        bias = widened(bias, k)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, bias.to(v.dtype), dropout_p=dropout, scale=self.scale)
        out = F.dropout(self.proj(join_heads(out)), self.proj_dropout, self.training)
        return out.unflatten(0, x.shape[:-2])


class ShiftedWindowAttention(nn.Module):
    """A map cut into windows, shifted cyclically by ``shift`` before, and put together again. x: [n, h, w, c].

    Tokens that only the shift made neighbours do not see each other (arXiv:2103.14030).
    """

    def __init__(self, attention: WindowAttention, *, window: tuple[int, int], shift: tuple[int, int]):
        super().__init__()
        self.window = window
        self.shift = shift
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        (window_h, window_w) = self.window
        x = F.pad(x, (0, 0, 0, -w % window_w, 0, -h % window_h))
        size = x.shape[1:3]
        # A window that covers the map has no neighbour to look at.
        shift = [0 if along >= of else by for along, of, by in zip(self.window, size, self.shift, strict=True)]
        mask = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
            mask = _shift_mask(x, self.window, shift)
        windows = _partition(x, self.window)  # [n, rows, columns, L, c]
        rows, columns = windows.shape[1:3]
        out = self.attention(windows.flatten(0, 2), mask)
        out = out.unflatten(0, (-1, rows, columns)).unflatten(3, self.window)
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [n, h, w, c]
        if any(shift):
            out = out.roll((shift[0], shift[1]), dims=(1, 2))
        return out[:, :h, :w].contiguous()


class MapAttention(nn.Module):
    """Attention among all places of a map. x: [n, c, h, w], or [n, h, w, c] with ``channels_last``."""

    def __init__(self, attention: WindowAttention, *, channels_last: bool):
        super().__init__()
        self.channels_last = channels_last
        self.attention = attention

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """``shared_rel_pos`` is for attention without a bias of its own, as in timm; it is not looked at."""
        if self.channels_last:
            return self.attention(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])
        out = self.attention(x.flatten(2).transpose(1, 2))  # [n, c, h, w] -> [n, h * w, c]
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


def _partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """x: [n, h, w, ...] -> [n, rows, columns, L, ...]."""
    cells = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # [n, rows, window h, columns, window w, ...]
    return cells.transpose(2, 3).flatten(3, 4)


def _shift_mask(x: Tensor, window: tuple[int, int], shift: list[int]) -> Tensor:
    """[windows, L, L]: -100 where two tokens of a window came from different ends of the map, else 0. x: [n, h, w, c]."""
    ends = []
    for size, along, by in zip(x.shape[1:3], window, shift, strict=True):
        at = torch.arange(size, device=x.device)
        ends.append((at >= size - along).long() + (at >= size - by).long())  # which of three parts of the axis
    region = 3 * ends[0].unsqueeze(1) + ends[1]  # [h, w]
    region = _partition(region.unsqueeze(0), window).flatten(0, 2)  # [windows, L]
    apart = region.unsqueeze(1) != region.unsqueeze(2)
    # -100, and not -inf, is what both libraries train with.
    return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0)
