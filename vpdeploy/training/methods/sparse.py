"""Sparse learning: weights that train under a penalty, and scores read off them afterwards (Slim, DepGraph)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.criteria.norm_scale import norm_scale, norm_scales
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, schedule_of
from vpdeploy.training.network import Compute, Prompted, TrainingData, add_prompt
from vpdeploy.training.weights import train_weights
from vpdeploy.values import ChannelGroup, Found

GROWTH = 2.0**4  # of the weakest channel's penalty over the strongest's (DepGraph, arXiv:2301.12900, eq. 6)
STRENGTH = {"slim": 1e-5, "group_sl": 5e-4}  # as the authors of Torch-Pruning set them for 100 epochs


def sparse(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """All weights train under the penalty that ``search.method`` names, and stay as they became.

    "slim": the L1 norm of all norm scales; the score is their size (arXiv:1708.06519). "group_sl": every channel's weights in
    all layers of its group, the weaker the harder; the score is the group norm (arXiv:2301.12900).
    """
    table = recipe.search
    backbone = copy.deepcopy(task.dense.backbone).requires_grad_(True)
    canvas = add_prompt(backbone, recipe, data, stage=task.stage)
    network = Prompted(canvas, backbone, compute, label_map=task.dense.label_map)
    strength = STRENGTH[table.method] if table.strength is None else table.strength
    slim = table.method == "slim"
    penalty = ScalePenalty(backbone, strength) if slim else GroupPenalty(backbone, task.groups, strength)
    schedule = schedule_of(recipe, weight_decay=0.0)  # the penalty is the decay
    train_weights(network, data, schedule=schedule, journal=journal, display=display, before_step=penalty)
    scores = norm_scale(backbone, task.groups) if slim else magnitude(backbone, task.groups, norm="group")
    return found_of(as_row(scores, task, per_cost=table.weighs_cost), network, backbone, task)


@dataclass(frozen=True)
class ScalePenalty:
    """Adds the gradient of ``strength`` times the L1 norm of every norm scale of ``backbone``."""

    backbone: nn.Module
    strength: float

    @torch.no_grad()
    def __call__(self) -> None:
        for scale in norm_scales(self.backbone).values():
            if scale.grad is not None:
                scale.grad += self.strength * scale.sign()


class GroupPenalty:
    """Adds ``strength`` * gamma_k * w for every weight w of channel k of each of ``groups``, norm scales among them: the gradient
    of half of strength * sum_k gamma_k ||w_k||^2 with gamma_k = GROWTH ** ((max - I_k) / (max - min)), I_k = ||w_k||
    (DepGraph, arXiv:2301.12900, eq. 5 and 6).
    """

    def __init__(self, backbone: nn.Module, groups: Sequence[ChannelGroup], strength: float):
        parameters, scales = dict(backbone.named_parameters()), norm_scales(backbone)
        self.strength = strength
        self.parts: list[list[tuple[nn.Parameter, int, Tensor, Tensor]]] = []  # parameter, axis, indices, channels
        self.widths = [group.width for group in groups]
        for group in groups:
            members = [
                (parameter, member.axis, torch.tensor(member.indices), torch.tensor(member.channels))
                for member in group.members
                if (parameter := parameters.get(member.tensor)) is not None
                and (parameter.ndim > 1 or member.tensor in scales)
            ]
            self.parts.append(members)

    @torch.no_grad()
    def __call__(self) -> None:
        for width, members in zip(self.widths, self.parts, strict=True):
            if not members:
                continue
            device = members[0][0].device
            energy = torch.zeros(width, device=device)
            for parameter, axis, indices, channels in members:
                rows = parameter.square().movedim(axis, 0).flatten(1).sum(dim=1) if parameter.ndim > 1 else parameter**2
                energy.index_add_(0, channels.to(device), rows[indices.to(device)].float())
            size = energy.sqrt()
            span = size.max() - size.min()
            gamma = GROWTH ** ((size.max() - size) / span) if span > 0 else torch.ones_like(size)
            for parameter, axis, indices, channels in members:
                if parameter.grad is None:
                    continue
                factor = torch.zeros(parameter.shape[axis], device=device)
                factor[indices.to(device)] = self.strength * gamma[channels.to(device)]
                parameter.grad += parameter * factor.view(-1, *(1,) * (parameter.ndim - axis - 1))
