"""Costs as closed forms: every number here is worked out on paper."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from strategies import CLASSES, FAMILIES, SIDE, Head, conv_norm, randomised
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from vpdeploy.surgery.cost import CostModel, build_cost_model
from vpdeploy.surgery.groups import example_input, find_groups

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


def test_a_grouped_convolution_of_few_groups_reads_and_writes_positions_of_each():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False), Head(6))
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [4, 3]  # of two channels each
    for a, b in [(4, 3), (2, 3), (4, 1)]:
        widths = np.array([a, b], float)
        assert cost.macs(widths) == 3 * 2 * a * AREA + 9 * a * 2 * b * AREA + 2 * b * CLASSES
        assert cost.params(widths) == 4 * 2 * a + 9 * a * 2 * b + 2 * b * CLASSES + CLASSES


def test_a_grouped_convolution_of_many_groups_costs_what_is_left_of_them():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4), Head(12))
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [4]  # each reads 2 channels and writes 3
    for a in (4, 3, 1):
        widths = np.array([a], float)
        assert cost.macs(widths) == 3 * 2 * a * AREA + 9 * 2 * 3 * a * AREA + 3 * a * CLASSES
        assert cost.params(widths) == 4 * 2 * a + (9 * 2 + 1) * 3 * a + 3 * a * CLASSES + CLASSES


def test_a_depthwise_convolution_with_a_multiplier():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4), Head(8))
    cost = cost_of(network)
    for a in (4, 3, 1):
        widths = np.array([a], float)
        assert cost.macs(widths) == 3 * a * AREA + 9 * 2 * a * AREA + 2 * a * CLASSES
        assert cost.params(widths) == 4 * a + 10 * 2 * a + 2 * a * CLASSES + CLASSES


def test_a_grouped_transposed_convolution():
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2, bias=False), Head(8))
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [3, 4]
    for a, b in [(3, 4), (2, 4), (3, 1), (1, 2)]:
        widths = np.array([a, b], float)
        assert cost.macs(widths) == 3 * 2 * a * AREA + 4 * 2 * a * b * AREA + 2 * b * CLASSES
        assert cost.params(widths) == 4 * 2 * a + 4 * 2 * a * b + 2 * b * CLASSES + CLASSES


def test_the_products_of_attention_follow_the_heads():
    """4 heads of 2 channels; scores and mixing are positions x positions x channels each."""
    network = randomised(FAMILIES["heads"]((6, 4, 5, 7), nn.ReLU), seed=0)
    cost = cost_of(network)
    assert cost.dense_widths.tolist() == [6, 4, 5, 7]
    patches, tokens = AREA // 4, AREA // 4 + 1  # and the class token
    for s, h, m, last in [(6, 4, 5, 7), (6, 1, 5, 7), (2, 3, 1, 7), (1, 1, 1, 1)]:
        layers = 3 * s * 4 * patches + tokens * (4 * s * 2 * h + 2 * s * m) + s * last + last * CLASSES
        assert cost.macs(np.array([s, h, m, last], float)) == layers + 2 * tokens * tokens * 2 * h
        biases = s + 3 * 2 * h + s + m + s + last + CLASSES
        weights = 12 * s + 4 * s * 2 * h + 2 * s * m + s * last + last * CLASSES
        assert cost.params(np.array([s, h, m, last], float)) == weights + biases + s + tokens * s  # token, positions


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


def test_products_outside_the_layers_follow_the_widths():
    network = SelfProduct()
    (group,) = find_groups(network, example_input(SIDE)).groups[:1]
    assert (group.root, group.width) == ("conv", 6)
    for batch in (1, 3):
        cost = build_cost_model(network, (group,), example=example_input(SIDE, batch=batch))
        for a in (6, 2, 1):
            assert cost.macs(np.array([a], float)) == 3 * a * AREA + AREA * a * AREA + AREA * CLASSES


def test_a_computed_weight_costs_what_a_plain_one_does():
    """As weight_norm's: its two parameters, direction and length, are no products; the weight made of them is."""
    network = nn.Sequential(
        weight_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.ReLU(), weight_norm(nn.Conv2d(4, 5, 1)), Head(5)
    )
    cost = cost_of(network)
    assert cost.macs(cost.dense_widths) == 27 * 4 * AREA + 4 * 5 * AREA + 5 * CLASSES
    # direction, length and bias of each
    assert cost.params(cost.dense_widths) == (27 * 4 + 4 + 4) + (4 * 5 + 5 + 5) + 6 * CLASSES


