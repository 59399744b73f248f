"""Stage 1: scores and prompt, learned together on frozen weights (VPNs, arXiv:2312.01397, on dependency groups)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.data.prepared import Images, batches
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.criteria.taylor import taylor
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import offsets
from vpdeploy.training.evaluate import accuracy
from vpdeploy.training.fit import label_map_of, map_by_frequency
from vpdeploy.training.network import (
    Compute,
    Prompted,
    TrainingData,
    build_canvas,
    prompt_state,
    restart_prompt,
    set_learning_rates,
    to_pixels,
)
from vpdeploy.training.streams import seeded, stream
from vpdeploy.training.weights import EpochDone, finite, images_per_epoch, note_epoch, training_batches
from vpdeploy.values import ChannelGroup, Dense, Found

TAYLOR_IMAGES, TAYLOR_BATCH = 2000, 10  # squares of means over many images would cancel what single images feel


@dataclass(frozen=True)
class SearchTask:
    """What a search looks at: the dense network, its prunable groups (the columns of ``selector``), and the arm's prompt."""

    dense: Dense
    groups: Sequence[ChannelGroup]
    selector: Selector
    prompted: bool


@dataclass(frozen=True)
class _Learner:
    """What a search trains: ``scores`` [channels of all groups] and the prompt of ``network``, by ``optimizer``."""

    network: Prompted
    scores: Tensor
    optimizer: torch.optim.Optimizer
    selector: Selector

    def gates(self) -> Tensor:
        """The hard mask of the scores as they are, as gate values without gradient: [channels]."""
        return hard_mask(self.selector, self.scores).to(self.scores.dtype)


