"""First-order Taylor importance: how much the loss would feel the loss of a channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vpdeploy.scoring.criteria.model import Batches, Model
from vpdeploy.values import ChannelGroup


def taylor(model: Model, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float64, at least 0.

    The mean over batches of the squared derivative of the batch's loss by the channel's gate (Molchanov et al.,
    arXiv:1906.10771, eq. 8, with the gate for the weight: removing a channel takes its gate from 1 to 0). All gates of a group
    share one value, so a residual stream with many readers weighs what all of them lose. Small batches: squares of means
    over many images would cancel what single images feel.
    """
    gates = model.gates.detach().clone().requires_grad_(True)
    total, count = torch.zeros(len(gates), dtype=torch.float64), 0
    for x, labels in batches:
        loss = F.cross_entropy(model(x, gates=gates), labels)
        (gradient,) = torch.autograd.grad(loss, gates, materialize_grads=True)  # no group, no gate: none is used
        total += gradient.cpu().double().square()
        count += 1
    parts = (total / max(count, 1)).split([group.width for group in groups])
    return {group.root: part for group, part in zip(groups, parts, strict=True)}


def taylor_of_weights(model: Model, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape: the mean over batches of (w dL/dw)^2 (arXiv:1906.10771, eq. 8)."""
    weights = model.leaves(names)
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, labels in batches:
        loss = F.cross_entropy(model(x, tensors=weights), labels)
        found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), found, strict=True):
            totals[name] += (weight * gradient).detach().square()
    return totals  # the common divisor changes no order
