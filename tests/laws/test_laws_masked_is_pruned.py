"""Law 1: for every group called exact, masking its channels and removing them give the same logits."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CLASSES, FAMILIES, SIDE, Head, conv_norm, image, masks, networks, probed, randomised
from tolerances import SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import SurgeryError
from vpdeploy.run_folder import dump, load
from vpdeploy.surgery.certificate import certify, masked_vs_pruned
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe, relative_difference
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroups, ChannelMask, Selection


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(data=st.data())
def test_masked_equals_pruned_for_every_exact_group(family, data):
    network = data.draw(networks(family))
    groups = probed(network).prunable
    assert groups and all(group.status == "exact" for group in groups)
    mask = data.draw(masks(groups))
    x = image(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        masked = Gated(copy.deepcopy(network), groups)(x, mask_row(groups, mask, dtype=torch.float64))
        removed = cut(network, plan(network, groups, mask))(x)
    assert masked.shape == removed.shape == (3, CLASSES)
    assert float((masked - removed).abs().max()) <= SAME_IN_FLOAT64 * float(masked.abs().max())


# Everything but the classifier is prunable, except beside a grouped convolution.
WRITERS = {"residual": 4, "dense-block": 4, "separable": 4, "pre-activation": 3, "flattened": 3, "cifar": 5, "mixed": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_group_is_missed(family):
    groups = probed(randomised(FAMILIES[family]((4, 5, 6, 7), nn.ReLU), seed=0)).groups
    refused = [group for group in groups if group.status == "excluded"]
    assert len(groups) - len(refused) == WRITERS[family]
    assert [g.root for g in refused if "outputs" in g.reason] == [groups[-1].root]


class OneOddLayer(nn.Module):
    """Three convolutions with ``odd`` between the first two: only that group breaks the law."""

    def __init__(self, odd: nn.Module, width: int = 8):
        super().__init__()
        self.first, self.second, self.third = conv_norm(3, width), conv_norm(width, 6), conv_norm(6, 7)
        self.odd, self.head = odd, Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(F.relu(self.first(x)))
        return self.head(F.relu(self.third(F.relu(self.second(x)))))


class OverChannels(nn.Module):
    """Apply ``function`` to [n, h, w, c], so that it works over channels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.movedim(1, -1)).movedim(-1, 1)


BREAKS = {
    "group norm": partial(nn.GroupNorm, 2, 8),
    "layer norm": lambda: OverChannels(nn.LayerNorm(8)),
    "softmax": partial(nn.Softmax, dim=1),
}


@pytest.mark.parametrize("odd", BREAKS)
def test_what_breaks_the_law_is_excluded_with_its_difference_and_nothing_else_is(odd):
    groups = {group.root: group for group in probed(randomised(OneOddLayer(BREAKS[odd]()), seed=1)).groups}
    refused = groups.pop("first.0")
    assert refused.status == "excluded"
    assert "differ by" in refused.reason and refused.difference is not None and refused.difference > 1e-6
    assert [group.status for group in groups.values()] == ["exact", "exact", "excluded"]  # the last is the output


def shuffled(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MOVES = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "shuffle": shuffled,
}


