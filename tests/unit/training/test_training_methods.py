"""Search methods that train or change weights: what they add to the loss, what they leave, and what they leave alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch_pruning as tp
from tolerances import CLOSED_FORM_FLOAT32
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.recipe.tables import METHOD_KEYS, Recipe
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.criteria.norm_scale import norm_scale
from vpdeploy.scoring.rounds import eased
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.straight_through import hard_mask
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.gates import Gated, mask_of
from vpdeploy.surgery.plan import plan
from vpdeploy.training import loop
from vpdeploy.training.loop import training_batches
from vpdeploy.training.methods import bilevel, rewound
from vpdeploy.training.methods.criteria import _balanced, importance
from vpdeploy.training.methods.learned import search_step
from vpdeploy.training.methods.registry import METHODS, search
from vpdeploy.training.methods.sparse import GROWTH, GroupPenalty, ScalePenalty
from vpdeploy.training.methods.task import schedule_of, with_tensors
from vpdeploy.training.network import Prompted, build_canvas
from vpdeploy.training.weights import train_weights
from vpdeploy.values import ChannelGroup, Found, Member

TRAINING = ("slim", "group_sl", "bip", "iterative")
REWOUND = ("omp", "lth")
ONCE = ("random", "magnitude", "taylor", "fisher", "snip", "grasp", "synflow")


def recipe(**values: Any) -> Recipe:
    """Keys with their dots written as two underscores."""
    return tiny.recipe({key.replace("__", "."): value for key, value in values.items()})


def searched(folder: Path, settled: Recipe, *, prompted: bool = True, network: nn.Module | None = None) -> Found:
    task = tiny.task(network or tiny.network(dropout=0.1), settled, prompted=prompted)
    return search(
        task, tiny.data(), recipe=settled, compute=tiny.COMPUTE, journal=tiny.journal(folder), display=tiny.QUIET
    )


def settled_for(method: str, **values: Any) -> Recipe:
    values = {"search__rounds": 2, **values} if method in ("lth", "iterative") else values
    return recipe(search__method=method, **values)


def test_every_method_of_a_recipe_is_there():
    assert set(METHODS) == set(METHOD_KEYS) == {"vpns", "hydra", *ONCE, *TRAINING, *REWOUND}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompted", [True, False])
def test_a_method_gives_scores_and_leaves_the_dense_network_alone(tmp_path, method, prompted):
    settled, network = settled_for(method), tiny.network(dropout=0.1)
    before = tiny.snapshot(network)
    found = searched(tmp_path / "first", settled, prompted=prompted, network=network)
    assert tiny.snapshot(network) == before
    assert {root: (scores.shape, scores.dtype) for root, scores in found.scores.items()} == {
        "conv1": ((8,), torch.float32), "conv2": ((10,), torch.float32),
    }  # fmt: skip
    assert all(bool(scores.isfinite().all()) for scores in found.scores.values())
    learns = prompted and method != "hydra"
    assert bool(found.prompt) == learns
    assert not learns or all(bool(value.any()) for value in found.prompt.values())
    again = searched(tmp_path / "second", settled, prompted=prompted, network=network)
    assert all(torch.equal(again.scores[root], scores) for root, scores in found.scores.items())
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in found.tensors.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_changes(tmp_path, method):
    """Weights where it trains them; norm statistics where images pass in training; nothing where it goes back."""
    network = tiny.network()
    found = searched(tmp_path, settled_for(method), prompted=False, network=network)
    parameters = {name for name, _ in network.named_parameters()}
    statistics = {name for name, _ in network.named_buffers()}
    if method in TRAINING:
        # A bias in front of a norm has no gradient but roundings.
        assert {*found.tensors, "conv2.bias"} == parameters | statistics
    else:
        assert set(found.tensors) == (statistics if method in ("vpns", "hydra") else set())
    task = tiny.task(network, settled_for(method))
    state = with_tensors(task.dense, found).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in found.tensors.items())


@pytest.mark.parametrize("method", ONCE)
def test_a_prompt_learns_under_the_fixed_mask(tmp_path, method):
    """Its scores are those without a prompt: what learns is the prompt, and nothing else."""
    network = tiny.network()
    with_prompt = searched(tmp_path / "with", settled_for(method), network=network)
    without = searched(tmp_path / "without", settled_for(method), prompted=False, network=network)
    assert all(torch.equal(with_prompt.scores[root], scores) for root, scores in without.scores.items())
    assert with_prompt.prompt and not without.prompt
    assert all("norm" in name and name.split(".")[1] not in ("weight", "bias") for name in with_prompt.tensors)


def test_hydra_is_vpns_without_a_prompt(tmp_path):
    hydra = searched(tmp_path / "hydra", recipe(search__method="hydra"))
    vpns = searched(tmp_path / "vpns", recipe(search__method="vpns"), prompted=False)
    assert all(torch.equal(hydra.scores[root], scores) for root, scores in vpns.scores.items())


# --- sparse learning --------------------------------------------------------------------------------------------------


def trained(network: nn.Module) -> nn.Module:
    """With a gradient at every parameter."""
    x = torch.rand(6, 3, tiny.CANVAS, tiny.CANVAS, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(network(x), torch.arange(6) % 3).backward()
    return network


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_slims_penalty_is_the_sign_of_every_norm_scale():
    network = trained(tiny.network())
    with torch.no_grad():
        network.get_submodule("norm1").get_parameter("weight")[:3] = torch.tensor([-2.0, 0, 5])
    before = gradients(network)
    ScalePenalty(network, 0.25)()
    for name, gradient in gradients(network).items():
        moved = gradient - before[name]
        if name == "norm1.weight":
            assert torch.allclose(moved, torch.tensor([-0.25, 0, *[0.25] * 6]), rtol=CLOSED_FORM_FLOAT32)
        elif name == "norm2.weight":
            assert torch.allclose(moved, torch.full((10,), 0.25), rtol=CLOSED_FORM_FLOAT32)
        else:
            assert not bool(moved.any())


def test_the_group_penalty_is_that_of_depgraphs_authors():
    """The gradients that Torch-Pruning's own pruner leaves."""
    ours, theirs = trained(tiny.network()), trained(tiny.network())
    GroupPenalty(ours, tiny.groups_of(ours).prunable, 0.01)()
    example = torch.rand(2, 3, tiny.CANVAS, tiny.CANVAS)
    pruner = tp.pruner.GroupNormPruner(
        theirs, example, importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer="max"), reg=0.01,
        ignored_layers=[theirs.get_submodule("linear")], num_heads={}, in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.regularize(theirs)
    expected = gradients(theirs)
    plain = gradients(trained(tiny.network()))
    for name, gradient in gradients(ours).items():
        assert torch.allclose(gradient, expected[name], rtol=CLOSED_FORM_FLOAT32, atol=1e-7), name
        assert torch.equal(gradient, plain[name]) == (name.endswith("bias")), name


