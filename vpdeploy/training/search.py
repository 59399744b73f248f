"""Stage 1: scores and prompt, learned together on frozen weights (VPNs, arXiv:2312.01397, on dependency groups)."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.progress import Display
from vpdeploy.recipe import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.select import Selector, select_row
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import offsets
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
from vpdeploy.training.weights import epoch_record, finite, tell, training_batches
from vpdeploy.values import ChannelGroup, Dense, Found


@dataclass(frozen=True)
class SearchTask:
    """What a search looks at: the dense network, its prunable groups (the columns of ``selector``), and the arm's prompt."""

    dense: Dense
    groups: Sequence[ChannelGroup]
    selector: Selector
    classifier: str
    prompted: bool


class StraightThrough(torch.autograd.Function):
    """Forward: the hard mask, 1 for what stays. Backward: the scores get the gate's gradient as it is (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: object, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def search(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """Learn one score per channel, and the prompt, so that the best mask under the budget keeps accuracy.

    Weights are frozen and get no gradient; every gate of a group shares the group's mask, recomputed under the budget after
    every step; norm statistics follow. ``task.dense`` is unchanged.

    Raises: VpdeployError when the loss is not finite.
    """
    table = recipe.search
    backbone = copy.deepcopy(task.dense.backbone).requires_grad_(False)
    network = Prompted(
        build_canvas(recipe, prompted=task.prompted),
        Gated(backbone, task.groups),
        compute,
        label_map=task.dense.label_map,
    )
    scores = _initial_scores(task, recipe).to(compute.device).requires_grad_(True)
    prompt = [] if network.canvas.prompt is None else list(network.canvas.prompt.parameters())
    optimizer = torch.optim.Adam([{"params": [scores]}, {"params": prompt}], lr=table.score_lr)
    state, start = journal.resume(), 0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scores.data.copy_(state["scores"])
        network.map_labels(state["label_map"])
        start = state["epoch"]
    elif recipe.model.head in ("flm", "ilm"):
        network.map_labels(_map(network, task, data, scores))
    for epoch in range(start, table.epochs):
        restart_prompt(network.canvas, seed=recipe.seed, stage="search", epoch=epoch)
        if recipe.model.head == "ilm" and epoch > 0:
            network.map_labels(_map(network, task, data, scores))
        with seeded(recipe.seed, "search", epoch):
            loss, seconds = _epoch(network, scores, task, data, optimizer, recipe=recipe, epoch=epoch, display=display)
        values = (hard_mask(task.selector, scores).to(scores.dtype),)
        record = epoch_record(
            journal.stage, epoch, table.epochs, loss=loss, seconds=seconds, network=network, data=data, values=values
        )
        journal.save(_state(network, optimizer, scores, epoch + 1), record)
        tell(record, display)
    return _found(network, scores, task)


def _epoch(
    network: Prompted,
    scores: Tensor,
    task: SearchTask,
    data: TrainingData,
    optimizer: torch.optim.Optimizer,
    *,
    recipe: Recipe,
    epoch: int,
    display: Display,
) -> tuple[float, float]:
    """One pass over the training images: (mean loss of the prompted steps, seconds)."""
    table = recipe.search
    network.train()
    steps = -(-len(data.train) // table.batch_size)
    total, began = torch.zeros((), device=scores.device), time.perf_counter()
    walk = training_batches(
        data.train, table.batch_size, seed=recipe.seed, stage="search", epoch=epoch, how=recipe.data.augment
    )
    with display.bar(walk, label=f"{'search'} epoch {epoch + 1}/{table.epochs}", total=steps) as bar:
        for step, (pixels, labels) in enumerate(bar):
            done = (epoch * steps + step) / (table.epochs * steps)
            set_learning_rates(optimizer, peaks=(table.score_lr, table.prompt_lr), done=done)
            images, labels = to_pixels(pixels, scores.device), labels.to(scores.device)
            for prompted in (True, False) if table.unprompted_step and task.prompted else (True,):
                loss = search_step(network, scores, task.selector, images, labels, prompted=prompted)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if prompted:
                    total += loss.detach() * len(labels)
    return finite(
        float(total) / len(data.train), "a smaller search.score_lr or search.prompt_lr"
    ), time.perf_counter() - began


def search_step(
    network: Prompted, scores: Tensor, selector: Selector, images: Tensor, labels: Tensor, *, prompted: bool = True
) -> Tensor:
    """The loss of one batch under the hard mask of the scores as they are; its backward reaches scores and prompt alone."""
    gates = StraightThrough.apply(scores, hard_mask(selector, scores))
    return F.cross_entropy(network(images, gates, prompted=prompted), labels)


def hard_mask(selector: Selector, scores: Tensor) -> Tensor:
    """The budget's mask for ``scores`` [channels]: bool, on the same device."""
    row = scores.detach().to("cpu", torch.float64).numpy()
    return torch.from_numpy(select_row(selector, row)).to(scores.device)


def _initial_scores(task: SearchTask, recipe: Recipe) -> Tensor:
    """[channels of all groups], float32, in the order of the groups."""
    if recipe.search.score_init == "random":
        total = sum(group.width for group in task.groups)
        return torch.rand(total, generator=stream(recipe.seed, "search", 0, "scores"))
    by_root = magnitude(task.dense.backbone, task.groups)
    return torch.cat([by_root[group.root] for group in task.groups])


def _map(network: Prompted, task: SearchTask, data: TrainingData, scores: Tensor) -> tuple[int, ...]:
    values = (hard_mask(task.selector, scores).to(scores.dtype),)
    return map_by_frequency(network, data, classifier=task.classifier, values=values)


def _state(network: Prompted, optimizer: torch.optim.Optimizer, scores: Tensor, epoch: int) -> dict[str, object]:
    return {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scores": scores.detach(),
        "label_map": label_map_of(network),
        "epoch": epoch,
    }


def _found(network: Prompted, scores: Tensor, task: SearchTask) -> Found:
    places = offsets(task.groups)
    row = scores.detach().cpu()
    gated = network.backbone
    assert isinstance(gated, Gated)
    return Found(
        scores={group.root: row[places[group.root]].clone() for group in task.groups},
        prompt=prompt_state(network.canvas),
        norm_statistics=norm_statistics(gated.backbone),
        label_map=label_map_of(network),
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
