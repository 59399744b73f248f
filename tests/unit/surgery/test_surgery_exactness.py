"""What the probe says of a group that it refuses, and which masks it tries."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import pytest
import torch
from strategies import SIDE, Head, conv_norm, image, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery import bench as probing
from vpdeploy.surgery.bench import redraw
from vpdeploy.surgery.certificate import certify
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.halves import HALVES
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask, Selection


def probed(network: nn.Module, *, canvas_size: int = SIDE) -> dict[str, ChannelGroup]:
    found = find_groups(network, example_input(canvas_size))
    return {group.root: group for group in probe(network, found, example=example_input(canvas_size)).groups}


@pytest.mark.parametrize("width", range(2, 40))
def test_probing_masks_keep_and_remove_something_in_two_ways(width):
    groups = (ChannelGroup("a", width, ()), ChannelGroup("b", 7, ()))
    first, second = (half(groups).keep for half in HALVES)
    assert first.keys() == second.keys() == {"a", "b"}
    for keep in (first["a"], second["a"]):
        assert len(keep) == width and 0 < sum(keep) < width
    assert first["a"] != second["a"] or width == 2
    # No number of parts shares the second one out evenly, and no mirror or roll gives it back.
    assert gcd(sum(second["a"]), width) == 1
    assert all(tuple(second["a"][(i + r) % width] for i in range(width)) != second["a"] for r in range(1, width))
    assert second["a"][::-1] != second["a"]
    assert HALVES[0](groups).keep == first  # the same on every machine


def test_a_group_that_no_input_reaches_is_refused_for_what_it_is():
    class Reshaped(nn.Module):
        """The linear layer reads a map whose channels were folded into its sides: no channel can leave."""

        def __init__(self):
            super().__init__()
            self.conv, self.next, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), Head(5)

        def forward(self, x: Tensor) -> Tensor:
            n, _, h, w = x.shape
            return self.head(self.next(F.relu(self.conv(x)).view(n, 4, h, w)))

    groups = probed(Reshaped())
    assert groups["conv"].status == "excluded"
    assert groups["conv"].reason.startswith(
        "removing its channels fails: RuntimeError: shape '[2, 4, 8, 8]' is invalid"
    )
    assert groups["conv"].difference is None
    assert groups["next"].status == "exact"


def test_a_group_excluded_before_the_probe_keeps_its_reason():
    network = nn.Sequential(*conv_norm(3, 4), nn.ReLU(), Head(4))
    before = find_groups(network, example_input(SIDE)).groups[-1]
    assert before.status == "excluded" and probed(network)[before.root] == before


class Sized(nn.Module):
    """Takes 15 pixels or more; above 32 its ``large`` path."""

    def __init__(self, *, same_path: bool):
        super().__init__()
        self.conv, self.head, self.same_path = nn.Conv2d(3, 4, 15), Head(4), same_path

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x))
        return self.head(y if self.same_path or x.shape[-1] < 32 else y + 1)


@pytest.mark.parametrize("same_path", [True, False])
def test_the_smallest_input_that_the_network_takes_is_used_and_the_canvas_only_where_its_path_is_another(same_path):
    network = Sized(same_path=same_path)
    found = find_groups(network, example_input(64))
    shapes: list[tuple[int, int]] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: shapes.append((len(args[0]), args[0].shape[-1])) if isinstance(module, Sized) else None
    )
    with handle:
        assert probe(network, found, example=example_input(64)).groups[0].status == "exact"
    assert {side for _, side in shapes} == ({8, 16} if same_path else {8, 16, 64})
    # masked and removed, one image each
    assert [shape for shape in shapes if shape[1] == 64] == ([] if same_path else [(1, 64)] * 2)


def test_redrawing_reaches_every_parameter_and_statistic_and_nothing_else():
    network = nn.Sequential(*conv_norm(3, 4), nn.PReLU(4), nn.Conv2d(4, 4, 1), Head(4)).eval()
    network.register_buffer("step", torch.tensor(7))
    for tensor in network.parameters():
        nn.init.zeros_(tensor)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert redraw(network) is network
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            assert bool((tensor != before[name]).all()), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert bool((network[1].running_var > 0).all())  # type: ignore[index, operator]


def test_a_draw_that_is_dead_is_drawn_again(monkeypatch):
    """Three channels behind a ReLU may all be negative under random weights: that says nothing of the network."""

    def first_draw_dead(network: nn.Module, *, seed: int = 0) -> nn.Module:
        redraw(network, seed=seed)
        if seed == 0:
            nn.init.constant_(network.get_parameter("0.bias"), -99.0)
        return network

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), Head(4))
    monkeypatch.setattr(probing, "redraw", first_draw_dead)
    found = find_groups(network, example_input(8))
    assert [group.status for group in probe(network, found, example=example_input(8)).groups[:2]] == ["exact", "exact"]
    monkeypatch.setattr(probing, "DRAWS", 1)
    (reason,) = {group.reason for group in probe(network, found, example=example_input(8)).groups[:1]}
    assert reason == "not probed: masking it alone changes the logits by only 0"


def test_a_running_mean_is_drawn_with_both_signs_whatever_it_was():
    """Only positive ones would push most channels below zero, and the network dies behind its ReLUs."""
    norm = nn.BatchNorm2d(64).eval()
    nn.init.ones_(norm.running_mean)  # type: ignore[arg-type]
    redraw(norm)
    assert bool((norm.running_mean < 0).any()) and bool((norm.running_var > 0).all())  # type: ignore[operator]


def test_a_variance_stays_one_under_any_name():
    network = nn.Module()
    network.register_buffer("spread", torch.tensor([0.0, 2.0, 0.3]))
    network.register_buffer("middle", torch.tensor([-1.0, 2.0, 0.3]))
    network.register_buffer("zeros", torch.zeros(64))
    redraw(network)
    assert bool((network.spread > 0).all())  # type: ignore[operator]
    assert bool((network.zeros < 0).any()) and bool((network.zeros > 0).any())  # type: ignore[operator]


class OwnNorm(nn.Module):
    """A norm over buffers of its own names, before an innocent group."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), Head(6)
        self.register_buffer("middle", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), self.middle, self.spread)  # type: ignore[arg-type]
        return self.head(F.relu(self.second(F.relu(x))))


