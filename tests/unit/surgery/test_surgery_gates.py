"""Gates: where they stand, and what they do not compute."""

from __future__ import annotations

import pytest
import torch
from strategies import SIDE, Head, conv_norm, image, randomised
from tolerances import CLOSED_FORM_FLOAT64, SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.values import ChannelGroup, Member


class Count(TorchDispatchMode):
    """The gradients that convolutions compute: (input, weight, bias) of each, as booleans."""

    def __init__(self):
        super().__init__()
        self.convolutions: list[list[bool]] = []
        self.products = 0  # of whole tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.convolutions.append(list(args[-1]))
        self.products += func is torch.ops.aten.mul.Tensor
        return func(*args, **(kwargs or {}))


def chain() -> tuple[nn.Module, tuple[ChannelGroup, ...]]:
    layers = (*conv_norm(3, 4), nn.ReLU(), *conv_norm(4, 5), nn.ReLU(), nn.Conv2d(5, 6, 1, bias=True), Head(6))
    network = randomised(nn.Sequential(*layers), seed=0)
    return network, find_groups(network, example_input(SIDE)).groups[:-1]


def row(groups: tuple[ChannelGroup, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(sum(g.width for g in groups), dtype=dtype)


def test_frozen_weights_get_no_gradient_and_none_is_computed():
    network, groups = chain()
    gated = Gated(network.requires_grad_(False), groups)
    values = row(groups).requires_grad_(True)
    out = gated(image(0), values).sum()
    with Count() as count:
        out.backward()
    assert values.grad is not None and bool((values.grad != 0).any())
    assert all(parameter.grad is None for parameter in network.parameters())
    # Backwards from the head: the last two convolutions pass the gradient on; the first stands before every gate.
    assert count.convolutions == [[True, False, False]] * 2
    assert count.products == 3 + 2  # three gates want the row's gradient, the first of them no gradient of its input


def test_a_prompt_before_the_network_gets_its_gradient_and_weights_still_none():
    network, groups = chain()
    gated = Gated(network.requires_grad_(False), groups)
    x = image(0).requires_grad_(True)
    with Count() as count:
        gated(x, row(groups)).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert count.convolutions == [[True, False, False]] * 3


def test_a_row_that_wants_no_gradient_gets_none():
    network, groups = chain()
    values = row(groups)
    with Count() as count:
        Gated(network.requires_grad_(True), groups)(image(0), values).sum().backward()
    assert values.grad is None
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert len(count.convolutions) == 3


def test_every_reader_of_a_group_is_gated_and_nothing_else():
    network, groups = chain()
    seen: dict[str, Tensor] = {}
    gated = Gated(network, groups)
    for name, module in network.named_modules():
        if not list(module.children()):
            # registered after the gate's own: it sees what the reader reads
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].detach()))
    values = row(groups)
    values[1] = values[4 + 2] = 0  # channel 1 of the first group, channel 2 of the second
    gated(image(0), values)
    dead = {name: [c for c in range(x.shape[1]) if not bool(x[:, c].any())] for name, x in seen.items()}
    assert dead == {"0": [], "1": [], "2": [], "3": [1], "4": [], "5": [], "6": [2], "7.linear": []}


def test_on_tokens_the_gate_stands_at_the_last_axis():
    """[n, t, c] into a linear layer, as many tokens as channels: the axes must not be confused."""
    network = randomised(nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 4)), seed=0)
    group = ChannelGroup("0", SIDE, (Member("1.weight", 1, "in", tuple(range(SIDE)), tuple(range(SIDE))),))
    x = image(0)[:, 0]
    values = (torch.arange(SIDE) % 3 > 0).double().requires_grad_(True)
    out = Gated(network, (group,))(x, values)
    with torch.no_grad():
        read = torch.nn.functional.linear(x, network[0].weight, network[0].bias)  # [n, t, c]
        weight = network[1].weight
        assert torch.allclose(out, (read * values) @ weight.T + network[1].bias, rtol=SAME_IN_FLOAT64)
    out.sum().backward()
    assert values.grad is not None
    expected = (read * weight.sum(0)).sum((0, 1)).detach()
    assert float((values.grad - expected).abs().max() / expected.abs().max()) <= CLOSED_FORM_FLOAT64


@pytest.mark.parametrize(("parts", "transposed"), [(2, False), (3, False), (2, True)])
def test_at_a_grouped_convolution_every_part_reads_the_same_positions(parts, transposed):
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(12, 6, 1, groups=parts)
    network = randomised(nn.Sequential(nn.Conv2d(3, 12, 1), nn.SiLU(), conv, nn.SiLU(), Head(6)), seed=0)
    group = find_groups(network, example_input(SIDE)).groups[0]
    assert (group.root, group.width) == ("0", 12 // parts)
    read: list[Tensor] = []
    gated = Gated(network, (group,))
    conv.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    values = row((group,))
    values[1] = 0
    gated(image(0), values)
    dead = [c for c in range(12) if not bool(read[0][:, c].any())]
    assert dead == [1 + part * 12 // parts for part in range(parts)]


def test_depthwise_convolutions_pass_and_are_no_readers():
    """Their gate stands further on, where what they made of a constant is gone too."""
    conv = nn.Conv2d(8, 8, 3, groups=8)
    network = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), conv, nn.Sigmoid(), Head(8)), seed=0)
    (group,) = find_groups(network, example_input(SIDE)).groups[:1]
    gated = Gated(network, (group,))
    assert not conv._forward_pre_hooks and len(network[4].linear._forward_pre_hooks) == 1
    assert torch.equal(gated(image(0), row((group,)) * 0)[0], network[4].linear.bias)


def test_inputs_that_belong_to_no_group_pass():
    network = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), Head(5)), seed=0)
    groups = find_groups(network, example_input(SIDE)).groups[:2]
    expected = network(image(0)).detach()
    one = Gated(network, groups[:1])
    assert torch.equal(one(image(0), row(groups[:1])).detach(), expected)
    assert not torch.equal(one(image(0), row(groups[:1]) * 0).detach(), expected)


def test_the_mask_gradient_is_summed_in_float32_when_the_map_is_bfloat16():
    network = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1, bias=False)).to(torch.bfloat16).requires_grad_(False)
    nn.init.ones_(network[1].weight)  # type: ignore[arg-type]
    gated = Gated(network, (ChannelGroup("0", 1, (Member("1.weight", 1, "in", (0,), (0,)),)),))
    values = torch.ones(1, requires_grad=True)
    gated(torch.ones(1, 1, 1, 257, dtype=torch.bfloat16), values).sum(dtype=torch.float32).backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    assert values.grad.item() == 257  # bfloat16 has 256 and 258


def test_the_row_is_forgotten_after_the_forward_even_when_it_fails():
    network, groups = chain()
    gated = Gated(network, groups)
    gated(image(0), row(groups))
    with pytest.raises(AssertionError, match="called through Gated"):
        network(image(0))
    with pytest.raises(RuntimeError):
        gated(image(0)[:, :2], row(groups))
    assert gated._values is None


def test_a_gated_network_has_the_state_of_its_backbone():
    network, groups = chain()
    assert {name.removeprefix("backbone.") for name in Gated(network, groups).state_dict()} == set(network.state_dict())
