"""Norm scales: how much each channel's norm lets through (network slimming)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.values import ChannelGroup


def norm_scale(backbone: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float32, mean 1 in every group.

    The mean of |scale| over the group's norms, over the group's mean of that (Liu et al., arXiv:1708.06519, carried over to
    groups as DepGraph does, arXiv:2301.12900). A group without a norm scores 1.
    """
    scales = norm_scales(backbone)
    scores: dict[str, Tensor] = {}
    for group in groups:
        total, norms = torch.zeros(group.width), 0
        for member in group.members:
            if (scale := scales.get(member.tensor)) is not None:
                sizes = scale.detach().float().cpu().abs()[list(member.indices)]
                total.index_add_(0, torch.tensor(member.channels), sizes)
                norms += 1
        tiny = torch.finfo(torch.float32).tiny
        scores[group.root] = total / total.mean().clamp_min(tiny) if norms else torch.ones(group.width)
    return scores


def norm_scales(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """The scale of every norm, by name: of modules that hold running statistics, or normalise what they read."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return {
        f"{name}.weight": module.weight
        for name, module in backbone.named_modules()
        if isinstance(module, kinds) and isinstance(module.weight, nn.Parameter)
    }
