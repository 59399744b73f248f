"""Law 1: for every group called exact, masking its channels and removing them give the same logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    CLASSES,
    FAMILIES,
    SIDE,
    Head,
    conv_norm,
    image,
    masks,
    networks,
    probed,
    randomised,
    shuffled,
)
from tolerances import SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import SurgeryError
from vpdeploy.run_folder import dump, load
from vpdeploy.surgery.bench import relative_difference
from vpdeploy.surgery.certificate import certify, masked_vs_pruned
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask, Selection


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(data=st.data())
def test_masked_equals_pruned_for_every_exact_group(family, data):
    network = data.draw(networks(family))
    groups = probed(network).prunable
    assert groups and all(group.status == "exact" for group in groups)
    check_law(network, groups, data.draw(masks(groups)), x=image(data.draw(st.integers(0, 99))))


def check_law(network: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask, *, x: Tensor) -> None:
    assert masked_and_removed(network, groups, mask, mask, x=x) <= SAME_IN_FLOAT64


def masked_and_removed(
    network: nn.Module, groups: Sequence[ChannelGroup], masked: ChannelMask, removed: ChannelMask, *, x: Tensor
) -> float:
    """Relative difference of the logits, gated by one mask and cut by the other."""
    with torch.no_grad():
        gated = Gated(copy.deepcopy(network), groups)(x, mask_row(groups, masked, dtype=torch.float64))
        small = cut(network, plan(network, groups, removed))(x)
    assert gated.shape == small.shape == (3, CLASSES)
    return relative_difference(gated, small)


def check_wrong_cuts_are_seen(network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """In each group alone, one channel removed for another that is masked."""
    for group in groups:
        keep = tuple(channel != 0 for channel in range(group.width))
        right, wrong = (ChannelMask({group.root: row}) for row in (keep, keep[::-1]))
        assert masked_and_removed(network, groups, right, wrong, x=image(0)) > 1e-6, group.root
        assert masked_and_removed(network, groups, right, right, x=image(0)) <= SAME_IN_FLOAT64, group.root


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_cut_is_seen_in_every_group(family):
    network = randomised(FAMILIES[family]((4, 5, 6, 7), nn.SiLU), seed=0)
    check_wrong_cuts_are_seen(network, probed(network).prunable)


# Everything but the classifier is prunable.
WRITERS = {
    "residual": 4, "dense-block": 4, "separable": 4, "pre-activation": 3, "flattened": 3, "cifar": 5, "mixed": 6,
    "grouped": 5, "shuffled": 4, "heads": 4,
}  # fmt: skip


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
        x = self.odd(F.silu(self.first(x)))
        return self.head(F.silu(self.third(F.silu(self.second(x)))))


class OverChannels(nn.Module):
    """Apply ``function`` to [n, h, w, c], so that it works over channels."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.movedim(1, -1)).movedim(-1, 1)


