"""Norms without statistics, and what the probe says of groups over which norms take them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from strategies import SIDE, Head, conv_norm, image, randomised
from tolerances import SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.surgery.bench import relative_difference
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.norms import norms_without_statistics
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelMask

WIDTH = 8
X = torch.linspace(-4, 4, 2 * WIDTH, dtype=torch.float64).view(2, WIDTH)
WEIGHT, BIAS = torch.arange(WIDTH).double() + 1, torch.arange(WIDTH).double() - 3
CALLS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "layer norm": lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
    "layer norm by name": lambda x, w, b: F.layer_norm(input=x, normalized_shape=[x.shape[-1]], weight=w, bias=b),
    "layer norm of torch": lambda x, w, b: torch.layer_norm(x, [x.shape[-1]], w, b),
    "group norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "rms norm": lambda x, w, b: F.rms_norm(x, (x.shape[-1],), w) if b is None else F.rms_norm(x, (x.shape[-1],), w) + b,
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_each_value_is_squashed_by_itself_then_scaled_and_shifted(name, affine):
    weight, bias = (WEIGHT, BIAS) if affine else (None, None)
    with norms_without_statistics():
        got = CALLS[name](X, weight, bias)
    expected = 3 * torch.tanh(X / 3) * (WEIGHT if affine else 1) + (BIAS if affine else 0)
    assert torch.equal(got, expected)
    assert not torch.allclose(CALLS[name](X, weight, bias), expected)  # afterwards they are what they were


def test_a_group_norm_on_a_map_scales_axis_one():
    x = image(0).expand(3, 3, SIDE, SIDE)
    weight, bias = WEIGHT[:3], BIAS[:3]
    with norms_without_statistics():
        got = F.group_norm(x, 1, weight, bias)
    assert torch.equal(got, 3 * torch.tanh(x / 3) * weight.view(1, 3, 1, 1) + bias.view(1, 3, 1, 1))


@pytest.mark.parametrize("name", CALLS)
def test_a_channel_that_goes_is_not_seen_by_the_others(name):
    gone = X.clone()
    gone[:, 2] = 99.0
    with norms_without_statistics():
        calm = [CALLS[name](x, WEIGHT, BIAS) for x in (X, gone)]
    stays = [channel for channel in range(WIDTH) if channel != 2]
    assert torch.equal(calm[0][:, stays], calm[1][:, stays])
    honest = [CALLS[name](x, WEIGHT, BIAS) for x in (X, gone)]
    assert not torch.equal(honest[0][:, stays], honest[1][:, stays])


def test_other_functions_pass():
    with norms_without_statistics():
        assert torch.equal(F.softmax(X, -1), X.softmax(-1))


# --- approximate groups ---------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two convolutions with a norm over the first one's channels, ``between`` after it."""

    def __init__(self, norm: nn.Module, *, between: Callable[[Tensor], Tensor] = F.silu, last: bool = False):
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Conv2d(3, WIDTH, 1), norm, conv_norm(WIDTH, 6), Head(6)
        self.between, self.last = between, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.last:  # [n, c, h, w] -> [n, h, w, c] and back
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.norm(x)
        return self.head(F.silu(self.second(self.between(x))))


NORMS: dict[str, Callable[[], Normed]] = {
    "layer norm": lambda: Normed(nn.LayerNorm(WIDTH), last=True),
    "layer norm without a shift": lambda: Normed(nn.LayerNorm(WIDTH, bias=False), last=True),
    "group norm of one group": lambda: Normed(nn.GroupNorm(1, WIDTH)),
    "group norm of two": lambda: Normed(nn.GroupNorm(2, WIDTH)),
}


def probed(network: nn.Module, *, allow_approximate: bool) -> dict[str, ChannelGroup]:
    found = find_groups(network, example_input(SIDE))
    judged = probe(network, found, example=example_input(SIDE), allow_approximate=allow_approximate)
    return {group.root: group for group in judged.groups}


def half(group: ChannelGroup) -> ChannelMask:
    return ChannelMask({group.root: tuple(channel % 2 == 0 for channel in range(group.width))})


@pytest.mark.parametrize("name", NORMS)
def test_a_width_under_a_norm_is_excluded_unless_asked_for_and_then_tells_its_difference(name):
    network = randomised(NORMS[name](), seed=0)
    refused = probed(network, allow_approximate=False)
    assert refused["first"].status == "excluded" and refused["first"].difference is None
    assert refused["first"].reason.startswith("norm takes statistics over its channels (")
    assert refused["first"].reason.endswith(
        "; removal is approximate: budget.allow_approximate = true takes it, and tells the difference"
    )
    taken = probed(network, allow_approximate=True)
    group = taken["first"]
    assert group.status == "approximate" and group.difference is not None and group.difference > 1e-6
    assert (
        group.reason.startswith("norm takes statistics over its channels (") and "allow_approximate" not in group.reason
    )
    assert taken["second.0"] == refused["second.0"] and taken["second.0"].status == "exact"
    # It can be cut, and differs from what is masked: by the statistics.
    mask = half(group)
    small = cut(network, plan(network, [group], mask))
    with torch.no_grad():
        masked = Gated(network, [group])(image(0), mask_row([group], mask, dtype=torch.float64))
        assert 1e-6 < relative_difference(masked, small(image(0))) < float("inf")