def test_the_weakest_channel_is_pulled_hardest():
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Identity(), nn.Linear(4, 2, bias=False))
    inner = (0, 1, 2, 3)
    group = ChannelGroup(
        "0", 4, (Member("0.weight", 0, "out", inner, inner), Member("2.weight", 1, "in", inner, inner))
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 0, 0], [1, 0, 0], [2, 0, 0], [1, 0, 0]]))
        network[2].weight.copy_(torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0]]))  # sizes 5, 1, 2, 1
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    GroupPenalty(network, (group,), 0.5)()
    assert network[0].weight.grad is not None and network[2].weight.grad is not None
    factors = [1, GROWTH, GROWTH**0.75, GROWTH]
    assert network[0].weight.grad[:, 0].tolist() == pytest.approx(
        [0.5 * 3, 0.5 * factors[1], factors[2], 0.5 * factors[3]]
    )
    assert network[2].weight.grad[0].tolist() == [0.5 * 4, 0, 0, 0]


def test_equal_channels_are_pulled_alike():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4, 3))
    group = ChannelGroup("0", 2, (Member("0.weight", 0, "out", (0, 1), (0, 1)),))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    network[0].weight.grad = torch.zeros_like(network[0].weight)
    GroupPenalty(network, (group,), 0.5)()
    assert network[0].weight.grad.flatten().tolist() == [0.5] * 6


