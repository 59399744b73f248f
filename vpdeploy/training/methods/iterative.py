"""Iterative pruning: weights train while channels go, round by round (Molchanov et al., arXiv:1906.10771)."""

from __future__ import annotations

import torch
from torch import Tensor

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.rounds import in_rounds
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, inner, masked_network, schedule_of
from vpdeploy.training.network import Compute, TrainingData
from vpdeploy.training.weights import train_weights
from vpdeploy.values import Found

WEIGHT_DECAY = 5e-4  # that of tuning: it is the same training, on a network that is not yet small


def iterative(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """In each of ``search.rounds``, the weakest channels by "taylor" go; between two rounds weights and prompt train under the
    mask so far, at a rate that does not decay. The epochs are shared by the rounds - 1 pauses; weights stay as they became.
    """
    table = recipe.search
    network = masked_network(task, recipe, compute, trains=True)

    def scores_under(turn: int, gates: Tensor) -> Tensor:
        gates = gates.to(compute.device)
        if turn > 0:
            train_weights(
                network,
                data,
                schedule=schedule_of(
                    recipe, weight_decay=WEIGHT_DECAY, part=turn - 1, parts=table.turns - 1, decays=False
                ),
                journal=journal.part(turn - 1),
                display=display,
                gates=(gates,),
            )
        scores = importance("taylor", network, task, data.train, recipe=recipe, gates=gates, turn=turn)
        return as_row(scores, task, per_cost=table.weighs_cost)

    row = in_rounds(scores_under, task.selector, rounds=table.turns, channels=task.count)
    return found_of(torch.as_tensor(row), network, inner(network), task)
