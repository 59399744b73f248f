"""Selection by hand: widths, order, ties, messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from strategies import group_of

from vpdeploy.errors import BudgetError, SurgeryError
from vpdeploy.scoring.select import Selector, allowed_widths, build_selector, prices, select, select_row
from vpdeploy.surgery.cost import CostModel, Sum


def selector(*widths: int, weights: list[float] | None = None, **table: Any) -> Selector:
    """Groups g0, g1, ...; one channel of group i costs ``weights[i]`` MACs and one parameter, and is five outputs of a layer:
    more than the least that must stay, and no divisor of a step.
    """
    count = len(widths)
    share, constant = np.zeros((2, count, count)), np.zeros((2, count))
    share[0], constant[1] = np.eye(count), 1
    products, entries = (Sum(share, constant, np.array(rest)) for rest in (weights or [1.0] * count, [1.0] * count))
    cost = CostModel(products, entries, np.array(widths, float))
    groups = [group_of(f"g{i}", width, unit=5) for i, width in enumerate(widths)]
    return build_selector(groups, cost, **{"budget": "channel_ratio", "round_to": 1, "max_removal": 0.9, **table})


def scores(**rows: list[float]) -> dict[str, np.ndarray]:
    return {root: np.array(row) for root, row in rows.items()}


@pytest.mark.parametrize(
    ("width", "round_to", "max_removal", "expected"),
    [
        (64, 16, 0.9, [16, 32, 48, 64]),
        (64, 8, 0.5, [32, 40, 48, 56, 64]),
        (70, 16, 0.9, [16, 32, 48, 64, 70]),  # the full width is no multiple
        (63, 16, 0.9, [8, 16, 24, 32, 40, 48, 56, 63]),  # narrow: 8 is the largest power of two up to 15.75
        (16, 8, 0.9, [4, 8, 12, 16]),
        (10, 8, 0.9, [4, 6, 8, 10]),  # never fewer than 4
        (4, 8, 0.9, [4]),
        (3, 8, 0.9, [3]),
        (1, 8, 0.9, [1]),
        (10, 1, 0.9, list(range(4, 11))),
        (20, 1, 0.7, list(range(6, 21))),  # 20 * (1 - 0.7) is 6.000000000000001 in floating point
        (100, 1, 0.9, list(range(10, 101))),
        (40, 8, 0.01, [40]),
        (12, 3, 0.9, [6, 9, 12]),
    ],
)
def test_allowed_widths(width, round_to, max_removal, expected):
    assert allowed_widths(width, round_to=round_to, max_removal=max_removal) == expected


@pytest.mark.parametrize(
    ("width", "unit", "round_to", "max_removal", "expected"),
    [
        (12, 64, 8, 0.9, list(range(2, 13))),  # heads of 64: each is a multiple of 8 by itself
        (12, 64, 8, 0.95, list(range(1, 13))),  # and one of them is more than 4 channels
        (32, 4, 8, 0.9, [4, *range(6, 33, 2)]),  # 2 groups of 4 channels make 8
        (16, 3, 8, 0.9, [4, 8, 12, 16]),  # narrow for steps of 8 (24 channels): a quarter of the width
        (64, 6, 8, 0.9, [8, *range(12, 65, 4)]),  # 4 times 6 is a multiple of 8
        (9, 2, 1, 0.9, list(range(2, 10))),  # 2 pairs are 4 channels
        (5, 3, 1, 0.9, list(range(2, 6))),  # 2 times 3
    ],
)
def test_allowed_widths_count_the_outputs_of_a_layer(width, unit, round_to, max_removal, expected):
    assert allowed_widths(width, unit=unit, round_to=round_to, max_removal=max_removal) == expected


# --- order ----------------------------------------------------------------------------------------------------------


def test_the_highest_scores_stay_wherever_they_are():
    chosen = select(selector(4, 3, requested=0.58), scores(g0=[0.1, 0.9, 0.2, 0.8], g1=[0.7, 0.3, 0.6]))  # 4 of 7
    assert chosen.mask.keep == {"g0": (False, True, False, True), "g1": (True, False, True)}
    assert chosen.reached == 4 / 7 and chosen.mask.widths() == {"g0": 2, "g1": 2}


def test_a_dear_group_that_no_longer_fits_leaves_room_for_a_cheap_one():
    # 4 * 10 + 4 * 1 = 44 MACs; 26 may stay: both groups' one channel (11), one dear (21), and then only cheap ones fit
    chosen = select(
        selector(4, 4, weights=[10.0, 1.0], budget="macs_ratio", requested=26 / 44),
        scores(g0=[9.0, 8.0, 7.0, 6.0], g1=[4.0, 3.0, 2.0, 1.0]),
    )
    assert chosen.mask.widths() == {"g0": 2, "g1": 4}
    assert chosen.reached == 24 / 44


def test_the_budget_is_met_to_the_last_channel():
    row = np.random.default_rng(0).random(4000)
    for kept in (1999, 2000, 2001):
        assert select_row(selector(4000, requested=kept / 4000), row).sum() == kept


def test_one_group_keeps_its_least_when_its_scores_are_low():
    chosen = select(selector(10, 10, requested=0.5, max_removal=0.8), scores(g0=[0.0] * 10, g1=[1.0] * 10))
    assert chosen.mask.widths() == {"g0": 2, "g1": 8}


def test_blocks_compete_by_their_mean():
    chosen = select(selector(16, 16, requested=0.5, round_to=4, max_removal=0.75), scores(
        g0=[9.0] * 4 + [5.0, 0, 0, 0] + [0.0] * 8,  # its second block: mean 1.25
        g1=[9.0] * 4 + [2.0] * 4 + [1.5] * 4 + [0.0] * 4,  # its second: 2, its third: 1.5
    ))  # fmt: skip
    assert chosen.mask.widths() == {"g0": 4, "g1": 12}


# --- ties -----------------------------------------------------------------------------------------------------------


def test_of_equal_channels_the_earlier_stay_and_of_equal_groups_the_earlier_grows_first():
    same = scores(g0=[1.0] * 5, g1=[1.0] * 5)
    first = select(selector(5, 5, requested=0.5), same)
    assert first.mask.keep == {"g0": (True,) * 4 + (False,), "g1": (True,) + (False,) * 4}
    assert select(selector(5, 5, requested=0.5), same) == first


def test_negative_zero_is_zero():
    tied = select(selector(4, requested=0.5), scores(g0=[-0.0, 0.0, -0.0, 0.0]))
    assert tied.mask.keep["g0"] == (True, True, False, False)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.1, 1 / 3, 1e-3, 5.3])
def test_rounding_of_a_mean_does_not_reorder_equal_blocks(value):
    """Eleven equal scores in blocks of 3 and a last of 2: the means differ in their last bit."""
    for ratio in np.linspace(0.3, 0.99, 12):
        kept = select_row(selector(14, 14, requested=float(ratio), round_to=3), np.full(28, value))
        for part in np.split(kept, 2):
            assert part.sum() in allowed_widths(14, unit=5, round_to=3, max_removal=0.9)
            assert part.tolist() == sorted(part.tolist(), reverse=True)


# --- messages -------------------------------------------------------------------------------------------------------


def test_where_speed_counts_importance_is_weighed_against_the_square_of_the_time_for_a_product():
    """And against neither alone: g1 takes three times the time of g0 for its products, g2 as much, and twice the products."""
    given = selector(10, 10, 10, weights=[1.0, 1.0, 2.0], budget="macs_ratio", requested=0.5)
    price = prices(replace(given, speed=lambda widths: 5.0 + float(widths @ [1.0, 3.0, 2.0])))
    assert price / price[0] == pytest.approx([1.0, 9.0, 1.0])
    assert prices(given) / prices(given)[0] == pytest.approx([1.0, 1.0, 2.0])


def test_an_unreachable_budget_says_what_is_reachable_and_what_to_do():
    with pytest.raises(BudgetError) as caught:
        selector(10, 20, requested=0.05, round_to=2)
    # the narrowest: 2 of 10 and 2 of 20 channels, 4 / 30 = 0.13333...
    assert str(caught.value) == (
        "budget.channel_ratio: got 0.05; the best reachable is 0.1334 (with round_to = 2, max_removal = 0.9, at least 4 outputs "
        "of a layer, and 2 groups that can lose some); ask for that or more; a smaller round_to, or a larger max_removal reaches "
        "less"
    )
    with pytest.raises(
        BudgetError, match="and 1 groups that can lose some.; ask for that or more; a larger max_removal reach"
    ):
        selector(10, 20, requested=0.05, round_to=1, max_removal=0.06)  # of 10 that is less than one
    assert selector(10, 20, requested=0.1334, round_to=2).budget.requested == 0.1334


def test_the_best_reachable_value_itself_is_reachable():
    assert select(selector(10, requested=0.1), scores(g0=[0.5] * 10)).mask.widths() == {"g0": 1}
    assert select(selector(30, requested=0.3, max_removal=0.7), scores(g0=[0.5] * 30)).mask.widths() == {"g0": 9}


def test_without_groups_only_a_ratio_of_one_can_be_met():
    with pytest.raises(BudgetError) as caught:
        selector(requested=0.5)
    assert str(caught.value) == (
        "budget.channel_ratio: got 0.5; the best reachable is 1, as nothing can be removed: no channel group is exact; "
        "`vpdeploy inspect` gives the reasons"
    )
    empty = select(selector(requested=1.0), {})
    assert empty.mask.keep == {} and empty.reached == 1


def test_removing_nothing_below_one_is_an_error():
    almost = 1 - 1e-13  # what is left of 1 when rounding is forgiven
    with pytest.raises(SurgeryError, match="nothing was removed, though budget.channel_ratio is 1"):
        select(selector(4, requested=almost), scores(g0=[1.0] * 4))
    with pytest.raises(BudgetError, match="the best reachable is 1 "):
        selector(1, 1, requested=0.9)  # groups of one channel cannot shrink


def test_a_ratio_of_one_keeps_everything():
    whole = select(selector(5, 7, requested=1.0, round_to=4), scores(g0=[0.0] * 5, g1=[-1.0] * 7))
    assert whole.mask.keep == {"g0": (True,) * 5, "g1": (True,) * 7} and whole.reached == 1


# --- caps on certain groups -------------------------------------------------------------------------------------------


def test_a_cap_is_that_of_the_first_pattern_that_fits():
    made = selector(16, 16, 16, requested=0.5, caps={"g1": 0.25, "g[12]": 0.5})
    assert made.least_widths.tolist() == [2, 12, 8]
    chosen = select(made, scores(g0=[9.0] * 16, g1=[0.0] * 16, g2=[0.0] * 16))
    assert chosen.mask.widths()["g1"] >= 12


def test_a_cap_that_fits_no_group_is_told():
    with pytest.raises(BudgetError, match=r"budget.caps: 'layer9.\*' fits no group that can be pruned; .* of g0, g1$"):
        selector(16, 16, requested=0.5, caps={"layer9.*": 0.25})