@pytest.mark.parametrize("width", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("move", MOVES)
def test_moved_channels_are_excluded_or_refused(move, width):
    network = randomised(OneOddLayer(Apply(MOVES[move]), width), seed=2)
    try:
        groups = probed(network)
    except SurgeryError as e:
        assert "torch-pruning cannot" in str(e)
        return
    status = {group.root: group for group in groups.groups}
    assert status["first.0"].status == "excluded" and status["first.0"].reason
    assert status["third.0"].status == "exact"


@pytest.mark.parametrize("width", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_grouped_convolutions_are_left_whole_for_every_mask(width, parts):
    """Channels may leave a grouped convolution only as many from each part, which no score can promise."""
    grouped = nn.Conv2d(width * parts, 2 * parts, 1, groups=parts)
    layers = (nn.Conv2d(3, width * parts, 1), nn.ReLU(), grouped, nn.ReLU())
    network = randomised(nn.Sequential(*layers, nn.Conv2d(2 * parts, 6, 1), nn.ReLU(), Head(6)), seed=7)
    groups = {group.root: group for group in probed(network).groups}
    assert {root: group.status for root, group in groups.items()} == {
        "0": "excluded", "2": "excluded", "4": "exact", "6.linear": "excluded"
    }  # fmt: skip
    assert groups["0"].reason and "together" not in groups["4"].reason


class Branch(nn.Module):
    """A residual branch through ``odd`` whose last norm has scale and shift 0: as it stands, nothing of it is seen."""

    def __init__(self, odd: nn.Module):
        super().__init__()
        self.stem, self.inner, self.odd, self.last = conv_norm(3, 6), conv_norm(6, 8), odd, conv_norm(8, 6)
        self.head = Head(6)
        nn.init.zeros_(self.last[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.last[1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.last(self.odd(self.inner(x)))))


def test_a_last_norm_scale_of_zero_does_not_let_a_broken_group_pass():
    sound, broken = probed(Branch(nn.ReLU()).double()), probed(Branch(nn.GroupNorm(2, 8)).double())
    assert {g.root: g.status for g in sound.groups}["inner.0"] == "exact"
    assert {g.root: g.status for g in broken.groups}["inner.0"] == "excluded"


class DeadEnd(nn.Module):
    """A branch that is computed, read, and multiplied by zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.dead, self.after, self.head = conv_norm(3, 6), conv_norm(6, 8), nn.Conv2d(8, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(x + 0.0 * self.after(F.relu(self.dead(x))))


def test_a_gate_that_does_not_reach_the_output_is_not_probed():
    network = randomised(DeadEnd(), seed=3)
    found = find_groups(network, example_input(SIDE))
    alone = ChannelGroups(tuple(group for group in found.groups if group.root == "dead.0"))
    (group,) = probe(network, alone, canvas_size=SIDE).groups
    assert group.status == "excluded" and group.reason.startswith("not probed")


def test_logits_that_are_no_numbers_prove_nothing_and_can_be_written_down():
    network = randomised(nn.Sequential(OneOddLayer(nn.ReLU()), Apply(torch.log)), seed=3)
    groups = probed(network)
    assert [g.difference for g in groups.groups] == [None] * 4
    assert all("not finite" in g.reason for g in groups.groups[:3])
    assert load(ChannelGroups, dump(groups), where="groups.json") == groups


def test_one_channel_cannot_be_halved():
    network = randomised(nn.Sequential(*conv_norm(3, 1), nn.ReLU(), *conv_norm(1, 4), nn.ReLU(), Head(4)), seed=4)
    first, second, _ = probed(network).groups
    assert first.status == "excluded" and "one channel wide" in first.reason
    assert second.status == "exact"


def test_no_legal_input_is_an_error():
    network = randomised(nn.Sequential(*conv_norm(3, 4), nn.Flatten(), nn.Linear(4 * 9, 3)), seed=4)
    with pytest.raises(SurgeryError, match="its forward fails in float64 at every size up to 8"):
        probe(network, ChannelGroups(()), canvas_size=8)


# --- on the network that was cut ------------------------------------------------------------------------------------


def test_the_certificate_measures_the_network_itself():
    network = randomised(FAMILIES["residual"]((4, 5, 6, 7), nn.ReLU), seed=5)
    groups = probed(network)
    keep = {g.root: tuple(i % 2 == 0 for i in range(g.width)) for g in groups.prunable}
    mask = ChannelMask(keep)
    pruned = cut(network, plan(network, groups.prunable, mask))
    selection = Selection(mask, "macs_ratio", 0.5, 0.4)
    certificate = certify(network, pruned, groups, selection, canvas=image(1))
    assert certificate.masked_vs_pruned <= SAME_IN_FLOAT64
    assert (certificate.images, certificate.requested, certificate.reached) == (3, 0.5, 0.4)
    assert [r.kept for r in certificate.groups] == [
        sum(keep[g.root]) if g.root in keep else g.width for g in groups.groups
    ]
    other = ChannelMask({root: tuple(not k for k in row) for root, row in keep.items()})
    assert masked_vs_pruned(network, pruned, groups.prunable, other, canvas=image(1)) > 1e-3
    with pytest.raises(SurgeryError, match="masked and pruned logits differ by .* on 3 real images"):
        certify(network, pruned, groups, Selection(other, "macs_ratio", 0.5, 0.4), canvas=image(1))


def test_relative_difference_is_infinite_where_nothing_can_be_compared():
    one = torch.ones(2, 3)
    assert relative_difference(one, one) == 0
    assert relative_difference(2 * one, one) == 0.5
    assert relative_difference(one, torch.ones(2, 2)) == float("inf")
    assert relative_difference(one, one * float("nan")) == float("inf")