@pytest.mark.parametrize(("method", "strength"), [("slim", 0.1), ("group_sl", 0.02)])
def test_the_penalty_shrinks_and_scores_are_read_off_what_is_left(tmp_path, method, strength):
    network = tiny.network()
    settled = recipe(search__method=method, search__strength=strength, search__epochs=3)
    weak = recipe(search__method=method, search__strength=1e-9, search__epochs=3)
    task = tiny.task(network, settled, prompted=False)
    sizes = []
    for name, given in (("strong", settled), ("weak", weak)):
        found = searched(tmp_path / name, given, prompted=False, network=network)
        after = with_tensors(task.dense, found)
        expected = norm_scale(after, task.groups) if method == "slim" else magnitude(after, task.groups, norm="group")
        assert all(torch.equal(found.scores[root], scores) for root, scores in expected.items())
        scales = [after.get_submodule(norm).get_parameter("weight") for norm in ("norm1", "norm2")]
        sizes.append(float(torch.cat(scales).detach().abs().sum()))
    assert sizes[0] < 0.99 * sizes[1]


# --- lottery tickets --------------------------------------------------------------------------------------------------


def test_omp_scores_a_trained_copy(tmp_path):
    settled, network = recipe(search__method="omp"), tiny.network()
    found = searched(tmp_path / "omp", settled, prompted=False, network=network)
    task = tiny.task(network, settled)
    copied = Prompted(build_canvas(settled, prompted=False), copy.deepcopy(network), tiny.COMPUTE)
    schedule = schedule_of(settled, weight_decay=1e-4)
    train_weights(copied, tiny.data(), schedule=schedule, journal=tiny.journal(tmp_path / "plain"), display=tiny.QUIET)
    expected = magnitude(copied.backbone, task.groups)
    for root, scores in expected.items():
        assert torch.allclose(found.scores[root], scores, rtol=1e-4)  # open gates add roundings


def test_a_ticket_is_drawn_in_rounds(tmp_path, monkeypatch):
    """Two rounds: what the first removed is masked while the second trains, which starts from the dense weights again."""
    settled, network = recipe(search__method="lth", search__rounds=2, search__epochs=3), tiny.network()
    seen: list[tuple[int, Tensor, Tensor]] = []

    def watched(copied: Prompted, *args: Any, schedule: Any, gates: tuple[Tensor, ...], **values: Any) -> Prompted:
        assert isinstance(copied.backbone, Gated)
        start = copied.backbone.backbone.get_submodule("conv1").get_parameter("weight").detach().clone()
        seen.append((schedule.epochs, gates[0], start))
        return train_weights(copied, *args, schedule=schedule, gates=gates, **values)

    monkeypatch.setattr(rewound, "train_weights", watched)
    found = searched(tmp_path, settled, prompted=False, network=network)
    (epochs, first, start), (later, second, again) = seen
    assert (epochs, later) == (2, 1) and bool(first.all()) and not bool(second.all())
    assert torch.equal(start, network.get_submodule("conv1").get_parameter("weight")) and torch.equal(start, again)
    row = torch.cat([found.scores["conv1"], found.scores["conv2"]])
    kept = hard_mask(tiny.task(network, settled).selector, row)
    assert bool((second.bool() | ~kept).all())  # what the first round removed is not in the end
    assert len(found.tensors) == 0


