"""SNIP: how much the loss feels each weight's connection, summed over a channel's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vpdeploy.scoring.criteria.model import Batches, Model, channel_sums
from vpdeploy.values import ChannelGroup


def snip(model: Model, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float64, at least 0."""
    return channel_sums(snip_of_weights(model, model.weights_of(groups), batches), groups)


def snip_of_weights(model: Model, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape.

    |w dL/dw|: the loss's derivative by a factor on the weight, where that is 1 (Lee et al., arXiv:1810.02340, eq. 5 and 6,
    without the common divisor). L is the sum of the batches' mean losses.
    """
    weights = model.leaves(names)
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, labels in batches:
        loss = F.cross_entropy(model(x, tensors=weights), labels)
        found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        for total, gradient in zip(gradients.values(), found, strict=True):
            total += gradient
    return {name: (weights[name] * gradient).abs().detach() for name, gradient in gradients.items()}
