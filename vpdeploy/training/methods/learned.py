"""Scores and prompt, learned together on frozen weights (VPNs, arXiv:2312.01397, on dependency groups)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vpdeploy.data.prepared import Images
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.rounds import eased
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.select_weights import WeightSelector
from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.scoring.weighing import for_cost, ranked
from vpdeploy.training.fit import label_map_of, map_by_frequency
from vpdeploy.training.loop import Course, train
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, inner, masked_network
from vpdeploy.training.network import (
    Compute,
    Prompted,
    TrainingData,
    prompt_parameters,
    set_learning_rates,
)
from vpdeploy.values import Found

Initial = Callable[[Prompted, Images], Tensor]  # a network with open gates, and images -> [channels of all groups]


def vpns(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """Learn one score per channel, and the prompt, so that the best mask under the budget keeps accuracy.

    Weights are frozen and get no gradient; every gate of a group shares the group's mask, recomputed under the budget after
    every step; norm statistics follow. Without a prompt this is HYDRA (arXiv:2002.10509) on groups.
    """

    def initial(network: Prompted, images: Images) -> Tensor:
        kind = recipe.search.score_init
        scores = importance("magnitude" if kind == "scaled" else kind, network, task, images, recipe=recipe)
        if recipe.search.starts_for_cost and isinstance(task.selector, Selector):
            scores = ranked(for_cost(scores, task.groups, task.selector), task.groups)
        return as_row(scores, task)

    return learn(
        task, data, recipe=recipe, compute=compute, journal=journal, display=display, initial=initial, frozen=False
    )


def learn(
    task: SearchTask,
    data: TrainingData,
    *,
    recipe: Recipe,
    compute: Compute,
    journal: Journal,
    display: Display,
    initial: Initial,
    frozen: bool,
) -> Found:
    """As ``vpns``, from ``initial`` scores. ``frozen``: these stay, and the prompt alone learns, under their mask; without a
    prompt nothing does.
    """
    table = recipe.search
    learner = _learner(task, data, recipe, compute, initial=initial, frozen=frozen)
    course = Course(
        streams="search",
        seed=recipe.seed,
        epochs=table.epochs if task.prompted or not frozen else 0,
        batch_size=table.batch_size,
        augment=recipe.data.augment,
        remedy="a smaller search.score_lr or search.prompt_lr",
        label="search ",
    )
    train(learner, data, course=course, journal=journal, display=display)
    if course.epochs <= learner.warmup:
        learner.begin_scores()
    return found_of(learner.scores, learner.network, inner(learner.network), task)


@dataclass
class _Learner:
    """What a search trains: ``scores`` [channels of all groups] and the prompt of ``network``, by ``optimizer``. Until ``warm``
    nothing is masked; then as ``done``, the share of all steps, lets the budget be.
    """

    network: Prompted
    scores: Tensor
    optimizer: torch.optim.Optimizer
    selector: Selector | WeightSelector
    data: TrainingData
    recipe: Recipe
    initial: Initial
    warmup: int  # epochs
    warm: bool = False
    done: float = 0.0

    @property
    def now(self) -> Selector | WeightSelector:
        """What masks the budget allows at this step."""
        gradual = self.recipe.search.gradual
        return eased(self.selector, self.done / gradual) if self.done < gradual else self.selector

    def gates(self) -> Tensor:
        """The hard mask of the scores as they are, as gate values without gradient: [channels]."""
        return hard_mask(self.now, self.scores).to(self.scores.dtype) if self.warm else self._open()

    def _open(self) -> Tensor:
        return torch.ones_like(self.scores, requires_grad=False)

    def begin_scores(self) -> None:
        if len(self.scores):  # else the prompt alone learns: no criterion has anything to look at
            self.scores.data.copy_(self.initial(self.network, self.data.train))
        self.warm = True
        if self.recipe.model.head in ("flm", "ilm"):
            self.map_labels()

    def map_labels(self) -> None:
        self.network.map_labels(map_by_frequency(self.network, self.data, self.gates()))

    def begin_epoch(self, epoch: int) -> None:
        if epoch == self.warmup:
            self.begin_scores()
        elif self.recipe.model.head == "ilm" and epoch > 0:
            self.map_labels()

    def step(self, images: Tensor, labels: Tensor, *, places: Tensor, done: float) -> Tensor:
        """The loss is that of the prompted step."""
        table, self.done = self.recipe.search, done
        set_learning_rates(self.optimizer, peaks=(table.score_lr, table.prompt_lr), done=done)
        loss = self._step(images, labels, prompted=True)
        if table.unprompted_step and self.warm and self.network.canvas.prompt is not None and self.scores.requires_grad:
            self._step(images, labels, prompted=False)
        return loss

    def _step(self, images: Tensor, labels: Tensor, *, prompted: bool) -> Tensor:
        if self.warm:
            loss = search_step(self.network, self.scores, self.now, images, labels, prompted=prompted)
        else:
            loss = F.cross_entropy(self.network(images, self._open(), prompted=prompted), labels)
        self.optimizer.zero_grad(set_to_none=True)  # None, not 0: Adam then leaves an unused prompt alone
        loss.backward()
        self.optimizer.step()
        return loss

    def values(self) -> tuple[Tensor, ...]:
        return (self.gates(),)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scores": self.scores.detach(),
            "label_map": label_map_of(self.network),
            "warm": self.warm,
            "done": self.done,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scores.data.copy_(state["scores"])
        self.network.map_labels(state["label_map"])
        self.warm, self.done = state["warm"], state["done"]


def _learner(
    task: SearchTask, data: TrainingData, recipe: Recipe, compute: Compute, *, initial: Initial, frozen: bool
) -> _Learner:
    network = masked_network(task, data, recipe, compute, trains=False)
    scores = torch.zeros(task.count, device=compute.device, requires_grad=not frozen)
    optimizer = torch.optim.Adam(
        [{"params": [scores]}, {"params": prompt_parameters(network)}], lr=recipe.search.score_lr
    )
    warmup = recipe.search.warmup if task.prompted else 0
    return _Learner(network, scores, optimizer, task.selector, data, recipe, initial, warmup)


def search_step(
    network: Prompted,
    scores: Tensor,
    selector: Selector | WeightSelector,
    images: Tensor,
    labels: Tensor,
    *,
    prompted: bool = True,
) -> Tensor:
    """The loss of one batch under the hard mask of the scores as they are; its backward reaches scores and prompt alone."""
    gates = StraightThrough.apply(scores, hard_mask(selector, scores))
    return F.cross_entropy(network(images, gates, prompted=prompted), labels)
