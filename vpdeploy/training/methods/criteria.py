"""One-shot criteria by name, and the images that each of them looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpdeploy.data.prepared import Images, batches
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.criteria.fisher import fisher, fisher_of_weights
from vpdeploy.scoring.criteria.grasp import grasp, grasp_of_weights
from vpdeploy.scoring.criteria.magnitude import magnitude, magnitude_of_weights
from vpdeploy.scoring.criteria.model import Batches, Model
from vpdeploy.scoring.criteria.random import random
from vpdeploy.scoring.criteria.snip import snip, snip_of_weights
from vpdeploy.scoring.criteria.synflow import synflow, synflow_of_weights
from vpdeploy.scoring.criteria.taylor import taylor, taylor_of_weights
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.masked_weights import MaskedWeights
from vpdeploy.training.methods.task import SearchTask
from vpdeploy.training.network import Prompted, to_pixels
from vpdeploy.training.streams import stream
from vpdeploy.values import ChannelGroup

Criterion = Callable[[Model, Sequence[ChannelGroup], Batches], dict[str, Tensor]]
OfWeights = Callable[[Model, Sequence[str], Batches], dict[str, Tensor]]


@dataclass(frozen=True)
class _Looks:
    """A criterion of channels and of weights that looks at ``images`` training images, ``batch`` at a time, at most ``of_class``
    of a class.
    """

    score: Criterion
    of_weights: OfWeights
    images: int
    batch: int
    of_class: int | None = None


LOOKING = {
    # Squares of means over many images would cancel what single images feel.
    "taylor": _Looks(taylor, taylor_of_weights, images=2000, batch=10),
    "fisher": _Looks(fisher, fisher_of_weights, images=2000, batch=10),
    "snip": _Looks(snip, snip_of_weights, images=128, batch=128),  # one batch, as the paper's (arXiv:1810.02340)
    "grasp": _Looks(grasp, grasp_of_weights, images=512, batch=64, of_class=25),  # as many as the authors of VPNs took
    "synflow": _Looks(synflow, synflow_of_weights, images=1, batch=1),
}


def importance(
    name: str,
    network: Prompted,
    task: SearchTask,
    images: Images,
    *,
    recipe: Recipe,
    gates: Tensor | None = None,
    turn: int = 0,
) -> dict[str, Tensor]:
    """Scores by criterion ``name`` of ``network``, whose backbone is masked: name of a unit -> its scores. ``gates``: values to
    run it under, open without; ``turn``: the round, each drawing its own images.
    """
    masked, names = network.backbone, list(task.units)
    assert isinstance(masked, Gated | MaskedWeights)
    if name == "random":
        return random(task.units, generator=stream(recipe.seed, "search", turn, "scores"))
    if name == "magnitude":
        if isinstance(masked, MaskedWeights):
            return magnitude_of_weights(masked.backbone, names, norm=recipe.search.norm)
        return magnitude(masked.backbone, task.groups, norm=recipe.search.norm)
    looks = LOOKING[name]
    order = torch.randperm(len(images), generator=stream(recipe.seed, "search", turn, name))
    if looks.of_class is not None:
        order = _balanced(
            order, images.labels, at_most=min(looks.of_class, max(1, looks.images // task_classes(images)))
        )
    gates = torch.ones(masked.channels, device=network.compute.device) if gates is None else gates
    was_training = network.training
    network.eval()
    walk = _Walk(network, images, order[: looks.images], looks.batch)
    model = Model(masked, gates, network.label_map)
    channels = isinstance(masked, Gated)
    found = looks.score(model, task.groups, walk) if channels else looks.of_weights(model, names, walk)
    network.train(was_training)
    return found


def task_classes(images: Images) -> int:
    return int(images.labels.max()) + 1


def _balanced(order: Tensor, labels: Tensor, *, at_most: int) -> Tensor:
    """The positions in ``order`` of which fewer than ``at_most`` of the same class come before."""
    of_order = labels[order]
    by_class = of_order.argsort(stable=True)
    counts = torch.bincount(of_order)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[by_class] = torch.arange(len(order)) - first[of_order[by_class]]
    return order[place < at_most]


@dataclass(frozen=True)
class _Walk:
    """Batches of canvases as the backbone sees them, with the prompt as it is; every walk is the same."""

    network: Prompted
    images: Images
    order: Tensor
    batch: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.network.compute.device
        for pixels, labels in batches(self.images, self.order, self.batch):
            with torch.no_grad():
                x = self.network.canvas(to_pixels(pixels, device))
            yield x, labels.to(device)
