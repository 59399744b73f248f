"""Group magnitude: how heavy a channel's weights are, over every layer that writes or reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.values import ChannelGroup, Member


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
            weight = parameters.get(member.tensor)
            if weight is None or weight.ndim < 2:  # norms and biases weigh nothing here
                continue
            norms = _slice_norms(weight.detach().float().cpu(), member, group.width)
            parts.append(norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny))
        scores[group.root] = torch.stack(parts).mean(dim=0) if parts else torch.ones(group.width)
    return scores


def _slice_norms(weight: Tensor, member: Member, width: int) -> Tensor:
    """L2 norm of each channel's slices of ``weight``: [width]."""
    energy = weight.movedim(member.axis, 0).reshape(weight.shape[member.axis], -1).square().sum(dim=1)  # [axis]
    return torch.zeros(width).index_add_(0, torch.tensor(member.channels), energy[list(member.indices)]).sqrt()
