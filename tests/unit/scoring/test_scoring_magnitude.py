"""Magnitude scores, by hand."""

from __future__ import annotations

import pytest
import torch
from strategies import SIDE, Head
from tolerances import CLOSED_FORM_FLOAT32
from torch import Tensor, nn

from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.values import ChannelGroup, Member


def prunable(network: nn.Module) -> tuple[ChannelGroup, ...]:
    return find_groups(network, example_input(SIDE)).prunable


def close(scores: Tensor, expected: list[float]) -> bool:
    return scores.dtype == torch.float32 and scores.tolist() == pytest.approx(expected, rel=CLOSED_FORM_FLOAT32)


def test_writer_and_reader_weigh_alike():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(128, 5))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[2.0, 2, 1], [0, 0, 1]])[:, :, None, None])  # norms 3 and 1, mean 2
        network[1].weight.copy_(torch.tensor([100.0, 0.0]))  # norms and biases weigh nothing
        network[2].weight.copy_(torch.tensor([[3.0, 0], [4, 5]])[:, :, None, None])  # columns 5 and 5, mean 5
        network[2].bias.fill_(100)
        network[4].weight.zero_()
        network[4].weight[:, :64] = 1
    scores = magnitude(network, prunable(network))
    assert close(scores["0"], [(3 / 2 + 1) / 2, (1 / 2 + 1) / 2])
    # rows 3 and sqrt(41); the first channel's 64 columns weigh all, the second's none
    row, mean = 41**0.5, (3 + 41**0.5) / 2
    assert close(scores["2"], [(3 / mean + 2) / 2, (row / mean + 0) / 2])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), Head(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(x))


def test_a_layer_that_writes_and_reads_its_group_counts_twice():
    network = Residual()
    with torch.no_grad():
        network.stem.weight.fill_(1.0)
        network.conv.weight.copy_(torch.tensor([[3.0, 4], [0, 0]])[:, :, None, None])  # rows 5, 0; columns 3, 4
        network.head.linear.weight.fill_(1.0)
    (scores,) = magnitude(network, prunable(network)).values()
    assert close(scores, [(1 + 2 + 3 / 3.5 + 1) / 4, (1 + 0 + 4 / 3.5 + 1) / 4])


def test_of_a_grouped_convolution_the_same_position_of_each_part_is_one_channel():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), Head(4))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].weight[0] = 7.0  # channel 0: rows 0 and 2, norm sqrt(3 * (49 + 1)); channel 1: sqrt(3 * 2): 5 to 1
        network[1].weight.copy_(torch.tensor([[3.0, 1], [0, 0], [4, 0], [0, 0]])[:, :, None, None])  # columns 5 and 1
        network[2].linear.weight.fill_(1.0)
    scores = magnitude(network, prunable(network))
    assert close(scores["0"], [5 / 3, 1 / 3])
    # its outputs, by rows 0 and 2, 1 and 3: sqrt(26) and 0; the head's columns weigh alike
    assert close(scores["1"], [(2 + 1) / 2, (0 + 1) / 2])


def test_a_head_weighs_what_all_its_channels_do():
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    rows, columns = torch.tensor([[3.0], [4], [0], [0]]).expand(4, 3), torch.tensor([3.0, 4, 5, 0]).expand(2, 4)
    with torch.no_grad():
        network[0].weight.copy_(rows)
        network[1].weight.copy_(columns)
    channels = (0, 0, 1, 1)
    written = Member("0.weight", 0, "out", (0, 1, 2, 3), channels)
    group = ChannelGroup("0", 2, (written, Member("1.weight", 1, "in", (0, 1, 2, 3), channels)))
    assert close(magnitude(network, (group,))["0"], [(2 + 1) / 2, (0 + 1) / 2])


def test_the_scale_of_a_layer_does_not_matter_and_groups_compete_on_equal_terms():
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), Head(4))
    groups = prunable(network)
    before = magnitude(network, groups)
    with torch.no_grad():
        network[2].weight *= 1000
    after = magnitude(network, groups)
    for root, scores in before.items():
        assert close(after[root], scores.tolist())
        assert float(scores.mean()) == pytest.approx(1, rel=CLOSED_FORM_FLOAT32)


def test_weights_of_zero_give_finite_scores_and_nothing_is_changed():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), Head(3)).requires_grad_(False)
    for parameter in network.parameters():
        parameter.zero_()
    scores = magnitude(network, prunable(network))
    assert all(s.tolist() == [0.0] * len(s) for s in scores.values())
    assert all(not bool(p.any()) and not p.requires_grad for p in network.parameters())
    assert all(not s.requires_grad for s in magnitude(Residual(), prunable(Residual())).values())


def test_a_group_without_weights_scores_one():
    assert magnitude(nn.Sequential(), (ChannelGroup("none", 3, ()),))["none"].tolist() == [1.0, 1.0, 1.0]
