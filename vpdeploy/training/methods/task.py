"""What every search method is given, and how it leaves what it found."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.select_weights import WeightSelector
from vpdeploy.scoring.weighing import for_cost
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.masked_weights import MaskedWeights
from vpdeploy.training.fit import label_map_of
from vpdeploy.training.network import Compute, Prompted, TrainingData, add_prompt, prompt_state
from vpdeploy.training.weights import WeightSchedule
from vpdeploy.values import ChannelGroup, Dense, Found


@dataclass(frozen=True)
class SearchTask:
    """What a search looks at: the dense network, its prunable groups (the columns of ``selector``, unless that is of single
    weights), and the arm's prompt.
    """

    dense: Dense
    groups: Sequence[ChannelGroup]
    selector: Selector | WeightSelector
    prompted: bool

    @property
    def units(self) -> dict[str, torch.Size]:
        """What has a score: name -> the shape of its scores, in the order of the row that holds them all."""
        if isinstance(self.selector, WeightSelector):
            return {name: torch.Size(shape) for name, shape in self.selector.shapes.items()}
        return {group.root: torch.Size([group.width]) for group in self.groups}

    @property
    def count(self) -> int:
        return sum(shape.numel() for shape in self.units.values())

    @property
    def stage(self) -> Literal["search"] | None:
        """In which the prompt learns."""
        return "search" if self.prompted else None

    def masked(self, backbone: nn.Module) -> Gated | MaskedWeights:
        """``backbone``, taking a row of mask values beside its input."""
        return MaskedWeights(backbone) if isinstance(self.selector, WeightSelector) else Gated(backbone, self.groups)


class Method(Protocol):
    """Finds the scores of ``task`` from training data. ``task.dense`` is unchanged. Raises: VpdeployError when the loss is not
    finite.
    """

    def __call__(
        self,
        task: SearchTask,
        data: TrainingData,
        *,
        recipe: Recipe,
        compute: Compute,
        journal: Journal,
        display: Display,
    ) -> Found: ...


def schedule_of(
    recipe: Recipe, *, weight_decay: float, part: int = 0, parts: int = 1, decays: bool = True
) -> WeightSchedule:
    """How a search trains weights in one of ``parts``, which share its epochs: earlier ones get what is left over."""
    table = recipe.search
    each, left = divmod(table.epochs, parts)
    return WeightSchedule(
        streams=f"search {part}" if part else "search",
        seed=recipe.seed,
        epochs=each + (part < left),
        batch_size=table.batch_size,
        optimizer="sgd",
        weight_lr=table.weight_lr,
        prompt_lr=table.prompt_lr,
        weight_decay=weight_decay,
        label_smoothing=0.0,
        augment=recipe.data.augment,
        decays=decays,
        earlier=each * part + min(part, left),
        total=table.epochs,
    )


def masked_network(
    task: SearchTask,
    data: TrainingData,
    recipe: Recipe,
    compute: Compute,
    *,
    trains: bool,
    prompt: Mapping[str, Tensor] = MappingProxyType({}),
) -> Prompted:
    """A copy of the dense network behind masks, with a new prompt, or ``prompt``. ``trains``: whether its weights do."""
    backbone = copy.deepcopy(task.dense.backbone).requires_grad_(trains)
    canvas = add_prompt(backbone, recipe, data, stage=task.stage, state=prompt)
    return Prompted(canvas, task.masked(backbone), compute, label_map=task.dense.label_map)


def as_row(scores: Mapping[str, Tensor], task: SearchTask, *, per_cost: bool = False) -> Tensor:
    """The scores of all units as one row, in their order: [scores], float32. ``per_cost``: those of channels over what one
    costs; single weights cost the same.
    """
    if per_cost and isinstance(task.selector, Selector):
        scores = for_cost(scores, task.groups, task.selector)
    return torch.cat([torch.zeros(0), *(scores[name].float().flatten() for name in task.units)])


def inner(network: Prompted) -> nn.Module:
    """The backbone behind the masks."""
    masked = network.backbone
    assert isinstance(masked, Gated | MaskedWeights)
    return masked.backbone


def found_of(scores: Tensor, network: Prompted, backbone: nn.Module, task: SearchTask) -> Found:
    """scores: a row of all units'; ``backbone``: what ``network`` made of the dense one."""
    parts = scores.detach().to("cpu", torch.float32).split([shape.numel() for shape in task.units.values()])
    return Found(
        scores={name: part.view(shape).clone() for (name, shape), part in zip(task.units.items(), parts, strict=True)},
        prompt=prompt_state(network),
        tensors=_changed(backbone, task.dense.backbone),
        label_map=label_map_of(network),
    )


def _changed(backbone: nn.Module, dense: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``backbone`` that are not those of ``dense``, by name."""
    before = dense.state_dict()
    after = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    return {  # tokens of a prompt are none of them
        name: tensor.clone()
        for name, tensor in after.items()
        if name in before and not torch.equal(tensor, before[name].cpu())
    }


def with_tensors(dense: Dense, found: Found) -> nn.Module:
    """The dense backbone with the tensors that the search left: what a plan is replayed on."""
    backbone = copy.deepcopy(dense.backbone)
    state = backbone.state_dict()
    backbone.load_state_dict({**state, **found.tensors})
    return backbone


def scores_as_arrays(found: Found) -> Iterator[tuple[str, np.ndarray]]:
    for root, scores in found.scores.items():
        yield root, scores.double().numpy()
