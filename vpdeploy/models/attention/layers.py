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
    return [_parameter(part, packed) for part in parts]


def separate(packed: Any, head_dim: int | None = None) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The q, k and v layers of a packed linear layer or 1x1 convolution, whose rows lie as `thirds` says."""
    biases = [None] * 3 if packed.bias is None else thirds(packed.bias, head_dim)
    q, k, v = (layer(w, b) for w, b in zip(thirds(packed.weight, head_dim), biases, strict=True))
    return q, k, v


def layer(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer. weight: [out, in], or [out, in, 1, 1] of a convolution; bias: [out]."""
    # On the meta device nothing is allocated and no random number is drawn for values that are replaced at once.
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = weight if weight.dim() == 2 else _parameter(weight.detach().flatten(1), weight)
    new.register_parameter("bias", bias)
    return new


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)
