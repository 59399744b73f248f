"""Law 9: the cost model says of every width what the counter finds on the network that was cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FAMILIES, SIDE, Head, conv_norm, masks, networks, probed, randomised
from torch import Tensor, nn

from vpdeploy.errors import BudgetError
from vpdeploy.measure.macs import count_macs
from vpdeploy.scoring.select import build_selector, select
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.groups import example_input
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelMask

EXAMPLE = example_input(SIDE, batch=1)


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def cut_to(network: nn.Module, groups: tuple[ChannelGroup, ...], mask: ChannelMask) -> nn.Module:
    return cut(network, plan(network, groups, mask))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(data=st.data())
def test_the_cost_model_equals_the_counter_on_the_cut_network(family, data):
    network = data.draw(networks(family)).float()
    groups = probed(network).prunable
    cost = build_cost_model(network, groups, example=EXAMPLE)
    mask = data.draw(masks(groups))
    small, kept = cut_to(network, groups, mask), np.array(list(mask.widths().values()), float)
    for widths, counted in ((cost.dense_widths, network), (kept, small)):
        assert cost.macs(widths) == count_macs(counted, canvas_size=SIDE).macs
        assert cost.params(widths) == params(counted)
    assert cost.channels(kept) == sum(mask.widths().values())


class Shared(nn.Module):
    """One convolution used on two maps of different sizes: its weights are counted once, its products twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.pool, self.head = conv_norm(3, 8), conv_norm(8, 8), nn.AvgPool2d(2), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.shared(self.pool(torch.relu(self.shared(x)))))


class Attention(nn.Module):
    """A transformer block: the attention's products are made outside any layer, its widths tied by the residual stream."""

    def __init__(self):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 8, 2, stride=2), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second, self.last = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last((x + self.second(torch.relu(self.first(x)))).mean(1))


class CrossCovariance(nn.Module):
    """Attention among the channels within each of 4 heads (XCiT): no axis of its products holds a head alone."""

    def __init__(self):
        super().__init__()
        self.patches, self.q, self.k, self.v = nn.Conv2d(3, 8, 2, stride=2), *(nn.Linear(8, 12) for _ in range(3))
        self.proj, self.last = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (-1, 3)).permute(0, 2, 3, 1) for layer in (self.q, self.k, self.v))
        out = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.last((x + self.proj(out.permute(0, 3, 1, 2).flatten(2))).mean(1))


class Functional(nn.Module):
    """A product with a bare parameter, and one convolution whose weight is tied to another's."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight, self.matrix = self.a.weight, nn.Parameter(torch.zeros(SIDE, SIDE))
        self.last, self.head = nn.Conv2d(4, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.b(torch.relu(self.a(self.stem(x)))) @ self.matrix))))


OTHERS = {
    "attention": Attention,
    "attention among channels": CrossCovariance,
    "functional and tied": Functional,
    "grouped, few of many and many of few": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, padding="same"), nn.ReLU(), nn.Conv2d(4, 9, 1), nn.ReLU(),
        nn.ConvTranspose2d(9, 6, 1, groups=3), nn.ReLU(), nn.Conv2d(6, 8, 1, groups=2), Head(8)
    ),
    "depthwise with a multiplier": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 1), Head(6)
    ),
    "dilated": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, dilation=2, padding="same"), nn.ReLU(), nn.Conv2d(8, 6, 1), Head(6)),
    "two transposed in a row": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 5, 2, bias=False), nn.BatchNorm2d(5), Head(5),
    ),
    "linear on a map": lambda: nn.Sequential(nn.Linear(SIDE, 6), nn.ReLU(), nn.Linear(6, 7), nn.Conv2d(3, 4, 1), Head(4)),
    "one convolution used twice": Shared,
    "a slope for each channel": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.PReLU(), Head(6)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_odd_layers_are_counted_too(name):
    network = randomised(OTHERS[name](), seed=0).float()
    groups = probed(network).prunable
    cost = build_cost_model(network, groups, example=EXAMPLE)
    mask = ChannelMask({g.root: tuple(c % 3 > 0 for c in range(g.width)) for g in groups})
    small, kept = cut_to(network, groups, mask), np.array([mask.widths()[g.root] for g in groups], float)
    assert groups and params(small) < params(network)
    for widths, counted in ((cost.dense_widths, network), (kept, small)):
        assert cost.macs(widths) == count_macs(counted, canvas_size=SIDE).macs
        assert cost.params(widths) == params(counted)


def test_the_example_may_have_any_batch():
    network = randomised(FAMILIES["mixed"]((4, 5, 6, 7), nn.ReLU), seed=0).float()
    groups = probed(network).prunable
    one, three = (build_cost_model(network, groups, example=example_input(SIDE, batch=n)) for n in (1, 3))
    assert one.macs(one.dense_widths) == three.macs(three.dense_widths)


@pytest.mark.parametrize("budget", ["macs_ratio", "params_ratio"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_select_says_was_reached_is_what_is_counted_after_the_cut(family, budget):
    network = randomised(FAMILIES[family]((9, 8, 7, 9), nn.ReLU), seed=0).float()
    groups = probed(network).prunable
    cost = build_cost_model(network, groups, example=EXAMPLE)
    scores = {g.root: np.random.default_rng(0).random(g.width) for g in groups}
    selection = select(build_selector(groups, cost, budget=budget, requested=0.5, round_to=2, max_removal=0.9), scores)
    small = cut_to(network, groups, selection.mask)
    if budget == "macs_ratio":
        counted = count_macs(small, canvas_size=SIDE).macs / count_macs(network, canvas_size=SIDE).macs
    else:
        counted = params(small) / params(network)
    assert selection.reached == counted <= 0.5
    with pytest.raises(BudgetError):
        build_selector(groups, cost, budget=budget, requested=0.001, round_to=2, max_removal=0.9)