class ScaledByRoot(nn.Module):
    """Arithmetic with the number of channels, which no label shows: the probe alone can tell."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[1] ** 0.5


APPROXIMATE = "; removal is approximate: budget.allow_approximate = true takes it, and tells the difference"
# The layer between the first two convolutions, and the reason why the channels before it stay.
BREAKS = {
    "group norm": (partial(nn.GroupNorm, 2, 8), f"odd takes statistics over its channels (group_norm){APPROXIMATE}"),
    "layer norm": (
        lambda: OverChannels(nn.LayerNorm(8)),
        f"odd.function takes statistics over its channels (layer_norm){APPROXIMATE}",
    ),
    "softmax": (partial(nn.Softmax, dim=1), "softmax in odd runs over its channels"),
    "width": (ScaledByRoot, "masked and removed differ by "),
}


@pytest.mark.parametrize("odd", BREAKS)
def test_what_breaks_the_law_is_excluded_with_its_reason_and_nothing_else_is(odd):
    make, reason = BREAKS[odd]
    network = randomised(OneOddLayer(make()), seed=1)
    groups = {group.root: group for group in probed(network).groups}
    refused = groups.pop("first.0")
    assert refused.status == "excluded" and refused.reason.startswith(reason)
    assert [group.status for group in groups.values()] == ["exact", "exact", "excluded"]  # the last is the output


@pytest.mark.parametrize("odd", ["group norm", "layer norm", "width"])  # a softmax's readers are not even in its group
def test_what_is_excluded_would_have_broken_the_law(odd):
    """Not excluded in vain: gated and cut nevertheless, the two differ."""
    network = randomised(OneOddLayer(BREAKS[odd][0]()), seed=1)
    (refused,) = [group for group in probed(network).groups if group.root == "first.0"]
    groups, x = (refused,), image(1)
    keep = tuple(channel % 2 == 0 for channel in range(refused.width))
    mask = ChannelMask({"first.0": keep})
    assert masked_and_removed(network, groups, mask, mask, x=x) > 1e-6


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MOVES = {"flip": lambda x: x.flip(1), "roll": lambda x: x.roll(1, 1)}


@pytest.mark.parametrize("width", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("move", MOVES)
def test_moved_channels_are_excluded_by_name(move, width):
    network = randomised(OneOddLayer(Apply(MOVES[move]), width), seed=2)
    groups = {group.root: group for group in probed(network).groups}
    assert (groups["first.0"].status, groups["first.0"].reason) == (
        "excluded", f"{move} in odd moves its channels by number"
    )  # fmt: skip
    assert groups["third.0"].status == "exact"


@pytest.mark.parametrize(("width", "parts"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (12, 3)])
@settings(max_examples=5)
@given(data=st.data())
def test_shuffled_channels_go_by_position(width, parts, data):
    """The same position of each part is one channel."""
    network = randomised(OneOddLayer(Apply(partial(shuffled, parts=parts)), width), seed=2)
    groups = probed(network).prunable
    assert [(g.root, g.width, g.unit) for g in groups] == [
        ("first.0", width // parts, parts), ("second.0", 6, 1), ("third.0", 7, 1)
    ]  # fmt: skip
    written = next(m for m in groups[0].members if m.tensor == "first.0.weight")
    assert dict(zip(written.indices, written.channels, strict=True)) == {c: c % (width // parts) for c in range(width)}
    check_law(network, groups, data.draw(masks(groups)), x=image(data.draw(st.integers(0, 99))))
    check_wrong_cuts_are_seen(network, groups)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_shuffle_whose_parts_hold_one_channel_each_is_left_whole(parts):
    groups = probed(randomised(OneOddLayer(Apply(partial(shuffled, parts=parts)), parts), seed=2)).groups
    assert groups[0].root == "first.0" and groups[0].status == "excluded"
    assert groups[0].reason.startswith("removing its channels fails in odd: RuntimeError: unflatten")


@pytest.mark.parametrize("width", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("parts", [2, 4, 8])
@settings(max_examples=4)
@given(data=st.data())
def test_grouped_convolutions_lose_whole_groups_or_the_same_positions_of_each(width, parts, data):
    """Whole groups where there are more of them than channels in each, else the same positions of every group's inputs,
    and of its outputs, apart.
    """
    outputs = 2 * parts
    grouped = nn.Conv2d(width * parts, outputs, 1, groups=parts)
    layers = (nn.Conv2d(3, width * parts, 1), nn.SiLU(), grouped, nn.SiLU())
    network = randomised(nn.Sequential(*layers, nn.Conv2d(outputs, 6, 1), nn.SiLU(), Head(6)), seed=7)
    groups = probed(network).prunable
    whole = [("0", parts, width), ("4", 6, 1)]
    positions = [("0", width, parts), ("2", 2, parts), ("4", 6, 1)]
    assert [(g.root, g.width, g.unit) for g in groups] == (whole if parts > width else positions)
    mask = data.draw(masks(groups))
    check_law(network, groups, mask, x=image(data.draw(st.integers(0, 99))))
    check_wrong_cuts_are_seen(network, groups)
    small, kept = cut(network, plan(network, groups, mask)), mask.widths()
    conv = small[2]
    assert isinstance(conv, nn.Conv2d)
    expected = (
        (width * kept["0"], 2 * kept["0"], kept["0"])
        if parts > width
        else (parts * kept["0"], parts * kept["2"], parts)
    )
    assert (conv.in_channels, conv.out_channels, conv.groups) == expected


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
    (group,) = probe(network, alone, example=example_input(SIDE)).groups
    assert group.status == "excluded" and group.reason.startswith("not probed")


def test_logits_that_are_no_numbers_prove_nothing_and_can_be_written_down():
    network = randomised(nn.Sequential(OneOddLayer(nn.ReLU()), Apply(torch.log)), seed=3)
    groups = probed(network)
    assert [g.difference for g in groups.groups] == [None] * 4
    assert all("not finite" in g.reason for g in groups.groups[:3])
    assert load(ChannelGroups, dump(groups), where="groups.json") == groups


def test_one_channel_cannot_be_halved():
    network = randomised(nn.Sequential(*conv_norm(3, 1), nn.ReLU(), *conv_norm(1, 4), nn.ReLU(), Head(4)), seed=4)
    # A layer of one channel has nothing that could go: it is no group.
    assert [(group.root, group.status) for group in probed(network).groups] == [
        ("3", "exact"),
        ("6.linear", "excluded"),
    ]


def test_no_legal_input_is_an_error():
    network = randomised(nn.Sequential(*conv_norm(3, 4), nn.Flatten(), nn.Linear(4 * 9, 3)), seed=4)
    with pytest.raises(SurgeryError, match="its forward fails in float64 at every size up to 8"):
        probe(network, ChannelGroups(()), example=example_input(8))


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
