"""GraSP: what the removal of each weight does to the gradient's norm, summed over a channel's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vpdeploy.scoring.criteria.model import Batches, Model, channel_sums
from vpdeploy.values import ChannelGroup

TEMPERATURE = 200.0  # of the logits, as the paper has it: it keeps the loss away from saturation


def grasp(model: Model, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float64, of either sign."""
    return channel_sums(grasp_of_weights(model, model.weights_of(groups), batches), groups)


def grasp_of_weights(model: Model, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape.

    w (H g), g the gradient of the loss and H its Hessian: to first order, without the weight the squared norm of the gradient is
    less by twice that (Wang et al., arXiv:2002.07376, eq. 8; the authors remove the largest -w (H g)). The batches' losses
    are added up.
    """
    weights = model.leaves(names)
    leaves = list(weights.values())

    def gradients(x: Tensor, labels: Tensor, *, graph: bool) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(x, tensors=weights) / TEMPERATURE, labels)
        return torch.autograd.grad(loss, leaves, create_graph=graph, materialize_grads=True)

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        whole = [torch.zeros_like(leaf) for leaf in leaves]
        for x, labels in batches:
            whole = [total + part for total, part in zip(whole, gradients(x, labels, graph=False), strict=True)]
        products = [torch.zeros_like(leaf) for leaf in leaves]
        for x, labels in batches:
            along = sum(
                (part * total).sum() for part, total in zip(gradients(x, labels, graph=True), whole, strict=True)
            )
            assert isinstance(along, Tensor)
            second = torch.autograd.grad(along, leaves, materialize_grads=True)
            products = [total + part for total, part in zip(products, second, strict=True)]
    return {
        name: (weight * product).detach() for (name, weight), product in zip(weights.items(), products, strict=True)
    }
