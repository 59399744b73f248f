"""SynFlow: how much of all paths from input to output runs through each weight, summed over a channel's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpdeploy.scoring.criteria.model import Batches, Model, channel_sums
from vpdeploy.values import ChannelGroup


def synflow(model: Model, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float64, at least 0."""
    return channel_sums(synflow_of_weights(model, model.weights_of(groups), batches), groups)


def synflow_of_weights(model: Model, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape. Of the first batch, the shape alone is used.

    |w dR/dw|, R the sum of the outputs for an image of ones when every tensor of the network stands for its absolute value
    (Tanaka et al., arXiv:2006.05467, eq. 2 and algorithm 1: no data takes part). In float64: R is a product over all layers.
    """
    shape = next(iter(batches))[0].shape[1:]
    state = {
        name: tensor.detach().to(torch.float64).abs()
        for name, tensor in model.backbone.state_dict().items()
        if tensor.is_floating_point()
    }
    weights = {name: state[name].requires_grad_(True) for name in names}
    ones = torch.ones(1, *shape, dtype=torch.float64, device=model.gates.device)
    flow = model(ones, gates=model.gates.to(torch.float64), tensors=state).sum()
    found = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    return {
        name: (weight * gradient).abs().detach()
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
    }
