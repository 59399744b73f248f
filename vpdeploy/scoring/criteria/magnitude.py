"""Group magnitude: how heavy a channel's weights are, over every layer that writes or reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vpdeploy.scoring.criteria.norm_scale import norm_scales
from vpdeploy.values import ChannelGroup, Member

Norm = Literal["scaled", "l1", "l2", "group"]


def magnitude(backbone: nn.Module, groups: Sequence[ChannelGroup], *, norm: Norm = "scaled") -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float32, mean 1 in every group so that groups compete on equal terms.

    "scaled": the L2 norm of the channel's slice of a weight tensor, over the tensor's mean slice norm; of these the mean over
    the group's weight tensors (the scaled initialisation of HYDRA, arXiv:2002.10509, carried over to channels). "l1", "l2":
    that norm of all the group's weights that are the channel's. "group": the squared L2 norm, norm scales among the weights
    (DepGraph's group norm, arXiv:2301.12900).
    """
    parameters = dict(backbone.named_parameters())
    scales = norm_scales(backbone) if norm == "group" else {}
    power = 1 if norm == "l1" else 2
    scores: dict[str, Tensor] = {}
    for group in groups:
        parts: list[Tensor] = []
        for member in group.members:
            weight = parameters.get(member.tensor)
            if weight is None or (weight.ndim < 2 and member.tensor not in scales):  # biases weigh nothing
                continue
            sums = _slice_sums(weight.detach().float().cpu().abs().pow(power), member, group.width)
            parts.append(_over_mean(sums.sqrt()) if norm == "scaled" else sums)
        total = torch.stack(parts).mean(dim=0) if parts else torch.ones(group.width)
        scores[group.root] = total if norm == "scaled" else _over_mean(total.sqrt() if norm == "l2" else total)
    return scores


def magnitude_of_weights(backbone: nn.Module, names: Sequence[str], *, norm: Norm = "scaled") -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape, float32: its size; with "scaled" as HYDRA begins (arXiv:2002.10509):
    sqrt(6 / fan_in) times its size over the tensor's largest.
    """
    parameters = dict(backbone.named_parameters())
    scores = {name: parameters[name].detach().float().cpu().abs() for name in names}
    if norm != "scaled":
        return scores
    return {
        name: size / size.max().clamp_min(torch.finfo(size.dtype).tiny) * math.sqrt(6 / size[0].numel())
        for name, size in scores.items()
    }


def _over_mean(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)


def _slice_sums(entries: Tensor, member: Member, width: int) -> Tensor:
    """The sum of each channel's slices of ``entries``: [width]."""
    rows = entries.movedim(member.axis, 0).reshape(entries.shape[member.axis], -1).sum(dim=1)  # [axis]
    return torch.zeros(width).index_add_(0, torch.tensor(member.channels), rows[list(member.indices)])
