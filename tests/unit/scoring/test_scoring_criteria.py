"""One-shot criteria against closed forms, derivatives taken by other means, and other people's code."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch_pruning as tp
from tolerances import CLOSED_FORM_FLOAT32
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

from vpdeploy.scoring.criteria.fisher import fisher
from vpdeploy.scoring.criteria.grasp import TEMPERATURE, grasp
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.criteria.model import Model
from vpdeploy.scoring.criteria.norm_scale import norm_scale
from vpdeploy.scoring.criteria.random import random
from vpdeploy.scoring.criteria.snip import snip
from vpdeploy.scoring.criteria.synflow import synflow
from vpdeploy.scoring.criteria.taylor import taylor
from vpdeploy.surgery.gates import Gated
from vpdeploy.values import ChannelGroup, Member

INNER = (0, 1, 2, 3)
GROUP = ChannelGroup("0", 4, (Member("0.weight", 0, "out", INNER, INNER), Member("2.weight", 1, "in", INNER, INNER)))


def small() -> nn.Sequential:
    """3 -> 4 -> 2, without biases; float64, so that derivatives of second order can be compared."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return network.requires_grad_(False)


def walk(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.arange(5) % 2) for _ in range(batches)]


def model(network: nn.Module, *, gates: Tensor | None = None) -> Model:
    return Model(Gated(copy.deepcopy(network), (GROUP,)), torch.ones(4) if gates is None else gates)


def loss(flat: Tensor, batches: list[tuple[Tensor, Tensor]], *, temperature: float = 1.0) -> Tensor:
    """The sum of the mean losses of ``batches``, of both weights in one row, without the network's own code."""
    first, second = flat[:12].view(4, 3), flat[12:].view(2, 4)
    parts = [F.cross_entropy((x @ first.T).tanh() @ second.T / temperature, y) for x, y in batches]
    return torch.stack(parts).sum()


def flat_weights(network: nn.Sequential) -> Tensor:
    return torch.cat([network[0].weight.flatten(), network[2].weight.flatten()])


def by_channel(entries: Tensor) -> Tensor:
    """Of one row of entries: those of the channel's row of the first weight and column of the second."""
    return entries[:12].view(4, 3).sum(dim=1) + entries[12:].view(2, 4).sum(dim=0)


def test_snip_is_weight_times_gradient_summed():
    network, batches = small(), walk()
    flat = flat_weights(network).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(flat, batches), flat)
    found = snip(model(network), (GROUP,), batches)
    assert torch.allclose(found["0"], by_channel((flat * gradient).abs()).detach(), rtol=1e-12)


def test_grasp_is_weight_times_hessian_times_gradient():
    network, batches = small(), walk()
    flat = flat_weights(network).requires_grad_(True)
    tempered = lambda row: loss(row, batches, temperature=TEMPERATURE)  # noqa: E731
    (gradient,) = torch.autograd.grad(tempered(flat), flat)
    matrix = hessian(tempered, flat.detach())
    assert isinstance(matrix, Tensor)
    found = grasp(model(network), (GROUP,), batches)
    assert torch.allclose(found["0"], by_channel(flat.detach() * (matrix @ gradient)), rtol=1e-9)
    assert float(found["0"].min()) < 0 < float(found["0"].max())


def test_grasp_keeps_what_the_gradients_norm_needs():
    """To first order: the squared norm of the gradient, less a small part of a channel's weights."""
    network, batches = small(), walk()
    found = grasp(model(network), (GROUP,), batches)["0"]

    def squared_norm(share: Tensor) -> Tensor:
        first, second = network[0].weight * share[:, None], network[2].weight * share
        flat = torch.cat([first.flatten(), second.flatten()])
        (gradient,) = torch.autograd.grad(
            loss(flat.requires_grad_(True), batches, temperature=TEMPERATURE), flat, create_graph=True
        )
        return gradient.square().sum()

    share = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(squared_norm(share), share)
    assert torch.allclose(2 * found, slope, rtol=1e-9)


def test_synflow_is_what_flows_through_a_channel():
    """Of two linear layers in a row: twice the product of what leads in and what leads out."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)).requires_grad_(False)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2, 3], [0, 0, 0], [-1, -1, -1], [4, 0, 0]]))
        network[0].bias.copy_(torch.tensor([-1.0, 2, 0, 0]))
        network[2].weight.copy_(torch.tensor([[1.0, 1, -5, 0], [-2, 1, 0, 0]]))
    found = synflow(model(network), (GROUP,), [(torch.zeros(7, 3), torch.zeros(7))])
    # in: |w| and for the second weight |b| beside them; out: |w|
    into, out, biases = [6.0, 0, 3, 4], [3.0, 2, 5, 0], [1.0, 2, 0, 0]
    assert found["0"].tolist() == [i * o + (i + b) * o for i, o, b in zip(into, out, biases, strict=True)]
    assert found["0"].dtype == torch.float64
    assert bool((network[0].weight < 0).any())  # the network itself keeps its signs


def test_taylor_is_the_mean_square_of_gate_gradients():
    network, batches = small(), walk(3)
    squares = torch.zeros(4, dtype=torch.float64)
    for x, labels in batches:
        factor = torch.ones(4, dtype=torch.float64, requires_grad=True)
        of_batch = F.cross_entropy(((x @ network[0].weight.T).tanh() * factor) @ network[2].weight.T, labels)
        squares += torch.autograd.grad(of_batch, factor)[0].square() / 3
    found = taylor(model(network), (GROUP,), batches)
    assert torch.allclose(found["0"], squares, rtol=1e-5)  # gates are float32


def test_fisher_is_the_curvature_of_the_divergence_from_the_networks_own_answers():
    """True labels play no part. 20,000 draws: the mean of squares is known to about 2 %."""
    network, images = small(), walk(1)[0][0]

    def diverged(gates: Tensor) -> Tensor:
        answers, own = ((hidden * g) @ network[2].weight.T for g in (gates, torch.ones(4, dtype=torch.float64)))
        return F.kl_div(answers.log_softmax(1), own.softmax(1), reduction="sum") / len(images)

    hidden = (images @ network[0].weight.T).tanh()
    curvature = hessian(diverged, torch.ones(4, dtype=torch.float64))
    assert isinstance(curvature, Tensor)
    batches = [(images[i : i + 1], torch.full((1,), label)) for i in range(5) for label in (0, 1) for _ in range(2000)]
    found = fisher(model(network), (GROUP,), batches)["0"]
    assert torch.allclose(found, curvature.diagonal(), rtol=0.1)
    squares = taylor(model(network), (GROUP,), batches)["0"]
    assert not torch.allclose(squares, curvature.diagonal(), rtol=0.3)


@pytest.mark.parametrize("criterion", [snip, taylor, synflow, grasp])
def test_channels_behind_a_closed_gate_weigh_nothing_more(criterion):
    """Of iterative pruning: the derivative by weights that nothing reads is 0. Taylor's gate can still be felt."""
    network, gates = small(), torch.tensor([1.0, 0, 1, 1])
    found = criterion(model(network, gates=gates), (GROUP,), walk())["0"]
    whole = criterion(model(network), (GROUP,), walk())["0"]
    assert not torch.allclose(found, whole)
    assert (found[1] == 0) == (criterion is not taylor) and bool((found[[0, 2, 3]] != 0).all())


