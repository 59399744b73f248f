"""Groups of networks small enough to be grouped by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from strategies import SIDE, Head, conv_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import remove_spectral_norm, spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from vpdeploy.errors import SurgeryError
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups, offsets, tensor_axes
from vpdeploy.values import ChannelGroup, Member


def groups_of(network: nn.Module) -> dict[str, ChannelGroup]:
    return {group.root: group for group in find_groups(network, example_input(SIDE)).groups}


def member(module: str, side: str, indices: range, channels: range | tuple[int, ...] | None = None) -> Member:
    return Member(module, side, tuple(indices), tuple(indices if channels is None else channels))  # type: ignore[arg-type]


def test_a_chain():
    """0 conv, 1 norm, 2 relu, 3 depthwise conv, 4 pool to 2x2, 5 flatten, 6 linear, 7 linear."""
    network = nn.Sequential(
        *conv_norm(3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 4), nn.Linear(4, 5),
    )  # fmt: skip
    assert groups_of(network) == {
        "0": ChannelGroup(
            "0",
            3,
            (
                member("0", "out", range(3)),
                member("1", "both", range(3)),
                member("3", "both", range(3)),
                member("6", "in", range(12), (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)),
            ),
        ),
        "6": ChannelGroup("6", 4, (member("6", "out", range(4)), member("7", "in", range(4)))),
        "7": ChannelGroup(
            "7",
            5,
            (member("7", "out", range(5)),),
            status="excluded",
            reason="no layer reads it: its channels are the network's outputs, or lead nowhere",
        ),
    }


class Joined(nn.Module):
    """A sum ties two writers; a concatenation lays two groups side by side at one reader."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 2, 1)
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.join, self.head = nn.Conv2d(6, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(torch.cat([self.c(x), self.scale * F.relu(self.a(x) + self.b(x))], dim=1)))


def test_a_sum_and_a_concatenation():
    groups = groups_of(Joined())
    assert groups["a"].members == (
        member("a", "out", range(4)),
        member("b", "out", range(4)),
        member("join", "in", range(2, 6), range(4)),
        member("scale", "both", range(4)),
    )
    assert groups["c"].members == (member("c", "out", range(2)), member("join", "in", range(2)))
    assert list(groups) == ["a", "c", "join", "head.linear"]  # in the order of their roots


class Shortcut(nn.Module):
    """A CIFAR ResNet's widening shortcut: 4 channels, zero-padded to 6, join the next stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.gather, self.conv = nn.Conv2d(3, 4, 1), ChannelGather(4, 6, stride=1), nn.Conv2d(4, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.gather(x) + self.conv(x))


def test_a_gather_keeps_two_streams_apart():
    groups = groups_of(Shortcut())
    assert groups["stem"].members == (
        member("conv", "in", range(4)),
        member("gather", "in", range(4)),
        member("stem", "out", range(4)),
    )
    assert groups["gather"].members == (
        member("conv", "out", range(6)),
        member("gather", "out", range(6)),
        member("head.linear", "in", range(6)),
    )


def test_every_index_is_in_one_group_at_most():
    for network in (Joined(), nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * SIDE**2, 5))):
        claims = [
            (m.module, m.side, i) for group in groups_of(network).values() for m in group.members for i in m.indices
        ]
        assert len(claims) == len(set(claims))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.linear = nn.Conv2d(3, 4, 1), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0][:, -1])


def test_a_reader_that_cannot_lose_inputs_excludes_its_group_by_name():
    group = groups_of(Recurrent())["conv"]
    assert (group.status, group.reason) == ("excluded", "it is read by lstm, a LSTM, which cannot lose inputs")


class Bare(nn.Module):
    """The logits are a convolution's own channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.b(F.relu(self.a(x)))), 1).flatten(1)