@pytest.mark.parametrize("method, rounds", [("lth", 2), ("iterative", 3)])
def test_a_search_cut_off_in_its_second_part_ends_the_same(tmp_path, monkeypatch, method, rounds):
    settled = recipe(search__method=method, search__rounds=rounds, search__epochs=4)
    expected = searched(tmp_path / "whole", settled)

    taken, original = [0], loop.to_pixels

    class PowerCut(BaseException):
        pass

    def counted(*args: Any) -> Tensor:
        taken[0] += 1
        if taken[0] == 4 * 3 + 2:  # 28 images in batches of 8; in the second epoch of the second round
            raise PowerCut
        return original(*args)

    monkeypatch.setattr(loop, "to_pixels", counted)
    with pytest.raises(PowerCut):
        searched(tmp_path / "cut", settled)
    taken[0] = 100
    found = searched(tmp_path / "cut", settled)
    assert taken[0] == 104  # one epoch was left
    assert all(torch.equal(found.scores[root], scores) for root, scores in expected.scores.items())
    assert all(torch.equal(found.prompt[name], value) for name, value in expected.prompt.items())


# --- iterative --------------------------------------------------------------------------------------------------------


def test_weights_train_between_rounds_under_what_is_left(tmp_path):
    """Step by step, by hand: plain SGD on the masked network, and the criterion before and after."""
    settled = recipe(
        search__method="iterative", search__rounds=2, search__epochs=1, search__weight_lr=0.05, search__per_cost=False
    )
    network = tiny.network()
    found = searched(tmp_path, settled, prompted=False, network=network)
    task, data = tiny.task(network, settled), tiny.data()
    assert isinstance(task.selector, Selector)
    copied = copy.deepcopy(network)
    gated = Prompted(build_canvas(settled, prompted=False), Gated(copied, task.groups), tiny.COMPUTE)

    def scored(gates: Tensor, turn: int) -> Tensor:
        scores = importance("taylor", gated, task, data.train, recipe=settled, gates=gates, turn=turn)
        return torch.cat([scores["conv1"], scores["conv2"]])

    gates = hard_mask(eased(task.selector, 0.5), scored(torch.ones(18), 0)).float()
    assert not bool(gates.all())
    decayed = [p for p in copied.parameters() if p.ndim > 1]
    plain = [p for p in copied.parameters() if p.ndim <= 1]
    by_hand = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": plain}], lr=settled.search.weight_lr, momentum=0.9
    )
    gated.train()
    walk = training_batches(data.train, 8, seed=settled.seed, stage="search", epoch=0, how=settled.data.augment)
    for pixels, labels, _ in walk:
        by_hand.zero_grad()
        F.cross_entropy(gated(pixels / 255, gates), labels).backward()
        by_hand.step()
    gated.eval()
    trained, cuts = with_tensors(task.dense, found), plan(network, task.groups, mask_of(task.groups, gates))
    left, expected = (cut(whole, cuts).state_dict() for whole in (trained, copied))
    for name, tensor in expected.items():
        torch.testing.assert_close(left[name], tensor, rtol=1e-4, atol=1e-6)
    # What went is as it was then.
    gone, before, after = gates[:8] == 0, network.state_dict(), trained.state_dict()
    assert torch.equal(after["conv1.weight"][gone], before["conv1.weight"][gone])
    assert torch.equal(after["conv2.weight"][:, gone], before["conv2.weight"][:, gone])
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
    row = torch.cat([found.scores["conv1"], found.scores["conv2"]])
    last = torch.where(gates > 0, scored(gates, 1), -1.0)
    assert torch.equal(row.argsort(stable=True), last.argsort(stable=True))
    assert not bool((hard_mask(task.selector, row) & ~gates.bool()).any())  # what is gone stays gone