def test_a_norm_over_buffers_of_its_own_loses_its_channels_too():
    network = OwnNorm()
    groups = probed(network)
    assert (groups["first"].status, groups["second"].status) == ("exact", "exact")
    mask = ChannelMask({"first": (True, False) * 4})
    small = cut(network, plan(network, [groups["first"]], mask))
    assert (small.middle.shape, small.spread.shape) == ((4,), (4,))  # type: ignore[union-attr]


class SizeDependent(nn.Module):
    """Above 8 pixels the channels are flipped between the first two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv_norm(3, 8), conv_norm(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[-1] > 8
        x = F.relu(self.first(x))
        return self.head(F.relu(self.second(x.flip(1) if large else x)))


def test_a_group_is_judged_by_what_happens_at_the_size_of_the_example():
    small, large = probed(SizeDependent(), canvas_size=8), probed(SizeDependent(), canvas_size=12)
    assert small["first.0"].status == "exact"
    assert (large["first.0"].status, large["first.0"].reason) == ("excluded", "flip moves its channels by number")
    assert large["second.0"].status == "exact"


def test_a_group_that_is_exact_at_the_smallest_size_only_is_excluded():
    """Were the labels wrong of what happens at the larger size, the probe would still see it there."""
    network = SizeDependent()
    trusting, knowing = (find_groups(network, example_input(side)) for side in (8, 12))
    found = replace(trusting, path=knowing.path)
    groups = {group.root: group for group in probe(network, found, example=example_input(12)).groups}
    assert groups["first.0"].status == "excluded"
    assert groups["first.0"].reason.startswith("masked and removed differ by ")
    assert groups["first.0"].reason.endswith(" of the largest logit at 12 pixels")
    assert groups["second.0"].status == "exact"


class Scaled(nn.Module):
    """Two branches added to a stream, times ``scale``; where ``broken``, the stem's group is inexact."""

    def __init__(self, scale: float, *, broken: bool = False, in_place: bool = False):
        super().__init__()
        self.scale, self.in_place = scale, in_place
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8) if broken else nn.ReLU()
        self.a, self.b, self.back_a, self.back_b = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        branch = self.back_a(F.silu(self.a(x))) + self.back_b(F.silu(self.b(x)))
        if self.in_place:  # after the branches read it: no gradient can be taken
            return self.head(x.add_(self.scale * branch))
        return self.head(x + self.scale * branch)


