"""Iterative pruning: weights train while channels go, round by round (Molchanov et al., arXiv:1906.10771)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.rounds import in_rounds
from vpdeploy.scoring.select_weights import WeightSelector
from vpdeploy.surgery.cut import cut, put_back
from vpdeploy.surgery.gates import mask_of
from vpdeploy.surgery.plan import plan
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, schedule_of
from vpdeploy.training.network import Compute, Prompted, TrainingData, add_prompt
from vpdeploy.training.weights import train_weights
from vpdeploy.values import Found

WEIGHT_DECAY = 5e-4  # that of tuning: it is the same training, on a network that is not yet small


def iterative(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """In each of ``search.rounds``, the weakest channels by "taylor" go; between two rounds what is left, and the prompt, train
    at a rate that does not decay: channels that are gone are cut off for that long, weights that are gone masked. The epochs
    are shared by the rounds - 1 pauses; weights stay as they became, those of channels that went as they were then.
    """
    table = recipe.search
    backbone = copy.deepcopy(task.dense.backbone).requires_grad_(True)
    canvas = add_prompt(backbone, recipe, data, stage=task.stage)

    def network_of(part: nn.Module) -> Prompted:
        return Prompted(canvas, part, compute, label_map=task.dense.label_map)

    def train(part: nn.Module, pause: int, mask: Tensor, *gates: Tensor) -> None:
        schedule = schedule_of(recipe, weight_decay=WEIGHT_DECAY, part=pause, parts=table.turns - 1, decays=False)
        # Scores are taken again when a run goes on, elsewhere perhaps: what trained under another mask is of other channels.
        own = journal.part(pause, under=mask.bool().cpu().numpy().tobytes())
        train_weights(network_of(part), data, schedule=schedule, journal=own, display=display, gates=gates)

    def scores_under(turn: int, gates: Tensor) -> Tensor:
        gates = gates.to(compute.device)
        if turn > 0 and isinstance(task.selector, WeightSelector):
            train(task.masked(backbone), turn - 1, gates, gates)
        elif turn > 0:
            cuts = plan(backbone, task.groups, mask_of(task.groups, gates))
            smaller = cut(backbone, cuts)
            train(smaller, turn - 1, gates)
            put_back(backbone, smaller, cuts)
        network = network_of(task.masked(copy.deepcopy(backbone)))
        scores = importance("taylor", network, task, data.train, recipe=recipe, gates=gates, turn=turn)
        return as_row(scores, task, per_cost=table.weighs_cost)

    row = in_rounds(scores_under, task.selector, rounds=table.turns, channels=task.count)
    return found_of(torch.as_tensor(row), network_of(backbone), backbone, task)
