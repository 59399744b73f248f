"""Scores read off the dense network, at once or in rounds; a prompt, where there is one, learns under their mask."""

from __future__ import annotations

from torch import Tensor

from vpdeploy.data.prepared import Images
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.rounds import in_rounds
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.learned import learn
from vpdeploy.training.methods.task import SearchTask, as_row
from vpdeploy.training.network import Compute, Prompted, TrainingData
from vpdeploy.values import Found


def one_shot(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """Scores by the criterion that ``search.method`` names, in ``search.rounds``."""
    table = recipe.search

    def initial(network: Prompted, images: Images) -> Tensor:
        def scores_under(turn: int, gates: Tensor) -> Tensor:
            gates = gates.to(compute.device)
            scores = importance(table.method, network, task, images, recipe=recipe, gates=gates, turn=turn)
            return as_row(scores, task, per_cost=table.weighs_cost)

        return in_rounds(scores_under, task.selector, rounds=table.turns, channels=task.count)

    return learn(
        task, data, recipe=recipe, compute=compute, journal=journal, display=display, initial=initial, frozen=True
    )
