"""Scores to be learned in somebody's own loop: a frozen network whose channels are masked under a budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy.api.context import undisturbed
from vpdeploy.api.pruning import Budget, prepare, selector_of
from vpdeploy.api.scores import Scores, check_scores, listed, scores_of
from vpdeploy.errors import SurgeryError
from vpdeploy.scoring.select import Selector, select
from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.plan import plan as plan_cuts
from vpdeploy.surgery.plan import tensor_shapes
from vpdeploy.surgery.trace import look
from vpdeploy.values import ChannelGroups, PrunePlan, Selection


class Scored(nn.Module):
    """A copy of a network, frozen, with one learnable score per channel: what ``gated`` gives.

    Calling it applies, straight through, the best mask that the scores and the budget allow, recomputed every time; a loss
    that is backpropagated reaches ``scores`` [channels of all groups] (arXiv:1308.3432). ``open=True`` keeps every channel.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        selector: Selector,
        scores: Tensor,
        replacements: Mapping[str, str],
    ):
        super().__init__()
        self.network = Gated(network, groups.prunable).to(scores.device)
        self.scores = nn.Parameter(scores)
        self._groups, self._selector, self._replacements = groups, selector, dict(replacements)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """The frozen network stays in eval mode: in training its norms would gather statistics that ``cut`` never sees."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor, *, open: bool = False) -> Tensor:
        if open:
            return self.network(x, torch.ones_like(self.scores))
        self._check_finite()
        return self.network(x, StraightThrough.apply(self.scores, hard_mask(self._selector, self.scores)))

    def _check_finite(self) -> None:
        """Raises: SurgeryError with the groups whose scores are NaN or infinite: of these there is no best mask."""
        if bool(self.scores.isfinite().all()):
            return
        parts = self.scores.detach().split([group.width for group in self._groups.prunable])
        lost = [
            f"{group.root} is not finite"
            for group, part in zip(self._groups.prunable, parts, strict=True)
            if not bool(part.isfinite().all())
        ]
        raise SurgeryError(
            f"scores: {listed(lost)}; expected one finite score for each channel: look at the losses for NaN, and learn the "
            "scores anew with a lower learning rate"
        )

    def selection(self) -> Selection:
        """The mask of the scores as they are, and how near it comes to the budget.

        Raises: SurgeryError when they are not finite.
        """
        self._check_finite()
        row = self.scores.detach().cpu().split([group.width for group in self._groups.prunable])
        return select(
            self._selector, {g.root: part.double().numpy() for g, part in zip(self._groups.prunable, row, strict=True)}
        )

    def plan(self) -> PrunePlan:
        """The cuts of that mask, for ``cut`` on the model that ``gated`` was given. Raises: as ``selection``."""
        mask = self.selection().mask
        return plan_cuts(self.network.backbone, self._groups.prunable, mask, replacements=self._replacements)


@undisturbed()
def gated(
    model: nn.Module,
    groups: ChannelGroups,
    scores: Scores = "magnitude",
    budget: Budget | float = 0.5,
    *,
    seed: int = 0,
) -> Scored:
    """``model`` with learnable scores on ``groups`` (from ``find_groups`` on it) under ``budget`` (a number: of the MACs).

    Raises: BudgetError with the best reachable ratio; SurgeryError for groups or scores that do not fit.
    """
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    if not isinstance(groups, ChannelGroups):
        raise SurgeryError(
            f"groups: got {groups if groups is None else f'a {type(groups).__name__}'}; expected what "
            "find_groups(model, example) gives"
        )
    check_scores(scores, seed)
    network, replacements = prepare(model, torch.zeros(1, *groups.shape))
    _check_belong(groups, network)
    selector = selector_of(network, groups, budget)
    arrays = scores_of(scores, network, groups, seed=seed)
    row = np.concatenate([arrays[group.root] for group in groups.prunable])
    frozen = copy.deepcopy(network).requires_grad_(False)
    like = next(network.parameters())
    return Scored(frozen, groups, selector, torch.tensor(row, dtype=torch.float32, device=like.device), replacements)


def _check_belong(groups: ChannelGroups, network: nn.Module) -> None:
    """Raises: SurgeryError when ``groups`` are those of a network with other tensors, or with another forward."""
    shapes = tensor_shapes(network)
    fits = all(
        member.axis < len(shapes.get(member.tensor, ())) and max(member.indices) < shapes[member.tensor][member.axis]
        for group in groups.groups
        for member in group.members
    )
    if not fits or look(network, torch.zeros(1, *groups.shape)).path != groups.path:
        raise SurgeryError(
            f"groups: not those of this {type(network).__name__}: its layers, or what its forward does, are others; expected "
            "what find_groups(model, example) gives for this model"
        )
