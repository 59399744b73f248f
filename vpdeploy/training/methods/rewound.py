"""Lottery tickets: train, remove what stayed small, and go back to the weights that training began with (OMP, LTH)."""

from __future__ import annotations

import torch
from torch import Tensor

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.rounds import in_rounds
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, masked_network, schedule_of
from vpdeploy.training.network import Compute, Prompted, TrainingData
from vpdeploy.training.weights import train_weights
from vpdeploy.values import Found

WEIGHT_DECAY = 1e-4  # as the authors of VPNs set it for OMP and LTH


def rewound(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """In each round train a copy of the dense network under the mask so far, score it by ``search.norm``, and start the next
    from the dense weights again, which are what is cut in the end (arXiv:1803.03635). The epochs are shared by the rounds.
    With one round: OMP. The prompt, where there is one, starts anew in every round; the last one's is kept.
    """
    table = recipe.search
    rounds = 1 if table.method == "omp" else table.turns
    last: list[Prompted] = []

    def scores_under(turn: int, gates: Tensor) -> Tensor:
        network = masked_network(task, data, recipe, compute, trains=True)
        train_weights(
            network,
            data,
            schedule=schedule_of(recipe, weight_decay=WEIGHT_DECAY, part=turn, parts=rounds),
            journal=journal.part(turn),
            display=display,
            gates=(gates.to(compute.device),),
        )
        last[:] = [network]
        scores = importance("magnitude", network, task, data.train, recipe=recipe)
        return as_row(scores, task, per_cost=table.weighs_cost)

    row = in_rounds(scores_under, task.selector, rounds=rounds, channels=task.count)
    (network,) = last
    return found_of(torch.as_tensor(row), network, task.dense.backbone, task)
