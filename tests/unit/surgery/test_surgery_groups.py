"""Groups of networks small enough to be grouped by hand."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from strategies import FAMILIES, SIDE, Head, conv_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import remove_spectral_norm, spectral_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from vpdeploy.errors import SurgeryError
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups, offsets
from vpdeploy.values import ChannelGroup, Member


def groups_of(network: nn.Module) -> dict[str, ChannelGroup]:
    return {group.root: group for group in find_groups(network, example_input(SIDE)).groups}


def member(
    tensor: str, axis: int, side: str, indices: range, channels: range | tuple[int, ...] | None = None
) -> Member:
    return Member(tensor, axis, side, tuple(indices), tuple(indices if channels is None else channels))  # type: ignore[arg-type]


def members(group: ChannelGroup) -> set[Member]:
    assert len(set(group.members)) == len(group.members)
    return set(group.members)


def test_a_chain():
    """0 conv, 1 norm, 2 relu, 3 depthwise conv, 4 pool to 2x2, 5 flatten, 6 linear, 7 linear."""
    network = nn.Sequential(
        *conv_norm(3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 4), nn.Linear(4, 5),
    )  # fmt: skip
    groups = groups_of(network)
    assert [(g.root, g.width, g.unit, g.status) for g in groups.values()] == [
        ("0", 3, 1, "exact"), ("6", 4, 1, "exact"), ("7", 5, 1, "excluded")
    ]  # fmt: skip
    through = [("0.weight", "out"), ("1.weight", "both"), ("1.bias", "both"), ("1.running_mean", "both"),
               ("1.running_var", "both"), ("3.weight", "both"), ("3.bias", "both")]  # fmt: skip
    assert members(groups["0"]) == {member(tensor, 0, side, range(3)) for tensor, side in through} | {
        member("6.weight", 1, "in", range(12), (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2))
    }
    assert members(groups["6"]) == {
        member("6.weight", 0, "out", range(4)), member("6.bias", 0, "both", range(4)), member("7.weight", 1, "in", range(4))
    }  # fmt: skip
    assert members(groups["7"]) == {member("7.weight", 0, "out", range(5)), member("7.bias", 0, "both", range(5))}
    assert groups["7"].reason == "its channels are the network's outputs"


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
    assert members(groups["a"]) == {
        member("a.weight", 0, "out", range(4)),
        member("a.bias", 0, "both", range(4)),
        member("b.weight", 0, "out", range(4)),
        member("b.bias", 0, "both", range(4)),
        member("join.weight", 1, "in", range(2, 6), range(4)),
        member("scale", 1, "both", range(4)),
    }
    assert members(groups["c"]) == {
        member("c.weight", 1, "out", range(2)), member("c.bias", 0, "both", range(2)), member("join.weight", 1, "in", range(2))
    }  # fmt: skip
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
    assert members(groups["stem"]) == {
        member("conv.weight", 1, "in", range(4)),
        member("gather.source", 0, "in", range(4)),
        member("stem.weight", 0, "out", range(4)),
        member("stem.bias", 0, "both", range(4)),
    }
    (second,) = [group for root, group in groups.items() if root not in ("stem", "head.linear")]
    assert members(second) == {
        member("conv.weight", 0, "out", range(6)),
        member("conv.bias", 0, "both", range(6)),
        member("gather.target", 0, "out", range(6)),
        member("head.linear.weight", 1, "in", range(6)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_of_every_axis_is_in_one_group_at_most_and_only_the_input_in_none(family):
    network = FAMILIES[family]((4, 5, 6, 7), nn.ReLU)
    groups = find_groups(network, example_input(SIDE)).groups
    claims = [(m.tensor, m.axis, i) for group in groups for m in group.members for i in m.indices]
    assert len(claims) == len(set(claims))
    for group in groups:
        for m in group.members:
            assert set(m.channels) == set(range(group.width)), (group.root, m)
            assert len(m.indices) == len(m.channels) and list(m.indices) == sorted(m.indices)
    shapes = {name: tensor.shape for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    free = {(n, axis) for n, shape in shapes.items() for axis in range(len(shape))} - {
        (n, axis) for n, axis, _ in claims
    }
    kernel = {(n, axis) for n, shape in shapes.items() for axis in (2, 3) if len(shape) == 4}
    lone = {(n, axis) for n, shape in shapes.items() for axis, size in enumerate(shape) if size == 1}
    image = {(n, 1) for n, shape in shapes.items() if len(shape) > 1 and shape[1] == 3}
    positions = {("position", 1)}
    positions |= {(n, 0) for n in shapes if n.endswith(".index")}  # of a gather: made anew from source and target
    few = {(n, 1) for n, module in network.named_modules() for n in [f"{n}.weight"] if getattr(module, "groups", 1) > 1}
    assert free <= kernel | lone | image | positions | few


class Parts(nn.Module):
    """Sixteen channels of one convolution: the first eight go to one reader, the next four to another, the last to a sum."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b, self.c = (
            nn.Conv2d(3, 16, 1),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(4, 6, 1),
            nn.Conv2d(3, 4, 1),
        )
        self.d, self.head = nn.Conv2d(4, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x))
        return self.head(F.silu(self.a(y[:, :8]) + self.b(y[:, 8:12]) + self.d(y[:, 12:] + self.c(x))))


