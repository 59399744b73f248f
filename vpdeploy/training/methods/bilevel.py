"""Bi-level pruning: weights and scores in turns, the scores with what the weights would answer (BiP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.select_weights import WeightSelector
from vpdeploy.scoring.straight_through import hard_mask
from vpdeploy.surgery.gates import Gated
from vpdeploy.training.loop import Course, train
from vpdeploy.training.methods.criteria import importance
from vpdeploy.training.methods.task import SearchTask, as_row, found_of, inner, masked_network
from vpdeploy.training.network import Compute, Prompted, TrainingData, prompt_parameters, set_learning_rates
from vpdeploy.values import Found

STRENGTH = 1e-4  # 1 / gamma of the paper, as its authors set it
WEIGHT_DECAY = 1e-4


def bilevel(
    task: SearchTask, data: TrainingData, *, recipe: Recipe, compute: Compute, journal: Journal, display: Display
) -> Found:
    """The lower level trains all weights under the mask, the upper one the scores (and the prompt), one step each per batch,
    on halves of it: the loss that scores see is of images that the weights' step has not seen.

    With z the masked weights and g the loss's gradient by them, a mask entry's gradient is (w - g / gamma) g: the second term
    is what the weights, which are at a minimum of their own, would answer (Zhang et al., arXiv:2210.04092, IG). A channel's is
    the sum over all weights that read it. ``search.strength`` is 1 / gamma.
    """
    table = recipe.search
    network = masked_network(task, data, recipe, compute, trains=True)
    backbone = inner(network)
    scores = as_row(importance("magnitude", network, task, data.train, recipe=recipe), task).to(compute.device)
    prompt = prompt_parameters(network)
    weights = [p for p in backbone.parameters() if all(p is not own for own in prompt)]
    lower = torch.optim.SGD(weights, lr=table.weight_lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    upper = torch.optim.Adam([{"params": [scores]}, {"params": prompt}], lr=table.score_lr)
    learner = _Learner(network, scores, lower, upper, readers_of(task, network), task.selector, recipe)
    course = Course(
        streams="search",
        seed=recipe.seed,
        epochs=table.epochs,
        batch_size=table.batch_size,
        augment=recipe.data.augment,
        remedy="a smaller search.weight_lr, search.score_lr or search.prompt_lr",
        label="search ",
    )
    train(learner, data, course=course, journal=journal, display=display)
    return found_of(scores, network, backbone, task)


@dataclass(frozen=True)
class Readers:
    """Which entries of which weights read which channel. ``places[name]``: (axis, the row's channel of each of its positions,
    one past the last for positions of no group). ``gated``: channels that something other than a weight reads.
    """

    places: dict[str, tuple[int, Tensor]]
    gated: Tensor

    @staticmethod
    def of(task: SearchTask, network: Prompted) -> Readers:
        gated = network.backbone
        assert isinstance(gated, Gated)
        parameters = dict(gated.backbone.named_parameters())
        device = network.compute.device
        places: dict[str, tuple[int, Tensor]] = {}
        others = torch.zeros(gated.channels, dtype=torch.bool)
        start = 0
        for group in task.groups:
            for member in group.members:
                if member.side != "in":
                    continue
                channels = torch.tensor(member.channels) + start
                weight = parameters.get(member.tensor)
                if weight is None or weight.ndim < 2:
                    others[channels] = True
                    continue
                blank = torch.full((weight.shape[member.axis],), gated.channels)
                axis, place = places.setdefault(member.tensor, (member.axis, blank))
                assert axis == member.axis, "a weight is read along one axis"
                place[list(member.indices)] = channels
            start += group.width
        return Readers({name: (axis, place.to(device)) for name, (axis, place) in places.items()}, others.to(device))

    def masked(self, weights: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """z: each reading weight with the entries at 0 that read masked channels; to be differentiated by."""
        row = torch.cat([mask, mask.new_ones(1)])
        found = {}
        for name, (axis, place) in self.places.items():
            weight = weights[name].detach()
            found[name] = (weight * row[place].view(-1, *(1,) * (weight.ndim - axis - 1))).requires_grad_(True)
        return found

    def answers(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, strength: float) -> Tensor:
        """The mask's gradient by the weights that read it: [channels]."""
        total = torch.zeros(len(self.gated) + 1, device=self.gated.device)
        for name, (axis, place) in self.places.items():
            gradient = gradients[name]
            each = (weights[name].detach() - strength * gradient) * gradient
            total.index_add_(0, place, each.movedim(axis, 0).flatten(1).sum(dim=1).float())
        return total[:-1]


