"""Iterative pruning: what is gone stays gone, and the budget is approached by equal shares."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from vpdeploy.scoring.rounds import eased, in_rounds
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.straight_through import hard_mask

CHANNELS = 18


def selector() -> Selector:
    return tiny.task(tiny.network(), tiny.recipe({"budget.macs_ratio": 0.3, "budget.round_to": 1})).selector


def cost(of: Selector, mask: Tensor) -> float:
    widths = np.bincount(of.group_of[mask.numpy()], minlength=len(of.roots)).astype(float)
    return of.budget.cost(widths) / of.budget.dense


def test_one_round_gives_the_scores_as_they_are():
    scores = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    row = in_rounds(lambda turn, gates: seen.append(gates) or scores, selector(), rounds=1, channels=CHANNELS)
    assert row is scores and seen[0].tolist() == [1] * CHANNELS


@pytest.mark.parametrize("rounds", [2, 5])
def test_each_round_looks_at_what_the_last_one_left(rounds):
    """Fresh random scores in every round: nothing but the rounds keeps order."""
    of, generator, masks = selector(), torch.Generator().manual_seed(3), []

    def scores_under(turn: int, gates: Tensor) -> Tensor:
        assert turn == len(masks)
        masks.append(gates.bool())
        return torch.rand(CHANNELS, generator=generator)

    row = in_rounds(scores_under, of, rounds=rounds, channels=CHANNELS)
    masks.append(hard_mask(of, row))
    assert len(masks) == rounds + 1
    for turn, (before, after) in enumerate(pairwise(masks)):
        assert bool((before | ~after).all())  # nothing comes back
        assert cost(of, after) <= 0.3 ** ((turn + 1) / rounds) * (1 + 1e-9)
    assert len({int(mask.sum()) for mask in masks}) > 2


def test_later_rounds_scores_decide():
    """Two channels of equal worth until one of them is left alone."""
    of = selector()

    def scores_under(turn: int, gates: Tensor) -> Tensor:
        scores = torch.linspace(1, 2, CHANNELS)
        if turn == 1:
            scores = scores.flip(0)
        return scores

    row = in_rounds(scores_under, of, rounds=2, channels=CHANNELS)
    first = hard_mask(eased(of, 0.5), torch.linspace(1, 2, CHANNELS))
    kept = row[first]
    assert torch.equal(kept.argsort(), torch.arange(len(kept) - 1, -1, -1))  # by the second round's scores
    assert float(row[~first].max()) < float(kept.min())


def test_limits_hold_after_the_last_round():
    of = selector()
    assert eased(of, 1.0) is of
    half = eased(of, 0.5)
    assert half.budget.limit == pytest.approx(of.budget.dense * 0.3**0.5) and half.bounds[0].kind == "macs_ratio"