def test_outputs_of_the_network_stay():
    groups = groups_of(Bare())
    assert groups["a"].status == "exact"
    assert (groups["b"].status, groups["b"].reason) == ("excluded", "its channels are the network's outputs")


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_computed_weight_excludes_its_groups_and_says_what_to_do():
    """Removed by torch-pruning it ended as "KeyError: attribute 'weight' already exists", after a warning."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), weight_norm(nn.Conv2d(5, 6, 1)), nn.ReLU(),
        spectral_norm(nn.Conv2d(6, 7, 1)), nn.ReLU(), nn.Conv2d(7, 8, 1), Head(8),
    )  # fmt: skip
    found = probe(network, find_groups(network, example_input(SIDE)), example=example_input(SIDE)).groups
    folded = "in the factory, and a checkpoint saved again from the folded network"
    normed = (
        "4 computes its weight at every forward (_WeightNorm); fold it before pruning: "
        f"torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') {folded}"
    )
    hooked = (
        "6 computes its weight at every forward (a hook, as of torch.nn.utils.spectral_norm); fold it before pruning: "
        f"torch.nn.utils.remove_spectral_norm(module) {folded}"
    )
    reasons = {group.root: group.reason for group in found[:-1]}
    assert reasons == {"0": "", "2": normed, "4": normed, "6": hooked, "8": ""}
    for name, fold in (("4", partial(remove_parametrizations, tensor_name="weight")), ("6", remove_spectral_norm)):
        fold(network.get_submodule(name))
    assert [group.reason for group in groups_of(network).values()][:-1] == [""] * 5  # the advice helps


def test_a_network_that_cannot_be_traced_is_a_clear_error():
    with pytest.raises(SurgeryError, match="network Untraceable: torch-pruning cannot analyse it: RuntimeError"):
        find_groups(Untraceable(), example_input(SIDE))


# --- the tensors of a member ----------------------------------------------------------------------------------------


def test_the_axes_that_channels_run_along():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1, bias=False)
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.linear, self.norm = nn.Linear(3, 4, bias=False), nn.BatchNorm2d(4)
            self.plain, self.one = nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.PReLU(1)
            self.slopes, self.gather = nn.PReLU(4), ChannelGather(4, 6, stride=1)
            self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    network = Layers()

    def axes(module: str, side: str) -> list[tuple[str, int]]:
        return [(n.removeprefix(f"{module}."), axis) for n, axis in tensor_axes(network, Member(module, side, (), ()))]  # type: ignore[arg-type]

    assert axes("conv", "out") == [("weight", 0), ("bias", 0)]
    assert axes("conv", "in") == [("weight", 1)]
    assert axes("up", "out") == [("weight", 1)]
    assert axes("up", "in") == [("weight", 0)]
    assert axes("depthwise", "both") == [("weight", 0), ("bias", 0)]
    assert (axes("linear", "out"), axes("linear", "in")) == ([("weight", 0)], [("weight", 1)])
    assert axes("norm", "both") == [("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0)]
    assert axes("plain", "both") == axes("one", "both") == []  # nothing there, or one number for all channels
    assert axes("slopes", "both") == [("weight", 0)]
    assert (axes("gather", "out"), axes("gather", "in")) == ([("target", 0)], [("source", 0)])
    assert axes("scale", "both") == [("scale", 1)]


def test_groups_lie_in_one_row():
    groups = (ChannelGroup("b", 3, ()), ChannelGroup("a", 2, ()))
    assert offsets(groups) == {"b": slice(0, 3), "a": slice(3, 5)}
    assert offsets(()) == {}


def test_the_example_is_the_same_every_time():
    assert (
        example_input(4).shape == (2, 3, 4, 4) and example_input(4, batch=1, dtype=torch.float64).dtype == torch.float64
    )
    assert torch.equal(example_input(4), example_input(4))


class Tied(nn.Module):
    def __init__(self, leaf: str):
        super().__init__()
        self.stem, self.free = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.c1, self.c2 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.alias, self.last = self.free, Head(12)  # one module under two names shares nothing
        setattr(self.c2, leaf, getattr(self.c1, leaf))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.c2(F.relu(self.c1(F.relu(self.stem(x)))))), F.relu(self.alias(x))], 1))


@pytest.mark.parametrize(("leaf", "barred"), [("weight", {"stem", "c1", "c2"}), ("bias", {"c1", "c2"})])
def test_layers_that_share_a_tensor_are_excluded_by_name(leaf, barred):
    groups = {group.root: group for group in find_groups(Tied(leaf), example_input(SIDE)).groups}
    assert groups.keys() == {"stem", "free", "c1", "c2", "last.linear"}
    for root in ("stem", "free", "c1", "c2"):
        reason = f"c2 shares its {leaf} with c1" if root in barred else ""
        assert (groups[root].status, groups[root].reason) == ("excluded" if reason else "exact", reason), root
