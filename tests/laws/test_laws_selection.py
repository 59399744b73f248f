"""Laws 5 and 6: what is kept costs at most the budget, is maximal, and stands on allowed widths."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import costs
from tolerances import NAMED_RATIO

from vpdeploy.errors import BudgetError
from vpdeploy.scoring.select import build_selector, select
from vpdeploy.surgery.cost import CostModel
from vpdeploy.values import ChannelGroup, Selection

BUDGETS = {"channel_ratio": CostModel.channels, "macs_ratio": CostModel.macs, "params_ratio": CostModel.params}
# Few different scores give many ties; scores far apart in size, negative and zero ones are legal too.
SCORES = st.sampled_from([-1e30, -1.0, 0.0, 1e-30, 0.5, 1.0, 1e30]) | st.floats(-10, 10)


@dataclass(frozen=True)
class Case:
    """One selection problem. ``percent`` is the budget's ratio; costs are whole numbers, so the law is exact in it."""

    groups: tuple[ChannelGroup, ...]
    cost: CostModel
    budget: str
    percent: int
    round_to: int
    max_removal: Fraction
    scores: dict[str, np.ndarray]

    def cost_of(self, widths: list[int]) -> int:
        value = BUDGETS[self.budget](self.cost, np.array(widths, float))
        assert value == int(value)
        return int(value)

    def fits(self, widths: list[int]) -> bool:
        return 100 * self.cost_of(widths) <= self.percent * self.cost_of(self.dense)

    @property
    def dense(self) -> list[int]:
        return [group.width for group in self.groups]

    @property
    def narrowest(self) -> list[int]:
        return [self.allowed(group)[0] for group in self.groups]

    def allowed(self, group: ChannelGroup) -> list[int]:
        return allowed(group.width, group.unit, self.round_to, self.max_removal)

    def select(self, ratio: float | None = None) -> Selection:
        ratio = self.percent / 100 if ratio is None else ratio
        selector = build_selector(
            self.groups, self.cost, budget=self.budget, requested=ratio, round_to=self.round_to,
            max_removal=float(self.max_removal),
        )  # fmt: skip
        return select(selector, self.scores)


def allowed(width: int, unit: int, round_to: int, max_removal: Fraction) -> list[int]:
    """The widths that the recipe's page promises, in its own words and whole numbers: a layer has ``unit`` outputs for each
    channel, and keeps a multiple of ``round_to`` of them, at least 4.
    """
    step = next(k for k in range(1, round_to + 1) if k * unit % round_to == 0)
    if width < 4 * step:  # narrow: the largest power of two up to a quarter of the width
        step = max([1, *(2**k for k in range(8) if 4 * 2**k <= width)])
    return [
        k
        for k in range(1, width + 1)
        if k == width or (k % step == 0 and width - k <= max_removal * width and k * unit >= 4)
    ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, cost = draw(costs())
    few = draw(st.booleans())
    one = st.sampled_from([0.0, 1.0]) if few else SCORES
    return Case(
        groups,
        cost,
        budget=draw(st.sampled_from(sorted(BUDGETS))),
        percent=draw(st.integers(1, 100)),
        round_to=draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        max_removal=Fraction(draw(st.integers(1, 19)), 20),
        scores={g.root: np.array(draw(st.lists(one, min_size=g.width, max_size=g.width))) for g in groups},
    )


def kept(case: Case, selection: Selection) -> list[int]:
    widths = selection.mask.widths()
    assert list(widths) == [group.root for group in case.groups]
    assert [len(selection.mask.keep[group.root]) for group in case.groups] == case.dense
    return list(widths.values())


@settings(max_examples=60)
@given(case=cases())
def test_the_budget_is_kept_and_no_further_block_would_fit(case):
    assume(case.fits(case.narrowest))
    selection = case.select()
    widths = kept(case, selection)
    assert case.fits(widths)
    for i, group in enumerate(case.groups):
        wider = [w for w in case.allowed(group) if w > widths[i]]
        if wider:
            assert not case.fits([*widths[:i], wider[0], *widths[i + 1 :]]), f"{group.root} could keep {wider[0]}"
    assert selection.reached == case.cost_of(widths) / case.cost_of(case.dense)
    assert (selection.budget, selection.requested) == (case.budget, case.percent / 100)


@settings(max_examples=60)
@given(case=cases())
def test_widths_are_allowed_and_no_group_is_emptied(case):
    assume(case.fits(case.narrowest))
    widths = kept(case, case.select())
    for group, width in zip(case.groups, widths, strict=True):
        assert width >= 1
        assert width in case.allowed(group)
        assert width == group.width or group.width - width <= case.max_removal * group.width
        assert width == group.width or width * group.unit >= 4  # of a layer's outputs


@settings(max_examples=60)
@given(case=cases())
def test_in_a_group_the_higher_score_stays_and_of_equal_ones_the_earlier(case):
    assume(case.fits(case.narrowest))
    for root, keep in case.select().mask.keep.items():
        ranked = sorted(range(len(keep)), key=lambda c: (-case.scores[root][c], c))
        assert [c for c in range(len(keep)) if keep[c]] == sorted(ranked[: sum(keep)])


@settings(max_examples=60)
@given(case=cases())
def test_an_unreachable_budget_names_the_best_and_that_is_reachable(case):
    assume(not case.fits(case.narrowest))
    with pytest.raises(BudgetError) as caught:
        case.select()
    message = str(caught.value)
    assert message.startswith(f"budget.{case.budget}: got {case.percent / 100:g}; the best reachable is ")
    named = float(re.findall(r"the best reachable is ([0-9.e-]+) \(", message)[0])
    best = case.cost_of(case.narrowest) / case.cost_of(case.dense)
    assert best <= named <= best + 1.01 * NAMED_RATIO  # what a user types in its place works, and is not too much
    assert case.select(named).reached <= named


@settings(max_examples=60)
@given(case=cases())
def test_a_ratio_of_one_keeps_everything(case):
    selection = case.select(1.0)
    assert kept(case, selection) == case.dense and selection.reached == 1


@settings(max_examples=60)
@given(case=cases())
def test_selecting_again_gives_the_same_mask(case):
    assume(case.fits(case.narrowest))
    assert case.select() == case.select()
