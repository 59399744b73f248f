"""What the replacements share: packed projections taken apart, and heads split from channels and joined again.

In shapes, L is a number of tokens, d the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Copies a part of the original, once however often it is asked for: what was shared stays shared.
Copy = Callable[[Any], Any]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """x: [n, L, heads * d] -> [n, heads, L, d]. The number of heads is whatever is left of them."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """x: [n, heads, L, d] -> [n, L, heads * d]."""
    # A copy, always: attention kernels differ in how their outputs lie in memory, and where a trace meets another one
    # than the ONNX exporter's decomposition, a flatten recorded as a view fails there.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(-2)


def thirds(packed: nn.Parameter, head_dim: int | None = None) -> list[nn.Parameter]:
    """The q, k and v rows of a packed projection. packed: [3 * heads * d, ...] -> three times [heads * d, ...].

    With ``head_dim`` the rows lie head by head, (heads, 3, d), without it part by part, (3, heads * d).
    """
    rows = packed.detach()
    if head_dim is None:
        parts = list(rows.chunk(3))
    else:
        parts = [part.flatten(0, 1) for part in rows.unflatten(0, (-1, 3, head_dim)).unbind(1)]
    return [nn.Parameter(part.clone(), requires_grad=packed.requires_grad) for part in parts]


def separate(packed: Any, head_dim: int | None = None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The q, k and v layers of a packed linear layer or 1x1 convolution, whose rows lie as `thirds` says."""
    biases = [None] * 3 if packed.bias is None else thirds(packed.bias, head_dim)
    q, k, v = (layer(w, b) for w, b in zip(thirds(packed.weight, head_dim), biases, strict=True))
    return q, k, v


def layer(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear | nn.Conv2d:
    """A linear layer of weight [out, in] or, of weight [out, in, 1, 1], a convolution. bias: [out]."""
    rows, columns = weight.shape[:2]
    # On the meta device nothing is allocated and no random number is drawn for values that are replaced at once.
    if weight.dim() == 4:
        new = nn.Conv2d(columns, rows, 1, bias=False, device="meta")
    else:
        new = nn.Linear(columns, rows, bias=False, device="meta")
    new.weight = weight
    new.register_parameter("bias", bias)
    return new