@dataclass(frozen=True)
class Entries:
    """As ``Readers``, of masks on single weights: each entry is read by itself."""

    shapes: dict[str, torch.Size]
    gated: Tensor

    def masked(self, weights: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        parts = mask.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: (weights[name].detach() * part.view(shape)).requires_grad_(True)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def answers(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, strength: float) -> Tensor:
        each = [(weights[name].detach() - strength * gradients[name]) * gradients[name] for name in self.shapes]
        return torch.cat([entries.flatten() for entries in each])


def readers_of(task: SearchTask, network: Prompted) -> Readers | Entries:
    if isinstance(network.backbone, Gated):
        return Readers.of(task, network)
    return Entries(task.units, torch.zeros(task.count, dtype=torch.bool, device=network.compute.device))


@dataclass(frozen=True)
class _Learner:
    network: Prompted
    scores: Tensor
    lower: torch.optim.Optimizer
    upper: torch.optim.Optimizer
    readers: Readers | Entries
    selector: Selector | WeightSelector
    recipe: Recipe

    def begin_epoch(self, epoch: int) -> None:
        pass

    def gates(self) -> Tensor:
        return hard_mask(self.selector, self.scores).to(self.scores.dtype)

    def step(self, images: Tensor, labels: Tensor, *, places: Tensor, done: float) -> Tensor:
        """The loss is the upper level's."""
        table = self.recipe.search
        set_learning_rates(self.lower, peaks=(table.weight_lr,), done=done)
        set_learning_rates(self.upper, peaks=(table.score_lr, table.prompt_lr), done=done)
        half = max(1, len(images) // 2)
        loss = F.cross_entropy(self.network(images[:half], self.gates()), labels[:half])
        for optimizer in (self.lower, self.upper):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.lower.step()
        self.upper.zero_grad(set_to_none=True)
        loss = self.upper_loss(images[half:], labels[half:]) if half < len(images) else loss.detach()
        self.upper.step()
        return loss

    def upper_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch under the mask; leaves the gradients of scores and prompt where the optimizer looks."""
        weights = dict(inner(self.network).named_parameters())
        mask = self.gates()
        # What no weight reads has gates of its own; all others are open, and the weights that read them are masked.
        gates = torch.where(self.readers.gated, mask, 1.0).requires_grad_(True)
        masked = self.readers.masked(weights, mask)
        prompt = prompt_parameters(self.network)
        replaced = {f"backbone.backbone.{name}": tensor for name, tensor in masked.items()}
        loss = F.cross_entropy(functional_call(self.network, replaced, (images, gates)), labels)
        found = torch.autograd.grad(loss, [*masked.values(), gates, *prompt], materialize_grads=True)
        by_weight, by_gate, by_pixel = found[: len(masked)], found[len(masked)], found[len(masked) + 1 :]
        strength = self.recipe.search.strength
        answers = self.readers.answers(
            weights,
            dict(zip(masked, by_weight, strict=True)),
            strength=STRENGTH if strength is None else strength,
        )
        self.scores.grad = answers + torch.where(self.readers.gated, by_gate, 0.0)
        for pixel, gradient in zip(prompt, by_pixel, strict=True):
            pixel.grad = gradient
        return loss.detach()

    def values(self) -> tuple[Tensor, ...]:
        return (self.gates(),)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "lower": self.lower.state_dict(),
            "upper": self.upper.state_dict(),
            "scores": self.scores,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.lower.load_state_dict(state["lower"])
        self.upper.load_state_dict(state["upper"])
        self.scores.data.copy_(state["scores"])
