"""Masks of single weights: as many as asked for, and two of every four."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vpdeploy.errors import BudgetError
from vpdeploy.scoring.select_weights import highest, two_of_four, weight_selector

SHAPES = {"a": (3, 4), "b": (2, 8, 3, 3), "c": (5, 3)}
COUNT = 12 + 144 + 15


@given(arrays(float, st.integers(1, 40), elements=st.integers(-3, 3)), st.integers(0, 45))
def test_the_highest_stay_and_of_equal_ones_the_earlier(scores, count):
    kept = highest(scores, count)
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    assert np.flatnonzero(kept).tolist() == sorted(order[:count])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
def test_as_many_of_all_layers_as_the_budget_leaves(ratio):
    selector = weight_selector(SHAPES, ratio=ratio, granularity="weight")
    scores = np.random.default_rng(0).random(COUNT)
    scores[:12] += 1  # one layer is worth more than the others, and keeps what it has
    kept = selector.select_row(scores)
    assert selector.count == COUNT and int(kept.sum()) == int(ratio * COUNT + 1e-9)
    assert kept[:12].all()
    assert ratio == 1 or scores[kept].min() >= scores[~kept].max()


def test_two_of_every_four_inputs_stay():
    scores = np.random.default_rng(1).random((6, 8, 3, 3))
    kept = two_of_four(scores)
    for out in range(6):
        for y in range(3):
            for x in range(3):
                for four in (slice(0, 4), slice(4, 8)):
                    own, stays = scores[out, four, y, x], kept[out, four, y, x]
                    assert stays.sum() == 2 and own[stays].min() > own[~stays].max()


def test_of_equal_scores_the_first_two_stay_and_odd_layers_are_whole():
    assert two_of_four(np.zeros((1, 8))).tolist() == [[True, True, False, False] * 2]
    selector = weight_selector(SHAPES, ratio=0.5, granularity="2:4")
    kept = selector.select_row(np.random.default_rng(0).random(COUNT))
    assert int(kept[:12].sum()) == 6 and int(kept[12:156].sum()) == 72 and kept[156:].all()


@pytest.mark.parametrize(
    ("ratio", "granularity", "told"),
    [
        (0.4, "2:4", "budget.weight_ratio: got 0.4 with search.granularity = '2:4'; expected 0.5: two of four stay"),
        (0.001, "weight", "budget.weight_ratio: got 0.001; of 171 weights none would stay; ask for more"),
    ],
)
def test_what_no_mask_can_be_is_refused(ratio, granularity, told):
    with pytest.raises(BudgetError) as caught:
        weight_selector(SHAPES, ratio=ratio, granularity=granularity)
    assert str(caught.value) == told
