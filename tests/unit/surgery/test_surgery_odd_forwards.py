"""Forwards that change weights, choose, throw dice, borrow parameters, or need more than one pixel to say anything."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from strategies import conv_norm, randomised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import CHOSEN, probe
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelMask

SIDE = 32


class Plain(nn.Module):
    """Two convolutions and a head; ``middle`` stands between the convolutions, ``pool`` before the head."""

    def __init__(
        self,
        middle: Callable[[Plain, Tensor], Tensor] = lambda network, x: x,
        pool: Callable[[Tensor], Tensor] = lambda x: x.mean((2, 3)),
        features: int = 1,
    ):
        super().__init__()
        self.first, self.second, self.head = conv_norm(3, 8), nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6 * features, 5)
        self.middle, self.pool = middle, pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.second(self.middle(self, self.first(x))).relu()))


def probed(network: nn.Module) -> dict[str, ChannelGroup]:
    """``network`` is unchanged, in whatever it is."""
    before = copy.deepcopy(network.state_dict())
    found = find_groups(network, example_input(SIDE))
    groups = probe(network, found, example=example_input(SIDE)).groups
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return {group.root: group for group in groups}


def renormed(network: Plain, x: Tensor) -> Tensor:
    """A convolution with a bound on its norm, as EEGNet has it."""
    network.second.weight.data = torch.renorm(network.second.weight.data, 2, 0, 0.5)
    return x


def shrunk(network: Plain, x: Tensor) -> Tensor:
    network.second.weight.data.mul_(0.9)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", [renormed, shrunk])
def test_a_weight_that_the_forward_changes_holds_its_channels(middle, dtype):
    groups = probed(randomised(Plain(middle), seed=0).to(dtype))
    for root in ("first.0", "second"):
        assert groups[root].status == "excluded" and "changes second.weight whenever it runs" in groups[root].reason


class Momentum(Plain):
    """In training a second network follows the first, as in MoCo."""

    def __init__(self):
        super().__init__()
        self.slow = copy.deepcopy(self.first)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
            self.slow(x)
        return super().forward(x)


def test_a_network_that_averages_itself_in_training_stays_as_it_was():
    assert probed(randomised(Momentum(), seed=0))["second"].status == "exact"


def test_a_choice_by_values_is_told_of_what_is_called_exact():
    groups = probed(randomised(Plain(lambda network, x: x.softmax(1) if x.amax() > 1e6 else x), seed=0))
    assert groups["second"].status == "exact"
    assert groups["second"].reason == f"{CHOSEN}: its forward reads a value of the image"
    assert probed(randomised(Plain(), seed=0))["second"].reason == ""


class Dice(Plain):
    """An auxiliary head that takes part in half of the training forwards."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.training and torch.rand(1).item() < 0.5:
            return super().forward(x), self.aux(self.first(x).mean((2, 3)))
        return super().forward(x)


@pytest.mark.parametrize("seed", range(4))
def test_what_takes_part_now_and_then_is_found_whatever_the_callers_seed(seed):
    torch.manual_seed(seed)
    network = randomised(Dice(), seed=0)
    before = torch.random.get_rng_state()
    group = probed(network)["first.0"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {member.module for member in group.members if member.side == "in"} == {"second", "aux"}


def test_a_parameter_of_elsewhere_is_refused():
    scale = nn.Parameter(torch.ones(1))
    hooked = Plain()
    hooked.second.register_forward_hook(lambda module, args, output: output * scale)
    for network in (Plain(lambda network, x: x * scale), hooked):
        with pytest.raises(
            SurgeryError, match="uses a parameter that the network does not hold.*write that function as an nn"
        ):
            find_groups(network, example_input(SIDE))


@pytest.mark.parametrize("given", [torch.arange(3), torch.ones(3, dtype=torch.bool), torch.zeros(0, 8)], ids=str)
def test_parameters_that_cannot_be_drawn_stay(given):
    network = Plain(lambda network, x: x * (1 + network.given.sum()))  # type: ignore[operator]
    network.given = nn.Parameter(given, requires_grad=False)
    assert probed(randomised_but(network, "given"))["second"].status == "exact"


def randomised_but(network: nn.Module, name: str) -> nn.Module:
    kept = network._parameters.pop(name)
    randomised(network, seed=0)
    network._parameters[name] = kept
    return network


def of_others(network: Plain, x: Tensor) -> Tensor:
    """Attention between positions, none of which sees itself."""
    tokens = x.flatten(2)
    scores = (tokens.mT @ tokens).masked_fill(torch.eye(tokens.shape[-1], dtype=torch.bool), -torch.inf)
    return (tokens @ scores.softmax(-1)).view_as(x)


def normed(x: Tensor) -> Tensor:
    """Each channel by itself, over its pixels: zero where there is one."""
    centred = x - x.mean((2, 3), keepdim=True)
    return centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()


DEGENERATE = {
    "deviation of one pixel": lambda: Plain(pool=lambda x: F.avg_pool2d(x, 8).std((2, 3))),
    "norm of one pixel": lambda: Plain(lambda network, x: normed(F.avg_pool2d(x, 8))),
    "attention to other tokens": lambda: Plain(lambda network, x: of_others(network, F.avg_pool2d(x, 8))),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_networks_that_say_nothing_of_one_pixel_are_probed_with_more(name):
    groups = probed(randomised(DEGENERATE[name](), seed=0))
    assert groups["second"].status == "exact", groups["second"].reason
    if "norm" in name:
        assert groups["first.0"].status == "exact", groups["first.0"].reason


class Forgetful(nn.Conv2d):
    """Its copies are in training mode, as those of torch.fx's modules."""

    def __deepcopy__(self, memo: dict) -> Forgetful:
        twin = Forgetful(self.in_channels, self.out_channels, 1)
        twin._parameters = {name: copy.deepcopy(value, memo) for name, value in self._parameters.items()}
        return twin


def test_what_is_cut_is_in_the_mode_of_what_it_was_cut_from():
    network = randomised(nn.Sequential(Forgetful(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()), seed=0)
    network.eval()
    assert copy.deepcopy(network)[0].training
    found = find_groups(network, example_input(8)).groups[0]
    mask = ChannelMask({found.root: (True,) * 4 + (False,) * 4})
    assert not any(module.training for module in cut(network, plan(network, [found], mask)).modules())


def test_gates_are_there_when_a_checkpoint_runs_its_part_again():
    network = randomised(Plain(), seed=0)
    groups = [group for group in probed(network).values() if group.status == "exact"]
    again = copy.deepcopy(network)
    again.middle = lambda network, x: x
    again.second = Recomputed(again.second)
    slopes = []
    for backbone in (network, again):
        if backbone is again:
            groups = [group for group in probed(again).values() if group.status == "exact"]
        values = torch.ones(sum(group.width for group in groups), dtype=torch.float64, requires_grad=True)
        Gated(copy.deepcopy(backbone), groups)(example_input(SIDE).double(), values).square().sum().backward()
        slopes.append(values.grad)
    assert torch.allclose(slopes[0], slopes[1])


class Recomputed(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[return-value]