@pytest.mark.parametrize("allow_approximate", [True, False])
def test_a_norm_that_cannot_take_another_width_keeps_its_channels(allow_approximate):
    """Without parameters nothing tells how wide the norm is but its own number; without its statistics it would pass."""
    norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
    group = probed(randomised(Normed(norm, last=True), seed=0), allow_approximate=allow_approximate)["first"]
    assert group.status == "excluded" and group.difference is None
    assert group.reason.startswith("norm takes statistics over its channels (layer_norm); ")
    if allow_approximate:
        assert "; removing its channels fails in norm: RuntimeError: Given normalized_shape=[8]" in group.reason


@pytest.mark.parametrize("allow_approximate", [True, False])
def test_a_norm_made_of_single_operations_is_excluded_by_what_it_does(allow_approximate):
    """Torch makes nn.RMSNorm of means and products on this device: that it is a norm is not seen."""
    network = randomised(Normed(nn.RMSNorm(WIDTH), last=True), seed=0)
    group = probed(network, allow_approximate=allow_approximate)["first"]
    assert group.status == "excluded" and re.search("norm takes", group.reason)


def test_a_group_norm_of_each_channel_by_itself_is_exact():
    network = randomised(Normed(nn.GroupNorm(WIDTH, WIDTH)), seed=0)
    group = probed(network, allow_approximate=False)["first"]
    assert (group.status, group.width) == ("exact", WIDTH)
    mask = half(group)
    small = cut(network, plan(network, [group], mask))
    with torch.no_grad():
        removed = small(image(0))
        masked = Gated(network, [group])(image(0), mask_row([group], mask, dtype=torch.float64))
    assert relative_difference(masked, removed) <= SAME_IN_FLOAT64


def test_a_channel_of_a_group_norm_goes_from_each_of_its_groups():
    """Otherwise a channel that stays would move from one group to the other, whose statistics are others."""
    network = randomised(Normed(nn.GroupNorm(2, WIDTH)), seed=0)
    group = probed(network, allow_approximate=True)["first"]
    assert (group.status, group.width, group.unit) == ("approximate", WIDTH // 2, 2)
    (norm,) = [m for m in group.members if m.tensor == "norm.weight"]
    assert dict(zip(norm.indices, norm.channels, strict=True)) == {i: i % (WIDTH // 2) for i in range(WIDTH)}


def by_width(x: Tensor) -> Tensor:
    """Arithmetic with the number of channels, which no label shows."""
    return x * x.shape[1] ** 0.5


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "flip": (
        lambda: Normed(nn.LayerNorm(WIDTH), between=lambda x: x.flip(1), last=True),
        r"flip moves its channels by number",
    ),
    "roll": (
        lambda: Normed(nn.GroupNorm(1, WIDTH), between=lambda x: x.roll(1, 1)),
        r"roll.* moves its channels by number",
    ),
    "width": (
        lambda: Normed(nn.LayerNorm(WIDTH), between=by_width, last=True),
        r"masked and removed differ by ",
    ),
    "fixed": (
        lambda: Normed(nn.LayerNorm(WIDTH), between=lambda x: x.view(-1, WIDTH, SIDE, SIDE), last=True),
        r"removing its channels fails",
    ),
}


@pytest.mark.parametrize("allow_approximate", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_behind_a_norm_stays_excluded(name, allow_approximate):
    """That it is approximate anyway is no excuse: without the norm's statistics it would still be wrong."""
    make, reason = WRONG[name]
    group = probed(randomised(make(), seed=0), allow_approximate=allow_approximate)["first"]
    assert group.status == "excluded"
    if allow_approximate or name in ("flip", "roll"):
        assert re.search(reason, group.reason), group.reason


class Branches(nn.Module):
    """A stream with a small branch through ``norm``: of little effect, but some."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.stem, self.inner, self.norm, self.back = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, WIDTH, 1),
            norm,
            nn.Conv2d(WIDTH, 6, 1),
        )
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.head(x + 1e-5 * self.back(F.silu(self.norm(self.inner(x)))))


def test_an_approximate_group_of_little_effect_is_taken_too():
    group = probed(randomised(Branches(nn.GroupNorm(2, WIDTH)), seed=0), allow_approximate=True)["inner"]
    assert group.status == "approximate"
    assert group.difference is not None and 1e-9 < group.difference < 1e-4


def test_approximate_and_exact_groups_are_cut_together():
    network = randomised(NORMS["layer norm"](), seed=0)
    groups = [group for group in probed(network, allow_approximate=True).values() if group.status != "excluded"]
    assert [(group.root, group.status) for group in groups] == [("first", "approximate"), ("second.0", "exact")]
    mask = ChannelMask({g.root: tuple(c % 2 == 0 for c in range(g.width)) for g in groups})
    small = cut(network, plan(network, groups, mask))
    with torch.no_grad(), norms_without_statistics():
        masked = Gated(network, groups)(image(0), mask_row(groups, mask, dtype=torch.float64))
        assert relative_difference(masked, small(image(0))) <= SAME_IN_FLOAT64
