"""What the probe says of a group that it refuses, and which masks it tries."""

from __future__ import annotations

from math import gcd

import pytest
import torch
from strategies import SIDE, Head, conv_norm, image, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import HALVES, certify, probe, redraw
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask, Selection


def probed(network: nn.Module, *, canvas_size: int = SIDE) -> dict[str, ChannelGroup]:
    found = find_groups(network, example_input(canvas_size))
    return {group.root: group for group in probe(network, found, canvas_size=canvas_size).groups}


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


def test_the_smallest_input_that_the_network_takes_is_used():
    sides: list[int] = []

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 15), Head(4)

        def forward(self, x: Tensor) -> Tensor:
            sides.append(x.shape[-1])
            return self.head(F.relu(self.conv(x)))

    network = Sized()
    found = find_groups(network, example_input(64))
    sides.clear()
    assert probe(network, found, canvas_size=64).groups[0].status == "exact"
    assert max(sides) == 16 and 8 in sides


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


# --- the certificate ------------------------------------------------------------------------------------------------


def pruned() -> tuple[nn.Module, nn.Module, ChannelGroups, Selection]:
    network = randomised(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.ReLU(), Head(3)), seed=0)
    groups = probe(network, find_groups(network, example_input(SIDE)), canvas_size=SIDE)
    mask = ChannelMask({"0": (True, False, False, True)})  # the other group is not named: it is whole
    small = cut(network, plan(network, groups.prunable, mask, example=example_input(SIDE)))
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
    assert "of the largest on 3 real images; expected at most 1e-06" in message and "please report it" in message


def test_logits_that_are_no_numbers_get_no_certificate():
    network, small, groups, selection = pruned()
    with torch.no_grad():
        small[5].linear.bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(SurgeryError, match="differ by inf"):
        certify(network, small, groups, selection, canvas=image(0))