@pytest.mark.parametrize("criterion", [snip, grasp, synflow, taylor, fisher])
def test_the_network_is_unchanged_and_walks_can_be_repeated(criterion):
    network = tiny.network()
    groups = tiny.groups_of(network).prunable
    asked = Model(Gated(network.requires_grad_(False), groups), torch.ones(18))
    x = torch.rand(4, 3, tiny.CANVAS, tiny.CANVAS, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.tensor([0, 1, 2, 0]))]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = criterion(asked, groups, batches)
    again = criterion(asked, groups, batches)
    assert {root: tuple(scores.shape) for root, scores in first.items()} == {"conv1": (8,), "conv2": (10,)}
    assert all(torch.equal(first[root], again[root]) and not scores.requires_grad for root, scores in first.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())


# --- what only the weights tell ---------------------------------------------------------------------------------------


def varied() -> nn.Module:
    """The tiny network with norm scales that differ, of either sign."""
    network = tiny.network()
    with torch.no_grad():
        for norm in ("norm1", "norm2"):
            scale = network.get_submodule(norm).get_parameter("weight")
            scale.copy_(torch.linspace(-1, 2, len(scale)))
    return network


def theirs(network: nn.Module, importance: tp.importance.Importance) -> dict[str, Tensor]:
    """What Torch-Pruning says of both groups."""
    example = torch.rand(2, 3, tiny.CANVAS, tiny.CANVAS)
    graph = tp.DependencyGraph().build_dependency(network, example_inputs=example)
    found = {}
    for root, width in (("conv1", 8), ("conv2", 10)):
        group = graph.get_pruning_group(network.get_submodule(root), tp.prune_conv_out_channels, list(range(width)))
        found[root] = importance(group)
    return found


def test_the_group_norm_is_that_of_depgraphs_authors():
    network = varied()
    ours = magnitude(network, tiny.groups_of(network).prunable, norm="group")
    for root, scores in theirs(network, tp.importance.GroupMagnitudeImportance(p=2)).items():
        assert torch.allclose(ours[root], scores, rtol=CLOSED_FORM_FLOAT32)


def test_norm_scales_are_those_of_torch_prunings_slimming():
    network = varied()
    ours = norm_scale(network, tiny.groups_of(network).prunable)
    for root, scores in theirs(network, tp.importance.BNScaleImportance()).items():
        assert torch.allclose(ours[root], scores, rtol=CLOSED_FORM_FLOAT32)


def test_norm_scales_by_hand():
    group = ChannelGroup("a", 2, tuple(Member(f"{i}.weight", 0, "both", (0, 1), (0, 1)) for i in (0, 1)))
    network = nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Linear(2, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([-3.0, 1]))
        network[1].weight.copy_(torch.tensor([1.0, 1]))
    assert norm_scale(network, (group,))["a"].tolist() == pytest.approx([4 / 3, 2 / 3])
    assert norm_scale(nn.Sequential(), (group,))["a"].tolist() == [1, 1]


@pytest.mark.parametrize(("norm", "power"), [("l1", 1.0), ("l2", 2.0)])
def test_norms_of_all_a_groups_weights(norm, power):
    network = small().float()
    parts = torch.cat([network[0].weight, network[2].weight.T], dim=1)
    expected = parts.abs().pow(power).sum(dim=1).pow(1 / power)
    found = magnitude(network, (GROUP,), norm=norm)["0"]
    assert torch.allclose(found, expected / expected.mean(), rtol=CLOSED_FORM_FLOAT32)


def test_random_scores_are_uniform_and_their_generators():
    units = {"a": (2000,), "b": (30, 100)}
    draw = lambda seed: random(units, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(0)["b"].shape == (30, 100)
    row, same, other = (torch.cat([part.flatten() for part in draw(seed).values()]) for seed in (0, 0, 1))
    assert torch.equal(row, same) and not torch.equal(row, other)
    # Of 5000 draws, counts in tenths are 500 with a deviation of 21: five of these.
    assert bool(((torch.histc(row, 10, 0, 1) - 500).abs() < 106).all())