def test_a_group_that_changes_nothing_does_not_pass_among_others_that_do():
    groups = probed(Scaled(0.0))
    assert {root: group.status for root, group in groups.items() if root in ("stem", "a", "b")} == {
        "stem": "exact", "a": "excluded", "b": "excluded"
    }  # fmt: skip
    assert groups["a"].reason == "not probed: masking it alone changes the logits by only 0"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_groups_of_little_effect_are_kept_beside_a_broken_one_and_without_a_gradient(broken, in_place):
    groups = probed(Scaled(1e-5, broken=broken, in_place=in_place))
    assert groups["stem"].status == ("excluded" if broken else "exact")
    assert (groups["a"].status, groups["b"].status) == ("exact", "exact")


# --- the certificate ------------------------------------------------------------------------------------------------


def pruned() -> tuple[nn.Module, nn.Module, ChannelGroups, Selection]:
    network = randomised(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), Head(3)), seed=0)
    groups = probe(network, find_groups(network, example_input(SIDE)), example=example_input(SIDE))
    mask = ChannelMask({"0": (True, False, False, True)})  # the other group is not named: it is whole
    small = cut(network, plan(network, groups.prunable, mask))
    return network, small, groups, Selection(mask, "channel_ratio", 0.8, 5 / 7)


def test_every_group_has_its_line_in_the_certificate():
    network, small, groups, selection = pruned()
    certificate = certify(network, small, groups, selection, canvas=image(0))
    assert [(r.root, r.width, r.kept, r.status) for r in certificate.groups] == [
        ("0", 4, 2, "exact"), ("3", 3, 3, "exact"), ("5.linear", 5, 5, "excluded"),
    ]  # fmt: skip
    assert (certificate.budget, certificate.requested, certificate.reached) == ("channel_ratio", 0.8, 5 / 7)


def test_a_network_that_was_cut_otherwise_gets_no_certificate():
    network, small, groups, selection = pruned()
    with torch.no_grad():
        small[5].linear.bias[0] += 1e-3  # type: ignore[index]
    with pytest.raises(SurgeryError) as caught:
        certify(network, small, groups, selection, canvas=image(0))
    message = str(caught.value)
    assert message.startswith("masked and pruned logits differ by ")
    assert (
        "of the largest on 3 real images and 2 random ones; expected at most 1e-06" in message
        and "please report it" in message
    )


def test_logits_that_are_no_numbers_get_no_certificate():
    network, small, groups, selection = pruned()
    with torch.no_grad():
        small[5].linear.bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(SurgeryError, match="are not finite"):
        certify(network, small, groups, selection, canvas=image(0))


class Counted(nn.Module):
    """Counts forwards with numbers in them."""

    calls = 0  # of the class: copies of the network count, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counted.calls += not x.is_meta
        return self.head(self.features(x).mean((2, 3)))


class Fixed(Counted):
    """``count`` convolutions, each followed by a view that holds its width."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(count)])
        self.head = nn.Linear(8, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).view(len(x), 8, *x.shape[2:]).relu()
        return x


class FixedBlock(nn.Module):
    """Two convolutions, of which the second one's width is held by a view."""

    def __init__(self, width: int):
        super().__init__()
        self.free, self.held = nn.Conv2d(width, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held(self.free(x).relu()).view(len(x), 8, *x.shape[2:]).relu()


class FixedBlocks(Counted):
    def __init__(self, count: int):
        super().__init__()
        self.features = nn.Sequential(*[FixedBlock(3 if i == 0 else 8) for i in range(count)])
        self.head = nn.Linear(8, 4)


def test_what_cannot_run_is_told_without_arithmetic():
    network = Fixed(12)
    found = find_groups(network, example_input(8))
    Counted.calls = 0
    groups = probe(network, found, example=example_input(8)).groups[:12]
    assert all(group.reason.startswith("removing its channels fails") for group in groups)
    # For the draw, its slopes, the path and one try of all together; a bisection with numbers took 45 more.
    assert 0 < Counted.calls <= 5


def test_what_cannot_run_is_found_where_the_forward_stops():
    network = FixedBlocks(8)
    found = find_groups(network, example_input(8))
    Counted.calls = 0
    groups = {group.root: group for group in probe(network, found, example=example_input(8)).groups}
    assert [groups[f"features.{i}.free"].status for i in range(8)] == ["exact"] * 8
    for i in range(8):
        assert groups[f"features.{i}.held"].reason.startswith(f"removing its channels fails in features.{i}: ")
    # As above, then with what is left: its two halves, the other mask, training and both masks again. By numbers alone 73.
    assert 0 < Counted.calls <= 17
