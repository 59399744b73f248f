"""A clamp to [0, 1] through which a prompt can learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        # A descent step moves x against the gradient: at 0 a positive gradient pushes it further out, at 1 a negative.
        outward = ((x <= 0) & (grad > 0)) | ((x >= 1) & (grad < 0))
        return grad.masked_fill(outward, 0)


def clamp(x: Tensor) -> Tensor:
    """Forward: clamp to [0, 1]. Backward: the gradient, unless ``x`` is at or beyond a bound and a descent step would push
    it further out.

    torch's own clamp has gradient 0 exactly at the bounds (1 in older releases), so a zero-initialised frame on zero
    padding would never learn; and no gradient beyond them, so a pixel that left the range could never come back.
    """
    return _Clamp.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.clamp(0, 1)  # type: ignore[no-any-return]
