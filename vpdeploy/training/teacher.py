"""The dense network's outputs, for a smaller one to learn (Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vpdeploy.data.prepared import Images, batches
from vpdeploy.recipe.tables import Recipe
from vpdeploy.training.evaluate import EVALUATION_BATCH
from vpdeploy.training.network import Compute, Prompted, TrainingData, build_canvas, to_pixels
from vpdeploy.values import Dense

Outputs = Callable[[Tensor, Tensor], Tensor]  # a batch [n, 3, s, s], its places among the training images [n] -> [n, k]


@dataclass(frozen=True)
class Teacher:
    """Outputs that a network learns to give, beside the labels (Hinton et al., arXiv:1503.02531)."""

    outputs: Outputs
    share: float
    temperature: float

    def divergence(self, logits: Tensor, images: Tensor, places: Tensor) -> Tensor:
        """Kullback-Leibler, of both softened by the temperature T, times T^2: its gradient keeps its size whatever T is."""
        mine = F.log_softmax(self.outputs(images, places) / self.temperature, dim=1)
        other = F.log_softmax(logits / self.temperature, dim=1)
        return F.kl_div(other, mine, reduction="batchmean", log_target=True) * self.temperature**2


def asked_every_step(network: Prompted) -> Outputs:
    """The outputs of ``network`` for the very batch that the other one sees."""

    @torch.no_grad()
    def outputs(images: Tensor, places: Tensor) -> Tensor:
        return network(images, fast=True)

    return outputs


def asked_once(network: Prompted, images: Images, *, mirrored: bool) -> Outputs:
    """The outputs of ``network`` for each of ``images`` as it is, remembered; ``mirrored``: their mean with those for its mirror
    image. Shifts are not looked at: one pass in place of one in every epoch.
    """
    network.eval()
    device, parts = network.compute.device, []
    with torch.no_grad():
        for pixels, _ in batches(images, torch.arange(len(images)), EVALUATION_BATCH):
            views = [pixels, pixels.flip(3)] if mirrored else [pixels]
            parts.append(torch.stack([network(to_pixels(view, device), fast=True) for view in views]).mean(dim=0))
    remembered = torch.cat(parts)
    return lambda images, places: remembered[places.to(device)]


def teacher_of(dense: Dense, data: TrainingData, recipe: Recipe, compute: Compute, *, share: float) -> Teacher | None:
    """``dense``, without a prompt, asked as [tune] says; ``share`` of the loss, None for none of it."""
    if not share:
        return None
    table, backbone = recipe.tune, copy.deepcopy(dense.backbone).requires_grad_(False)
    network = Prompted(build_canvas(recipe, prompted=False), backbone, compute, label_map=dense.label_map).eval()
    if table.teacher == "once":
        outputs = asked_once(network, data.train, mirrored="flip" in recipe.data.augment)
    else:
        outputs = asked_every_step(network)
    return Teacher(outputs, share, table.temperature)
