"""The hard mask of scores under a budget, and how a gradient reaches the scores behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from vpdeploy.scoring.select import Selector, select_row
from vpdeploy.scoring.select_weights import WeightSelector


class StraightThrough(torch.autograd.Function):
    """Forward: the hard mask, 1 for what stays. Backward: the scores get the gate's gradient as it is (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: object, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def hard_mask(selector: Selector | WeightSelector, scores: Tensor) -> Tensor:
    """The budget's mask for ``scores`` [scores]: bool, on the same device."""
    if isinstance(selector, WeightSelector):
        return torch.from_numpy(selector.select_row(scores.detach().cpu().numpy())).to(scores.device)
    row = scores.detach().to("cpu", torch.float64).numpy()
    return torch.from_numpy(select_row(selector, row)).to(scores.device)