def test_tied_weights_cost_their_products_each_and_their_parameters_once():
    a, b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
    b.weight = a.weight
    cost = cost_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), a, nn.ReLU(), b, nn.ReLU(), Head(4)))
    assert cost.dense_widths.tolist() == [4]  # one weight reads and writes the same channels, all one group
    for width in (4, 3, 1):
        widths = np.array([width], float)
        assert cost.macs(widths) == (3 * width + 2 * width * width) * AREA + width * CLASSES
        assert cost.params(widths) == 4 * width + width * width + width * CLASSES + CLASSES


def test_a_network_of_one_layer():
    (group,) = find_groups(nn.Conv2d(3, 4, 1), example_input(SIDE)).groups
    assert (group.root, group.status) == ("weight", "excluded")
    cost = build_cost_model(nn.Conv2d(3, 4, 1), (group,), example=example_input(SIDE, batch=1))
    assert (cost.macs(np.array([1.0])), cost.params(np.array([1.0]))) == (3 * AREA, 4)


class BareWeight(nn.Module):
    """A convolution on a parameter of the network's own: a product of no layer. And a plain scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 5, 1), Head(5)
        self.scale, self.weight = nn.Parameter(torch.ones(1, 5, 1, 1)), nn.Parameter(torch.randn(6, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.stem(x), self.weight)
        return self.head(self.conv(x) * self.scale)


def test_products_with_a_bare_parameter_are_counted():
    cost = cost_of(BareWeight())
    assert cost.dense_widths.tolist() == [6, 4, 5]  # of the bare weight, of the stem, of the convolution
    for a, b, c in [(4, 6, 5), (2, 6, 5), (3, 2, 1)]:
        widths = np.array([b, a, c], float)
        assert cost.macs(widths) == (3 * a + a * b + b * c) * AREA + c * CLASSES
        assert cost.params(widths) == 4 * a + a * b + (b + 1) * c + c + c * CLASSES + CLASSES


class Recounted(nn.Module):
    """A product of three lengths that all follow widths: queries of one group against keys of another, for each head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 5, 1)
        self.linear = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (conv(x).flatten(2) for conv in (self.a, self.b, self.c))
        mixed = (c @ a.transpose(1, 2)) @ (a @ b.transpose(1, 2))  # [n, 5, 4] @ [n, 4, 6]
        return self.linear(mixed.mean(1))


def test_of_three_lengths_in_one_product_the_third_counts_as_when_dense():
    """Never less than the cut network costs, and right where it is whole."""
    network = Recounted()
    groups = find_groups(network, example_input(SIDE)).groups[:-1]
    widths = {group.root: group.width for group in groups}
    cost = build_cost_model(network, groups, example=example_input(SIDE, batch=1))

    def macs(a: float, b: float, c: float) -> float:
        return (3 * (a + b + c) + a * b + c * a) * AREA + c * a * b + b * CLASSES

    assert widths == {"a": 4, "b": 6, "c": 5}
    assert cost.macs(cost.dense_widths) == macs(4, 6, 5)
    for few in [(4, 6, 2), (2, 6, 5), (4, 3, 5), (1, 1, 1)]:
        columns = dict(zip("abc", few, strict=True))
        told = cost.macs(np.array([columns[root] for root in widths], float))
        assert macs(*few) <= told <= cost.macs(cost.dense_widths)


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
