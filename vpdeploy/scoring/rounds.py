"""Iterative pruning: scores again and again, each time of the network that the mask so far leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.select_weights import WeightSelector
from vpdeploy.scoring.straight_through import hard_mask


def in_rounds(
    scores_under: Callable[[int, Tensor], Tensor], selector: Selector | WeightSelector, *, rounds: int, channels: int
) -> Tensor:
    """scores_under: (round from 0, gates [channels]) -> scores [channels]. Gives scores of which ``selector`` makes the mask of
    the last round: [channels].

    After round i of n, dense * ratio ** (i / n) of the budget's quantity may remain: the same share goes in every round (the
    exponential schedule of SynFlow, arXiv:2006.05467). What is gone does not come back. With more than one round, scores
    are places among all channels, evenly over (0, 2].
    """
    if rounds == 1:
        return scores_under(0, torch.ones(channels))
    gone = torch.full((channels,), rounds)  # the round in which a channel went; ``rounds``: it is still there
    last = torch.zeros(channels, dtype=torch.float64)  # its score when it was last looked at
    row = torch.zeros(channels)
    for turn in range(rounds):
        left = gone == rounds
        last = torch.where(left, scores_under(turn, left.float()).double().cpu(), last)
        row = _places(gone, last)
        kept = hard_mask(eased(selector, (turn + 1) / rounds), row)
        gone = torch.where(left & ~kept, turn, gone)
    return row


def eased(selector: Selector | WeightSelector, share: float) -> Selector | WeightSelector:
    """``selector`` after this share of all rounds; hard limits, and patterns of weights, hold after the last one."""
    if share >= 1:
        return selector
    if isinstance(selector, WeightSelector):
        return replace(selector, ratio=selector.ratio**share, pattern="")
    first, *others = selector.bounds
    limit = first.dense * min(1.0, first.limit / first.dense) ** share
    return replace(
        selector,
        bounds=(
            replace(first, limit=limit),
            *(replace(bound, limit=max(bound.limit, bound.dense)) for bound in others),
        ),
    )


def _places(gone: Tensor, scores: Tensor) -> Tensor:
    """By the round in which channels went, and by score among those of one round: evenly over (0, 2]."""
    by_score = scores.argsort(stable=True)
    order = by_score[gone[by_score].argsort(stable=True)]
    return 2 * torch.empty(len(scores)).scatter_(0, order, torch.arange(1, len(scores) + 1).float()) / len(scores)
