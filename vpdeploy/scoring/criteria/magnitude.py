"""Group magnitude: how heavy a channel's weights are, over every layer that writes or reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.surgery.groups import tensor_axes
from vpdeploy.values import ChannelGroup


def magnitude(backbone: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float32, mean 1 in every group so that groups compete on equal terms.

    A channel's score in one weight tensor is the L2 norm of its slice over the tensor's mean slice norm; its score in the
    group is the mean over the group's weight tensors (the group norm of DepGraph, arXiv:2301.12900, and the scaled
    initialisation of HYDRA, arXiv:2002.10509, carried over to channels).
    """
    parameters = dict(backbone.named_parameters())
    scores: dict[str, Tensor] = {}
    for group in groups:
        parts: list[Tensor] = []
        for member in group.members:
            for name, axis in tensor_axes(backbone, member):
                weight = parameters.get(name)
                if weight is None or weight.ndim < 2:  # norms and biases weigh nothing here
                    continue
                norms = _slice_norms(weight.detach().float().cpu(), axis, member.indices, member.channels, group.width)
                parts.append(norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny))
        scores[group.root] = torch.stack(parts).mean(dim=0) if parts else torch.ones(group.width)
    return scores


def _slice_norms(weight: Tensor, axis: int, indices: Sequence[int], channels: Sequence[int], width: int) -> Tensor:
    """L2 norm of each channel's slices of ``weight``: [width]."""
    energy = weight.movedim(axis, 0).reshape(weight.shape[axis], -1).square().sum(dim=1)  # [axis]
    if max(indices) >= len(energy):  # a grouped convolution's input axis holds one conv group only
        return torch.ones(width)
    return torch.zeros(width).index_add_(0, torch.tensor(channels), energy[list(indices)]).sqrt()
