"""Norms without their statistics: what else a removal changes shows only where they are out of the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions with this name take (input, shape or number of groups, weight, bias, eps).
NORMS = ("layer_norm", "group_norm", "rms_norm")


class norms_without_statistics(TorchFunctionMode):
    """While it is entered, layer, group and RMS norms squash each value by itself instead of centring and scaling it by its
    neighbours', then scale and shift as before.

    A channel's own value passes, so that a wrong index shows; nothing that is removed reaches what stays, so that what should
    be exact is. Bounded, or a deep network without norms would leave the range of numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in NORMS:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "shape", "weight", "bias"), args, strict=False)) | (kwargs or {})
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        squashed = 3 * torch.tanh(x / 3)
        if isinstance(weight, Tensor):
            squashed = squashed * _shaped(weight, x, name)
        return squashed + _shaped(bias, x, name) if isinstance(bias, Tensor) else squashed


def _shaped(vector: Tensor, x: Tensor, norm: str) -> Tensor:
    """A group norm's parameters run along axis 1, the others' along the last axes."""
    return vector.view(-1, *(1,) * (x.ndim - 2)) if norm == "group_norm" else vector
