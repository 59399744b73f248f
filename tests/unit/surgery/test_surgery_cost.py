"""Costs as closed forms: every number here is worked out on paper."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from strategies import CLASSES, SIDE, Head, conv_norm
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from vpdeploy.surgery.cost import CostModel, build_cost_model
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.values import ChannelGroup, Member, Side

AREA = SIDE**2


def cost_of(network: nn.Module) -> CostModel:
    """Over every group, the excluded ones too, without the last: the network's outputs."""
    groups = find_groups(network, example_input(SIDE)).groups
    return build_cost_model(network, groups[:-1], example=example_input(SIDE, batch=1))


def test_a_chain_of_convolutions():
    network = nn.Sequential(*conv_norm(3, 8), nn.ReLU(), *conv_norm(8, 6, stride=2), nn.ReLU(), Head(6))
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [8, 6]
    for a, b in [(8, 6), (5, 6), (8, 1), (3, 2)]:
        widths = np.array([a, b], float)
        assert cost.macs(widths) == 9 * 3 * a * AREA + 9 * a * b * (AREA / 4) + b * CLASSES
        assert cost.params(widths) == 27 * a + 2 * a + 9 * a * b + 2 * b + b * CLASSES + CLASSES
        assert cost.channels(widths) == a + b


class Stream(nn.Module):
    """A residual stream: one convolution reads and writes the same group, so its cost is a square."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, bias=False), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(x))


def test_a_convolution_within_one_group_costs_a_square():
    cost = cost_of(Stream())
    for a in (6, 4, 1):
        widths = np.array([a], float)
        assert cost.macs(widths) == 3 * a * AREA + 9 * a * a * AREA + a * CLASSES
        assert cost.params(widths) == 4 * a + 9 * a * a + a * CLASSES + CLASSES


def test_depthwise_linear_and_transposed():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.ConvTranspose2d(4, 5, 2, stride=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.Linear(7, CLASSES, bias=False),
    )  # fmt: skip
    cost = cost_of(network)
    for a, b, c in [(4, 5, 7), (3, 2, 1)]:
        widths = np.array([a, b, c], float)
        macs = 3 * a * AREA + 9 * a * AREA + a * b * 4 * AREA + 4 * b * c + c * CLASSES
        assert cost.macs(widths) == macs
        assert cost.params(widths) == 4 * a + 9 * a + 4 * a * b + b + 4 * b * c + c + c * CLASSES


def test_a_grouped_convolution_reads_its_share_of_the_inputs():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False), Head(6))
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [8, 6]
    for a, b in [(8, 6), (4, 6), (8, 2)]:
        assert cost.macs(np.array([a, b], float)) == 3 * a * AREA + 9 * (a / 2) * b * AREA + b * CLASSES


def test_what_is_not_in_a_group_is_a_constant():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), Head(5))
    first, second, _ = find_groups(network, example_input(SIDE)).groups
    example = example_input(SIDE, batch=1)
    alone = build_cost_model(network, (second,), example=example)
    assert alone.macs(np.array([2.0])) == 3 * 4 * AREA + 4 * 2 * AREA + 2 * CLASSES
    reversed_ = build_cost_model(network, (second, first), example=example)
    assert reversed_.macs(np.array([2.0, 3.0])) == 3 * 3 * AREA + 3 * 2 * AREA + 2 * CLASSES
    none = build_cost_model(network, (), example=example)
    assert none.macs(np.zeros(0)) == 3 * 4 * AREA + 4 * 5 * AREA + 5 * CLASSES
    assert none.params(np.zeros(0)) == 16 + 25 + 6 * CLASSES


class SelfProduct(nn.Module):
    """Channels multiplied with one another: a product that shrinks with the width, outside every layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 6, 1), nn.Linear(AREA, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2)
        return self.linear((x.transpose(1, 2) @ x).mean(1))


def test_products_outside_the_layers_are_counted_as_when_dense():
    network = SelfProduct()
    group = ChannelGroup("conv", 6, (Member("conv", "out", tuple(range(6)), tuple(range(6))),))
    for batch in (1, 3):
        cost = build_cost_model(network, (group,), example=example_input(SIDE, batch=batch))
        assert cost.other_macs == AREA * 6 * AREA
        assert cost.macs(np.array([2.0])) == 3 * 2 * AREA + AREA * 6 * AREA + AREA * CLASSES
    assert cost_of(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), Head(4))).other_macs == 0


def test_a_computed_weight_costs_what_a_plain_one_does():
    """As weight_norm's: its two parameters, direction and length, are no products; the weight made of them is."""
    network = nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.ReLU(), weight_norm(nn.Conv2d(4, 5, 1)), Head(5)
    )
    cost = cost_of(network)
    assert (cost.other_macs, cost.told) == (0, (True, True))
    for a, b in [(4, 5), (0, 5), (4, 0)]:
        assert cost.macs(np.array([a, b], float)) == 27 * a * AREA + a * b * AREA + b * CLASSES
    # direction, length and bias of each
    assert cost.params(cost.dense_widths) == (27 * 4 + 4 + 4) + (4 * 5 + 5 + 5) + 6 * CLASSES


def test_tied_weights_cost_their_products_each_and_their_parameters_once():
    a, b = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    b.weight = a.weight
    cost = cost_of(nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), Head(3)))
    assert cost.macs(cost.dense_widths) == 2 * 9 * AREA + 3 * CLASSES
    assert cost.macs(np.array([3.0, 0.0])) == 9 * AREA  # without what b writes and the head reads
    assert cost.params(cost.dense_widths) == 9 + 4 * CLASSES


def test_a_network_of_one_layer_has_its_products_in_it():
    group = ChannelGroup("", 4, (Member("", "out", tuple(range(4)), tuple(range(4))),))
    cost = build_cost_model(nn.Conv2d(3, 4, 1), (group,), example=example_input(SIDE, batch=1))
    assert (cost.macs(np.array([1.0])), cost.other_macs) == (3 * AREA, 0)


class BareWeight(nn.Module):
    """A convolution on a parameter of the network's own: whose products those are no layer tells. And a plain scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 5, 1), Head(5)
        self.scale, self.weight = nn.Parameter(torch.ones(1, 5, 1, 1)), nn.Parameter(torch.randn(6, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.stem(x), self.weight)
        return self.head(self.conv(x) * self.scale)


def test_a_group_with_products_outside_its_layers_is_not_told():
    def members(*places: tuple[str, Side], width: int) -> tuple[Member, ...]:
        return tuple(Member(name, side, tuple(range(width)), tuple(range(width))) for name, side in places)

    groups = (
        ChannelGroup("stem", 4, members(("stem", "out"), ("weight", "both"), width=4)),
        ChannelGroup("conv", 5, members(("conv", "out"), ("scale", "both"), ("head.linear", "in"), width=5)),
    )
    cost = build_cost_model(BareWeight(), groups, example=example_input(SIDE, batch=1))
    assert (cost.other_macs, cost.told) == (4 * 6 * AREA, (False, True))


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), Head(4)).double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cost_of(network)
    assert network.training and all(not m._forward_hooks for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_counting_does_not_import_the_compiler():
    """torch's own counter imports torch._dynamo at its first use: seconds of every command that counts."""
    code = (
        "import sys, torch; from vpdeploy.surgery.cost import build_cost_model; "
        "build_cost_model(torch.nn.Conv2d(3, 4, 1), (), example=torch.zeros(1, 3, 4, 4)); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