def test_its_parts_share_the_epochs_and_their_record_goes_on(tmp_path):
    settled = recipe(search__method="iterative", search__rounds=4, search__epochs=5)
    searched(tmp_path, settled)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["epochs"]) for line in lines] == [(epoch, 5) for epoch in range(1, 6)]
    taken = [schedule_of(settled, weight_decay=0.0, part=part, parts=3) for part in range(3)]
    assert [(one.epochs, one.earlier) for one in taken] == [(2, 0), (2, 2), (1, 4)]


# --- bi-level ---------------------------------------------------------------------------------------------------------


def learner(settled: Recipe, network: nn.Module) -> Any:
    task = tiny.task(network, settled)
    gated = Gated(copy.deepcopy(network), task.groups)
    prompted = Prompted(build_canvas(settled, prompted=True), gated, tiny.COMPUTE).eval()
    scores = torch.rand(18, generator=torch.Generator().manual_seed(4))
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    readers = bilevel.Readers.of(task, prompted)
    return bilevel._Learner(prompted, scores, nothing, nothing, readers, task.selector, settled)


def batch() -> tuple[Tensor, Tensor]:
    images = torch.rand(6, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(2))
    return images, torch.arange(6) % 3


def test_without_an_answer_a_scores_gradient_is_the_gates(tmp_path):
    """strength -> 0: the weights do not answer, and what is left is straight through."""
    settled, network = recipe(search__method="bip", search__strength=1e-30), tiny.network()
    made = learner(settled, network)
    images, labels = batch()
    loss = made.upper_loss(images, labels)
    plain = made.scores.clone().requires_grad_(True)
    straight = search_step(made.network, plain, made.selector, images, labels)
    (expected,) = torch.autograd.grad(straight, plain)
    assert torch.allclose(loss, straight.detach(), rtol=CLOSED_FORM_FLOAT32)
    assert torch.allclose(made.scores.grad, expected, rtol=1e-4, atol=1e-7)
    by_prompt = list(made.network.canvas.prompt.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in by_prompt)


def test_the_answer_is_the_square_of_the_gradient_by_masked_weights(tmp_path):
    network, images_labels = tiny.network(), batch()
    plain, answered = (
        learner(recipe(search__method="bip", search__strength=strength), network) for strength in (1e-30, 0.5)
    )
    for made in (plain, answered):
        made.upper_loss(*images_labels)
    images, labels = images_labels
    mask = hard_mask(plain.selector, plain.scores).float()
    z1 = (network.get_submodule("conv2").get_parameter("weight").detach() * mask[:8].view(1, -1, 1, 1)).requires_grad_()
    z2 = (network.get_submodule("linear").get_parameter("weight").detach() * mask[8:]).requires_grad_()
    canvas = plain.network.canvas
    masked = torch.func.functional_call(network, {"conv2.weight": z1, "linear.weight": z2}, (canvas(images).detach(),))
    g1, g2 = torch.autograd.grad(F.cross_entropy(masked, labels), (z1, z2))
    squares = torch.cat([g1.square().sum(dim=(0, 2, 3)), g2.square().sum(dim=0)])
    assert torch.allclose(plain.scores.grad - answered.scores.grad, 0.5 * squares, rtol=1e-3, atol=1e-6)


def test_weights_learn_under_the_mask_and_from_other_images_than_scores(tmp_path, monkeypatch):
    seen: list[tuple[str, int]] = []
    upper = bilevel._Learner.upper_loss
    monkeypatch.setattr(
        bilevel._Learner, "upper_loss", lambda self, x, y: seen.append(("upper", len(x))) or upper(self, x, y)
    )
    searched(tmp_path, recipe(search__method="bip", search__epochs=1))
    assert seen == [("upper", 4)] * 3 + [("upper", 2)]


# --- the images that criteria look at ---------------------------------------------------------------------------------


def test_as_many_of_every_class():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 2, 0])
    order = torch.tensor([7, 2, 0, 3, 6, 5, 4, 1])
    assert _balanced(order, labels, at_most=2).tolist() == [7, 2, 0, 6, 5]
    assert _balanced(order, labels, at_most=9).tolist() == order.tolist()
