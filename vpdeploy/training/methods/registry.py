"""``search.method`` by name."""

from __future__ import annotations

from dataclasses import replace

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.training.methods.bilevel import bilevel
from vpdeploy.training.methods.iterative import iterative
from vpdeploy.training.methods.learned import vpns
from vpdeploy.training.methods.one_shot import one_shot
from vpdeploy.training.methods.rewound import rewound
from vpdeploy.training.methods.sparse import sparse
from vpdeploy.training.methods.task import Method, SearchTask
from vpdeploy.training.network import Compute, TrainingData
from vpdeploy.values import Found


def hydra(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """``vpns`` without its prompt (HYDRA, arXiv:2002.10509, on groups)."""
    unprompted = replace(task, prompted=False)
    return vpns(unprompted, data, recipe=recipe, compute=compute, journal=journal, display=display)


METHODS: dict[str, Method] = {
    "vpns": vpns,
    "hydra": hydra,
    "random": one_shot,
    "magnitude": one_shot,
    "taylor": one_shot,
    "fisher": one_shot,
    "snip": one_shot,
    "grasp": one_shot,
    "synflow": one_shot,
    "slim": sparse,
    "group_sl": sparse,
    "bip": bilevel,
    "omp": rewound,
    "lth": rewound,
    "iterative": iterative,
}


def search(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """Stage 1: what the recipe's method finds."""
    method = METHODS[recipe.search.method]
    return method(task, data, recipe=recipe, compute=compute, journal=journal, display=display)