def test_parts_of_a_layer_are_groups_of_their_own_named_by_their_range():
    groups = groups_of(Parts())
    assert [(group.root, group.width) for group in groups.values()][:3] == [
        ("conv[0:8]", 8),
        ("conv[8:12]", 4),
        ("c", 4),
    ]
    assert member("conv.weight", 0, "out", range(12, 16), range(4)) in groups["c"].members
    assert member("conv.bias", 0, "both", range(8, 12), range(4)) in groups["conv[8:12]"].members


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.linear = nn.Conv2d(3, 4, 1), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0][:, -1])


def test_a_reader_that_cannot_lose_inputs_excludes_its_group_by_name():
    group = groups_of(Recurrent())["conv"]
    assert group.status == "excluded"
    # which operation it is depends on the machine
    assert re.fullmatch(r"its channels pass through \w+ in lstm, for which there is no rule", group.reason)


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
    reasons = {group.root.split(".")[0]: group.reason for group in found[:-1]}
    before = "convolution in 4 reads by a weight that is made of other tensors at every forward"
    assert reasons == {"0": "", "2": before, "4": normed, "6": hooked, "8": ""}
    for name, fold in (("4", partial(remove_parametrizations, tensor_name="weight")), ("6", remove_spectral_norm)):
        fold(network.get_submodule(name))
    assert [group.reason for group in groups_of(network).values()][:-1] == [""] * 5  # the advice helps


def test_a_network_that_cannot_be_traced_is_a_clear_error():
    with pytest.raises(
        SurgeryError, match="network Untraceable: its forward fails in linear: RuntimeError: (addmm: )?mat1 and"
    ):
        find_groups(Untraceable(), example_input(SIDE))


# --- the axes that channels run along ------------------------------------------------------------------------------


class Layers(nn.Module):
    """One of each kind of layer, in a row."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.plain, self.one = nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.PReLU(1)
        self.slopes, self.depthwise = nn.PReLU(4), nn.Conv2d(4, 4, 3, groups=4)
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.up, self.gather = nn.ConvTranspose2d(4, 6, 1, bias=False), ChannelGather(6, 8, stride=1)
        self.hidden, self.linear = nn.Linear(8, 7, bias=False), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.slopes(self.one(self.plain(self.norm(self.conv(x))))))
        return self.linear(self.hidden(self.gather(self.up(x * self.scale)).mean((2, 3))))


def test_the_axes_that_channels_run_along():
    axes = {(m.tensor, m.axis): m.side for group in groups_of(Layers()).values() for m in group.members}
    assert axes == {
        ("conv.weight", 0): "out", ("conv.bias", 0): "both",
        ("norm.weight", 0): "both", ("norm.bias", 0): "both", ("norm.running_mean", 0): "both", ("norm.running_var", 0): "both",
        ("slopes.weight", 0): "both", ("depthwise.weight", 0): "both", ("depthwise.bias", 0): "both", ("scale", 1): "both",
        ("up.weight", 0): "in", ("up.weight", 1): "out", ("gather.source", 0): "in", ("gather.target", 0): "out",
        ("hidden.weight", 1): "in", ("hidden.weight", 0): "out", ("linear.weight", 1): "in", ("linear.weight", 0): "out",
        ("linear.bias", 0): "both",
    }  # fmt: skip
    modules = {m.tensor: m.module for group in groups_of(Layers()).values() for m in group.members}
    assert (modules["scale"], modules["gather.source"], modules["norm.bias"]) == ("", "gather", "norm")


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


@pytest.mark.parametrize(
    ("leaf", "reasons"),
    [
        # One weight that writes and reads the same channels joins all three convolutions.
        ("weight", {"stem": "c2 reads c1.weight itself, where no gate can stand"}),
        ("bias", {"stem": "", "c1": "c2 shares its bias with c1"}),
    ],
)
def test_layers_that_share_a_tensor_are_excluded_by_name(leaf, reasons):
    groups = groups_of(Tied(leaf))
    assert groups.keys() == {*reasons, "free", "last.linear"}
    for root, reason in {**reasons, "free": ""}.items():
        assert (groups[root].status, groups[root].reason) == ("excluded" if reason else "exact", reason), root