def search(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """Learn one score per channel, and the prompt, so that the best mask under the budget keeps accuracy.

    Weights are frozen and get no gradient; every gate of a group shares the group's mask, recomputed under the budget after
    every step; norm statistics follow. ``task.dense`` is unchanged.

    Raises: VpdeployError when the loss is not finite.
    """
    learner = _learner(task, recipe, compute)
    network, head = learner.network, recipe.model.head
    start = _resume(learner, journal)
    if start == 0:
        learner.scores.data.copy_(_initial_scores(learner, task, data.train, recipe=recipe))
    if start == 0 and head in ("flm", "ilm"):
        network.map_labels(map_by_frequency(network, data, learner.gates()))
    for epoch in range(start, recipe.search.epochs):
        restart_prompt(network.canvas, seed=recipe.seed, stage="search", epoch=epoch)
        if head == "ilm" and epoch > 0:
            network.map_labels(map_by_frequency(network, data, learner.gates()))
        with seeded(recipe.seed, "search", epoch):
            done = _epoch(learner, data.train, recipe=recipe, epoch=epoch, display=display)
        accuracy_val = accuracy(network, data.val, learner.gates())
        note_epoch(journal, _state(learner, epoch + 1), done=done, accuracy_val=accuracy_val, display=display)
    return _found(learner, task.groups)


def _learner(task: SearchTask, recipe: Recipe, compute: Compute) -> _Learner:
    backbone = copy.deepcopy(task.dense.backbone).requires_grad_(False)
    canvas = build_canvas(recipe, prompted=task.prompted)
    network = Prompted(canvas, Gated(backbone, task.groups), compute, label_map=task.dense.label_map)
    total = sum(group.width for group in task.groups)
    scores = torch.zeros(total, device=compute.device, requires_grad=True)
    prompt = [] if canvas.prompt is None else list(canvas.prompt.parameters())
    optimizer = torch.optim.Adam([{"params": [scores]}, {"params": prompt}], lr=recipe.search.score_lr)
    return _Learner(network, scores, optimizer, task.selector)


def _epoch(learner: _Learner, images: Images, *, recipe: Recipe, epoch: int, display: Display) -> EpochDone:
    """One pass over the training images; the loss is that of the prompted steps."""
    table, network, scores = recipe.search, learner.network, learner.scores
    network.train()
    count = images_per_epoch(len(images), table.batch_size)
    steps = math.ceil(count / table.batch_size)
    both = table.unprompted_step and network.canvas.prompt is not None
    total, began = torch.zeros((), device=scores.device), time.perf_counter()
    walk = training_batches(
        images, table.batch_size, seed=recipe.seed, stage="search", epoch=epoch, how=recipe.data.augment
    )
    with display.bar(walk, label=f"search epoch {epoch + 1}/{table.epochs}", total=steps) as bar:
        for step, (pixels, labels) in enumerate(bar):
            share = (epoch * steps + step) / (table.epochs * steps)
            set_learning_rates(learner.optimizer, peaks=(table.score_lr, table.prompt_lr), done=share)
            x, labels = to_pixels(pixels, scores.device), labels.to(scores.device)
            for prompted in (True, False) if both else (True,):
                loss = search_step(network, scores, learner.selector, x, labels, prompted=prompted)
                learner.optimizer.zero_grad(set_to_none=True)  # None, not 0: Adam then leaves an unused prompt alone
                loss.backward()
                learner.optimizer.step()
                if prompted:
                    total += loss.detach() * len(labels)
    loss = finite(float(total) / count, "a smaller search.score_lr or search.prompt_lr")
    return EpochDone(epoch, table.epochs, loss, time.perf_counter() - began, images=count)


def search_step(
    network: Prompted, scores: Tensor, selector: Selector, images: Tensor, labels: Tensor, *, prompted: bool = True
) -> Tensor:
    """The loss of one batch under the hard mask of the scores as they are; its backward reaches scores and prompt alone."""
    gates = StraightThrough.apply(scores, hard_mask(selector, scores))
    return F.cross_entropy(network(images, gates, prompted=prompted), labels)


def _initial_scores(learner: _Learner, task: SearchTask, images: Images, *, recipe: Recipe) -> Tensor:
    """[channels of all groups], float32, in the order of the groups."""
    if not task.groups:
        return torch.zeros(0)
    if recipe.search.score_init == "random":
        return torch.rand(len(learner.scores), generator=stream(recipe.seed, "search", 0, "scores"))
    if recipe.search.score_init == "taylor":
        order = torch.randperm(len(images), generator=stream(recipe.seed, "search", 0, "taylor"))[:TAYLOR_IMAGES]
        by_root = taylor(_gate_gradients(learner.network, images, order), task.groups, selector=task.selector)
    else:
        by_root = magnitude(task.dense.backbone, task.groups)
    return torch.cat([by_root[group.root] for group in task.groups])


def _gate_gradients(network: Prompted, images: Images, order: Tensor) -> Iterator[Tensor]:
    """Of the loss of each few images under open gates, in evaluation: [channels of all groups] each."""
    assert isinstance(network.backbone, Gated)
    device = network.compute.device
    gates = torch.ones(network.backbone.channels, device=device, requires_grad=True)
    network.eval()
    for pixels, labels in batches(images, order, TAYLOR_BATCH):
        loss = F.cross_entropy(network(to_pixels(pixels, device), gates), labels.to(device))
        yield torch.autograd.grad(loss, gates)[0]


def _state(learner: _Learner, epoch: int) -> dict[str, object]:
    return {
        "network": learner.network.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scores": learner.scores.detach(),
        "label_map": label_map_of(learner.network),
        "epoch": epoch,
    }


def _resume(learner: _Learner, journal: Journal) -> int:
    """Put back what the last finished epoch left; gives how many are done."""
    state = journal.resume()
    if state is None:
        return 0
    learner.network.load_state_dict(state["network"])
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scores.data.copy_(state["scores"])
    learner.network.map_labels(state["label_map"])
    return state["epoch"]


def _found(learner: _Learner, groups: Sequence[ChannelGroup]) -> Found:
    places = offsets(groups)
    row = learner.scores.detach().cpu()
    gated = learner.network.backbone
    assert isinstance(gated, Gated)
    return Found(
        scores={group.root: row[places[group.root]].clone() for group in groups},
        prompt=prompt_state(learner.network.canvas),
        norm_statistics=norm_statistics(gated.backbone),
        label_map=label_map_of(learner.network),
    )


def norm_statistics(backbone: nn.Module) -> dict[str, Tensor]:
    """Every buffer that a state dict holds, by name."""
    parameters = {name for name, _ in backbone.named_parameters()}
    return {k: v.detach().cpu().clone() for k, v in backbone.state_dict().items() if k not in parameters}


def with_statistics(dense: Dense, found: Found) -> nn.Module:
    """The dense backbone with the norm statistics that the search left: what a plan is replayed on."""
    backbone = copy.deepcopy(dense.backbone)
    state = backbone.state_dict()
    backbone.load_state_dict({**state, **found.norm_statistics})
    return backbone


def scores_as_arrays(found: Found) -> Iterator[tuple[str, np.ndarray]]:
    for root, scores in found.scores.items():
        yield root, scores.double().numpy()
