"""Fisher importance: how much the network's own answers would change with the loss of a channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpdeploy.scoring.criteria.model import Batches, Model
from vpdeploy.scoring.criteria.taylor import taylor, taylor_of_weights
from vpdeploy.values import ChannelGroup


def fisher(model: Model, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, Tensor]:
    """Group root -> score of each channel, [g] float64, at least 0.

    As "taylor", with labels drawn from what the network answers in place of the true ones: the diagonal of the Fisher
    information of the gates. It is the curvature of the divergence from the network's own answers, which squared gradients of
    true labels are not (Kunstner et al., arXiv:1905.12558), and it does not vanish on images that the network knows by heart.
    Each image has its own draw, so products of two images' gradients are 0 in the mean. The same ``batches`` give the same
    labels.
    """
    return taylor(model, groups, _Answered(model, batches))


def fisher_of_weights(model: Model, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Weight name -> score of each entry, of its shape: w^2 times the diagonal of the Fisher information."""
    return taylor_of_weights(model, names, _Answered(model, batches))


@dataclass(frozen=True)
class _Answered:
    """``batches`` with labels that ``model`` gives."""

    model: Model
    batches: Batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = torch.Generator().manual_seed(0)
        for x, _ in self.batches:
            with torch.no_grad():
                answers = self.model(x).float().softmax(dim=1).cpu()
            yield x, torch.multinomial(answers, 1, generator=drawn)[:, 0].to(x.device)
