"""Law 8: a gate's gradient is its closed form, for masked channels too, and the scores get it unchanged."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Head, image, masks, randomised
from tolerances import CLOSED_FORM_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.training.methods.learned import search_step
from vpdeploy.training.network import Prompted, build_canvas
from vpdeploy.values import ChannelGroup, ChannelMask

CHANNELS, SIDE = 6, 5
READERS = {
    "conv": lambda: nn.Conv2d(CHANNELS, 4, 3, padding=1),
    "strided, without bias": lambda: nn.Conv2d(CHANNELS, 4, 3, stride=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def gated_one(reader: nn.Module) -> tuple[nn.Module, Gated, tuple[ChannelGroup, ...]]:
    """A writer, an activation, and the one ``reader`` at which the gate stands: without gates, and with."""
    network = randomised(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.SiLU(), reader), seed=1)
    groups = tuple(g for g in find_groups(network, example_input(SIDE)).groups if g.root == "0")
    return network, Gated(copy.deepcopy(network), groups), groups


@pytest.mark.parametrize("reader", READERS)
@given(data=st.data())
def test_the_gradient_is_the_sum_of_gradient_times_input(reader, data):
    network, gated, groups = gated_one(READERS[reader]())
    values = mask_row(groups, data.draw(masks(groups)), dtype=torch.float64).requires_grad_(True)
    x = image(data.draw(st.integers(0, 99)), side=SIDE)
    out = gated(x, values)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)  # dL/d(out)
    (got,) = torch.autograd.grad((out * weights).sum(), values)

    given_x = network[1](network[0](x)).detach()  # [n, c, h, w] what the gate multiplies
    read = (given_x * values.detach()[:, None, None]).requires_grad_(True)
    (grad,) = torch.autograd.grad((network[2](read) * weights).sum(), read)
    assert relative(got, (grad * given_x).sum((0, 2, 3))) <= CLOSED_FORM_FLOAT64


@given(data=st.data())
def test_a_masked_channel_has_the_gradient_that_bringing_it_back_would_gain(data):
    """One convolution is linear in its gates: the slope of channel c is L(c on) - L(c off), wherever c stands now."""
    _, gated, groups = gated_one(READERS["conv"]())
    x, mask = image(0, side=SIDE), data.draw(masks(groups))
    values = mask_row(groups, mask, dtype=torch.float64).requires_grad_(True)
    (got,) = torch.autograd.grad(gated(x, values).sum(), values)
    for c in range(CHANNELS):
        on, off = values.detach().clone(), values.detach().clone()
        on[c], off[c] = 1, 0
        with torch.no_grad():
            slope, terms = gated(x, on).sum() - gated(x, off).sum(), gated(x, on).abs().sum()
        # a difference of two sums: each rounds relative to its terms, not to what is left
        assert float((got[c] - slope).abs()) <= CLOSED_FORM_FLOAT64 * float(terms)


@given(data=st.data())
def test_at_a_linear_reader_every_input_of_a_channel_counts(data):
    network = randomised(nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.Flatten(), nn.Linear(CHANNELS * 4, 3)), seed=2)
    groups = tuple(g for g in find_groups(network, example_input(2)).groups if g.root == "0")
    gated = Gated(network, groups)
    values = mask_row(groups, data.draw(masks(groups)), dtype=torch.float64).requires_grad_(True)
    x = image(1, side=2)
    (got,) = torch.autograd.grad(gated(x, values).sum(), values)
    column_sums = network[2].weight.sum(0).view(CHANNELS, 2, 2)  # dL/d(input) of a sum of outputs
    expected = (network[0](x) * column_sums).sum((0, 2, 3)).detach()
    assert relative(got, expected) <= CLOSED_FORM_FLOAT64


def test_gates_of_one_group_add_up():
    """Two readers of one stream: the mask is one, so the gradient is the sum over both."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(CHANNELS, 4, 3)
            self.head = Head(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.a(x)[:, :, 1:-1, 1:-1] + self.b(x))

    network = randomised(Fork(), seed=3)
    groups = tuple(g for g in find_groups(network, example_input(SIDE)).groups if g.root == "stem")
    x, values = image(2, side=SIDE), torch.ones(CHANNELS, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(Gated(network, groups)(x, values).sum(), values)
    stream, a, b = network.stem(x).detach(), network.a.weight, network.b.weight
    mean = network.head.linear.weight.sum(0) / (SIDE - 2) ** 2  # [4] dL/d(channel) at every place of the map
    grad = F.pad(torch.einsum("o,ocij->cij", mean, a).expand(-1, SIDE - 2, SIDE - 2), (1, 1, 1, 1))[None]
    ones = mean.view(1, -1, 1, 1).expand(1, -1, SIDE - 2, SIDE - 2)
    grad = grad + F.conv_transpose2d(ones, b)
    assert relative(got, (grad * stream).sum((0, 2, 3)).detach()) <= CLOSED_FORM_FLOAT64


# --- straight through -----------------------------------------------------------------------------------------------


@given(mask=st.lists(st.booleans(), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_straight_through_is_the_mask_forward_and_the_identity_backward(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(mask), generator=generator, dtype=torch.float64).requires_grad_(True)
    gates = StraightThrough.apply(scores, torch.tensor(mask))
    assert gates.tolist() == [float(m) for m in mask]
    grad = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    (got,) = torch.autograd.grad(gates, scores, grad)
    assert torch.equal(got, grad)


def test_a_search_step_gives_the_scores_the_gates_gradient_unchanged():
    settled = tiny.recipe()
    task = tiny.task(tiny.network(), settled)
    backbone = task.dense.backbone.requires_grad_(False)
    canvas = build_canvas(settled, prompted=True)
    network = Prompted(canvas, Gated(backbone, task.groups), tiny.COMPUTE, label_map=None).eval()
    scores = torch.randn(sum(g.width for g in task.groups), generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = torch.rand(4, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0])
    (got,) = torch.autograd.grad(search_step(network, scores, task.selector, images, labels), scores)
    mask = hard_mask(task.selector, scores)
    assert 0 < int(mask.sum()) < len(mask)
    gates = mask.float().requires_grad_(True)
    (expected,) = torch.autograd.grad(F.cross_entropy(network(images, gates), labels), gates)
    assert torch.equal(got, expected)
    assert bool((got[~mask] != 0).any())  # or no removed channel could come back


def test_one_mask_serves_the_whole_row():
    groups = (ChannelGroup("a", 3, ()), ChannelGroup("b", 2, ()))
    mask = ChannelMask({"b": (False, True)})
    assert mask_row(groups, mask, dtype=torch.float32).tolist() == [1, 1, 1, 0, 1]
