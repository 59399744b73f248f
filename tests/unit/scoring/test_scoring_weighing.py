"""What channels cost, and importances weighed against it, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from strategies import group_of

from vpdeploy.scoring.select import Selector, build_selector, prices
from vpdeploy.scoring.weighing import for_cost, ranked
from vpdeploy.surgery.cost import CostModel, Sum

GROUPS = (group_of("a", 2, unit=5), group_of("b", 3, unit=5))


def selector(budget: str) -> Selector:
    """Two layers: the first holds 4 a MACs, the second, which reads a and writes b, 10 a b."""
    share = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])  # two axes of two tensors, by group
    constant = np.array([[0.0, 0.0], [1.0, 0.0]])
    products, entries = (Sum(share, constant, np.array(rest)) for rest in ([4.0, 10.0], [1.0, 1.0]))
    cost = CostModel(products, entries, np.array([2.0, 3.0]))
    return build_selector(GROUPS, cost, budget=budget, requested=0.5, round_to=1, max_removal=0.9)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("macs_ratio", [4 + 30, 20]), ("params_ratio", [1 + 3, 2]), ("channel_ratio", [1, 1])],
)
def test_the_price_of_a_channel_is_what_its_removal_saves(budget, expected):
    assert prices(selector(budget)).tolist() == expected


def test_importances_are_divided_by_prices_and_ranked():
    # 34, 17 and 10, 40, 0, over the prices 34 and 20: 1, 0.5 and 0.5, 2, 0. Equal ones keep their order.
    scores = {"a": torch.tensor([34.0, 17.0]), "b": torch.tensor([10.0, 40.0, 0.0])}
    weighed = for_cost(scores, GROUPS, selector("macs_ratio"))
    assert weighed["a"].tolist() == pytest.approx([1, 0.5]) and weighed["b"].tolist() == pytest.approx([0.5, 2, 0])
    found = ranked(weighed, GROUPS)
    assert found["a"].tolist() == pytest.approx([1.6, 0.8])
    assert found["b"].tolist() == pytest.approx([1.2, 2.0, 0.4])
    assert found["a"].dtype == torch.float32


def test_importance_is_weighed_against_milliseconds_under_a_budget_of_them():
    ms = Sum(np.array([np.eye(2), np.zeros((2, 2))]), np.array([[0.0, 0], [1, 1]]), np.array([3.0, 1.0]))
    macs = Sum(np.array([np.eye(2), np.zeros((2, 2))]), np.array([[0.0, 0], [1, 1]]), np.array([1.0, 2.0]))
    cost = CostModel(macs, macs, np.array([8.0, 8.0]), {"latency_ms": ms})
    groups = [group_of("a", 8, unit=1), group_of("b", 8, unit=1)]
    common: dict[str, Any] = {"requested": 0.5, "round_to": 1, "max_removal": 0.9}
    assert prices(build_selector(groups, cost, budget="latency_ratio", **common)).tolist() == [3, 1]
    assert prices(build_selector(groups, cost, budget="macs_ratio", **common)).tolist() == [1, 2]
    same = build_selector(groups, cost, budget="latency_ratio", speed="latency_ms", **common)
    assert prices(same).tolist() == [3, 1]
    fast = build_selector(groups, cost, budget="macs_ratio", speed="latency_ms", **common)
    average = (3 * 8 + 8) / (8 + 2 * 8)  # ms for each product, of the whole: neither tiny nor huge, whatever the units
    assert prices(fast) == pytest.approx([(3 / 1 / average) ** 2, (1 / 2 / average) ** 2])


@pytest.mark.parametrize(("requested", "width"), [(0.25, 4), (0.5625, 6), (0.999999, 8)])
def test_speed_is_weighed_where_the_budget_leaves_widths(requested, width):
    """What a layer costs beside its products weighs more in a narrow one."""
    product = np.array([[[1.0, 0], [1, 0]], [[0.0, 1], [0, 0]]])  # a b, and a with a constant beside it
    beside = np.array([[0.0, 0], [0, 8]])
    ms, macs = Sum(product, beside, np.array([1.0, 1])), Sum(product[:, :1], beside[:, :1], np.array([1.0]))
    cost = CostModel(macs, macs, np.array([8.0, 8.0]), {"latency_ms": ms})
    groups = [group_of("a", 8, unit=1), group_of("b", 8, unit=1)]
    fast = build_selector(
        groups, cost, budget="macs_ratio", requested=requested, round_to=1, max_removal=0.9, speed="latency_ms"
    )
    a, b = prices(fast)
    assert a / b == pytest.approx(((width + 8) / width) ** 2, rel=1e-5)
