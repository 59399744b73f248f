"""Law 1 where a forward looks at widths, at its mode, or at nothing: refused part by part, and the rest still prunable."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hard_networks import check_law, groups_of
from strategies import Head, conv_norm, image, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.certificate import certify
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.groups import example_input
from vpdeploy.surgery.paths import first_change
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroups, ChannelMask, Selection

WIDTHS = (16, 24, 32, 32)


class Chain(nn.Module):
    """Four layers of WIDTHS; ``between(network, x, y)``: what follows each but the first, x before it and y after it."""

    def __init__(self, between: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.layers = nn.ModuleList([conv_norm(a, b) for a, b in zip((3, *WIDTHS), WIDTHS, strict=False)])
        self.head = Head(WIDTHS[-1])
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.layers[0](x))
        for layer in list(self.layers)[1:]:
            x = self.between(self, x, F.silu(layer(x)))
        return self.head(x)


def residual_by_shape(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return x + y if x.shape == y.shape else y


def pooled_if_wide(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.avg_pool2d(y, 2) if y.shape[1] > 20 and min(y.shape[2:]) > 1 else y


def statuses(groups: ChannelGroups) -> dict[str, str]:
    return {group.root: group.reason or group.status for group in groups.groups}


WHY = "the forward depends on widths; the dense network does "
# between, the roots that stay prunable, why others do not
CASES = {
    # A sum that only stands where two widths agree: of two that could come to agree one stays whole.
    "a residual by shape": (
        residual_by_shape, {"layers.0.0", "layers.2.0"}, {"layers.1.0": f"^together with others .*: {WHY}convolution in"}
    ),
    # What the last layer gives is averaged in any case.
    "pooled if wide": (
        pooled_if_wide, {"layers.0.0", "layers.3.0"}, {f"layers.{i}.0": f"{WHY}avg_pool2d in its own forward" for i in (1, 2)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_forward_that_looks_at_widths_is_found_out_and_the_rest_stays_prunable(name):
    between, prunable, refused = CASES[name]
    network = randomised(Chain(between), seed=0)
    groups = groups_of(network)
    found = statuses(groups)
    for root, pattern in refused.items():
        assert re.search(pattern, found[root]), f"{root}: {found[root]}"
    assert {group.root for group in groups.prunable} == prunable
    if (
        between is pooled_if_wide
    ):  # the sum may stand again where what is cut comes to agree with what is whole: see below
        check_law(network, groups.prunable)


def test_what_could_not_be_trained_after_the_cut_is_refused():
    class Dropping(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.layers[1](F.silu(self.layers[0](x))))
            if self.training:
                x = x * torch.bernoulli(torch.full((len(x), 24, 1, 1), 0.9, dtype=x.dtype))
            return self.head(F.silu(self.layers[3](F.silu(self.layers[2](x)))))

    network = randomised(Dropping(residual_by_shape), seed=0)
    groups = groups_of(network)
    assert statuses(groups)["layers.1.0"].startswith("removing its channels fails in training mode: RuntimeError: ")
    assert {group.root for group in groups.prunable} == {"layers.0.0", "layers.2.0", "layers.3.0"}


def test_readers_may_be_called_by_the_name_of_their_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=F.silu(self.b(input=F.silu(self.a(input=x)))).mean((2, 3)))

    network = randomised(Named(), seed=0)
    groups = groups_of(network)
    assert [group.root for group in groups.prunable] == ["a", "b"]
    check_law(network, groups.prunable)


def test_an_orthogonal_head_leaves_the_rest_prunable():
    network = randomised(Chain(lambda network, x, y: y), seed=0)
    network.head.linear = parametrizations.orthogonal(network.head.linear)
    groups = groups_of(network)
    assert {group.root for group in groups.prunable} == {"layers.0.0", "layers.1.0", "layers.2.0"}
    assert "head.linear computes its weight at every forward (_Orthogonal)" in statuses(groups)["layers.3.0"]


def test_the_inputs_of_a_standardised_weight_are_under_its_statistics():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    network = randomised(Chain(lambda network, x, y: y), seed=0)
    network.layers[2] = randomised(Standardised(24, 32, 1), seed=1)
    found = statuses(groups_of(network))
    assert found["layers.1.0"].startswith("layers.2 takes statistics over its channels (batch_norm")
    assert found["layers.0.0"] == found["layers.3.0"] == "exact"


def cut_to(network: nn.Module, groups: ChannelGroups, kept: dict[str, int]) -> tuple[nn.Module, Selection]:
    mask = ChannelMask({g.root: tuple(c < kept.get(g.root, g.width) for c in range(g.width)) for g in groups.groups})
    return cut(network, plan(network, groups.groups, mask)), Selection(mask, "macs_ratio", 0.5, 0.5)


def test_a_cut_at_which_the_forward_does_something_else_names_it():
    network = randomised(Chain(residual_by_shape), seed=0)
    groups = groups_of(network)
    small, selection = cut_to(network, groups, {"layers.0.0": 8, "layers.1.0": 8})
    assert first_change(network, network, example_input(16)) is None
    change = first_change(network, small, example_input(16))
    assert change == "the dense network does convolution in layers.2.0 where the pruned one does add in its own forward"
    everything = ChannelGroups(
        tuple(type(g)(g.root, g.width, g.members, status="exact") for g in groups.groups if g.root != "head.linear"),
        groups.path,
        groups.shape,
    )
    with pytest.raises(SurgeryError) as caught:
        certify(network, small, everything, selection, canvas=image(0))
    assert f"the forward depends on widths; {change}. Write it so" in str(caught.value)


def test_agreement_of_constant_logits_is_no_certificate():
    network = randomised(Chain(lambda network, x, y: y), seed=0)
    groups = groups_of(network)
    with torch.no_grad():
        network.head.linear.weight.zero_()
    small, selection = cut_to(network, groups, {"layers.0.0": 8})
    with pytest.raises(SurgeryError, match=r"images logits that differ by 0 of the largest; expected at least 1e-06"):
        certify(network, small, groups, selection, canvas=image(0))
