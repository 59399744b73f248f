"""Single weights: every method scores them, masks them and leaves zeros that stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.criteria.magnitude import magnitude_of_weights
from vpdeploy.scoring.criteria.model import Model
from vpdeploy.scoring.criteria.snip import snip_of_weights
from vpdeploy.scoring.criteria.synflow import synflow_of_weights
from vpdeploy.scoring.criteria.taylor import taylor_of_weights
from vpdeploy.scoring.select_weights import weight_selector
from vpdeploy.scoring.straight_through import hard_mask
from vpdeploy.surgery.certificate import certify_weights
from vpdeploy.surgery.masked_weights import MaskedWeights, parts_of, set_to_zero, weight_shapes
from vpdeploy.training.methods import bilevel
from vpdeploy.training.methods.learned import search_step
from vpdeploy.training.methods.registry import METHODS, search
from vpdeploy.training.methods.task import SearchTask
from vpdeploy.training.network import Prompted, build_canvas
from vpdeploy.training.tune import tune
from vpdeploy.values import Dense, Found

OF_WEIGHTS = sorted(set(METHODS) - {"slim", "group_sl"})
NAMES = ["conv1.weight", "conv2.weight", "linear.weight"]
COUNT = 8 * 27 + 10 * 72 + 3 * 10


def recipe(**values: Any) -> Recipe:
    """Keys with their dots written as two underscores."""
    values = {"search__granularity": "weight", "budget": {"macs_ratio": None, "weight_ratio": 0.3}, **values}
    return tiny.recipe({key.replace("__", "."): value for key, value in values.items()})


def task(network: nn.Module, settled: Recipe, *, prompted: bool = True) -> SearchTask:
    selector = weight_selector(
        weight_shapes(network), ratio=settled.budget.requested, granularity=settled.search.granularity
    )
    return SearchTask(Dense(network), tiny.groups_of(network).prunable, selector, prompted=prompted)


def searched(folder: Path, settled: Recipe, network: nn.Module) -> Found:
    return search(
        task(network, settled), tiny.data(), recipe=settled, compute=tiny.COMPUTE, journal=tiny.journal(folder),
        display=tiny.QUIET,
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, tiny.CANVAS, tiny.CANVAS, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def test_masked_weights_are_products():
    network = tiny.network()
    assert list(weight_shapes(network)) == NAMES
    masked = MaskedWeights(copy.deepcopy(network))
    assert masked.channels == COUNT
    row = (torch.rand(COUNT, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    zeroed = set_to_zero(copy.deepcopy(network), parts_of(row.bool(), weight_shapes(network)))
    x, labels = batch()
    assert torch.equal(masked(x, row), zeroed(x)) and torch.equal(masked(x, torch.ones(COUNT)), network(x))
    values = row.clone().requires_grad_(True)
    F.cross_entropy(masked(x, values), labels).backward()
    assert values.grad is not None and bool((values.grad[row == 0] != 0).any())  # so that a weight can come back
    weights = torch.cat([dict(network.named_parameters())[name].detach().flatten() for name in NAMES])
    # The same by a change of each of a few values, in float64.
    exact = MaskedWeights(copy.deepcopy(network).double())
    for place in (0, 300, COUNT - 1):
        moved = [row.double().clone() for _ in range(2)]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        up, down = (F.cross_entropy(exact(x.double(), one), labels) for one in moved)
        assert float(values.grad[place]) == pytest.approx(float((up - down).detach() / 2e-6), rel=1e-3, abs=1e-6)
    assert weights.shape == (COUNT,)


@pytest.mark.parametrize("method", OF_WEIGHTS)
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_every_method_scores_single_weights(tmp_path, method, granularity):
    rounds = {"search__rounds": 2} if method in ("lth", "iterative") else {}
    ratio = {"budget": {"macs_ratio": None, "weight_ratio": 0.5}}
    settled, network = recipe(search__method=method, search__granularity=granularity, **ratio, **rounds), tiny.network()
    before = tiny.snapshot(network)
    found = searched(tmp_path, settled, network)
    assert tiny.snapshot(network) == before
    shapes = {name: tuple(shape) for name, shape in weight_shapes(network).items()}
    assert {name: tuple(scores.shape) for name, scores in found.scores.items()} == shapes
    row = torch.cat([found.scores[name].flatten() for name in NAMES])
    kept = hard_mask(task(network, settled).selector, row)
    parts = parts_of(kept, weight_shapes(network))
    if granularity == "weight":
        assert int(kept.sum()) == COUNT // 2
    else:  # three colours, and ten inputs, are no multiple of four
        assert [float(parts[name].double().mean()) for name in NAMES] == [1, 0.5, 1]


def test_scores_of_channels_are_sums_of_those_of_weights():
    network = tiny.network().requires_grad_(False)
    x, labels = batch()
    model = Model(MaskedWeights(network), torch.ones(COUNT))
    parameters = {name: p.detach().clone().requires_grad_(True) for name, p in network.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(network, parameters, (x,)), labels)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    snip, taylor = (of(model, NAMES, [(x, labels)]) for of in (snip_of_weights, taylor_of_weights))
    for name in NAMES:
        product = (parameters[name] * gradients[name]).detach()
        assert torch.allclose(snip[name], product.abs(), rtol=1e-4, atol=1e-9)
        assert torch.allclose(taylor[name], product.square(), rtol=1e-4, atol=1e-12)


def test_synflow_looks_at_what_the_mask_leaves():
    network = tiny.network().requires_grad_(False)
    row = torch.ones(COUNT)
    row[:27] = 0  # the first channel of the first layer
    scores = synflow_of_weights(Model(MaskedWeights(network), row), NAMES, [batch()])
    assert not bool(scores["conv1.weight"][0].any()) and bool(scores["conv1.weight"][1:].all())
    assert scores["conv1.weight"].dtype == torch.float64


def test_scaled_sizes_begin_as_hydra_does():
    network = tiny.network()
    weight = network.get_submodule("conv2").get_parameter("weight").detach()
    (scores,) = magnitude_of_weights(network, ["conv2.weight"]).values()
    assert torch.allclose(scores, (6 / 72) ** 0.5 * weight.abs() / weight.abs().max())
    (plain,) = magnitude_of_weights(network, ["conv2.weight"], norm="l1").values()
    assert torch.equal(plain, weight.abs())


def test_bips_answer_of_single_weights():
    """(w - g / gamma) g, entry by entry, at the masked weights."""
    settled, network = recipe(search__method="bip", search__strength=0.5), tiny.network()
    of = task(network, settled)
    prompted = Prompted(build_canvas(settled, prompted=True), of.masked(copy.deepcopy(network)), tiny.COMPUTE).eval()
    scores = torch.rand(COUNT, generator=torch.Generator().manual_seed(4))
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    made = bilevel._Learner(prompted, scores, nothing, nothing, bilevel.readers_of(of, prompted), of.selector, settled)
    images, labels = torch.rand(6, 3, tiny.SIZE, tiny.SIZE), torch.arange(6) % 3
    made.upper_loss(images, labels)
    parts = parts_of(hard_mask(of.selector, scores).float(), weight_shapes(network))
    leaves = {
        name: (dict(network.named_parameters())[name].detach() * part).requires_grad_(True)
        for name, part in parts.items()
    }
    canvas = prompted.canvas(images).detach()
    loss = F.cross_entropy(torch.func.functional_call(network, leaves, (canvas,)), labels)
    found = torch.autograd.grad(loss, list(leaves.values()))
    weights = dict(network.named_parameters())
    expected = torch.cat([((weights[n].detach() - 0.5 * g) * g).flatten() for n, g in zip(leaves, found, strict=True)])
    assert torch.allclose(scores.grad, expected, rtol=1e-3, atol=1e-7)  # type: ignore[arg-type]


def test_one_steps_gradient_reaches_masked_weights():
    settled, network = recipe(), tiny.network()
    of = task(network, settled)
    prompted = Prompted(build_canvas(settled, prompted=True), of.masked(copy.deepcopy(network)), tiny.COMPUTE).eval()
    scores = torch.rand(COUNT, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    search_step(prompted, scores, of.selector, torch.rand(6, 3, tiny.SIZE, tiny.SIZE), torch.arange(6) % 3).backward()
    kept = hard_mask(of.selector, scores)
    assert int(kept.sum()) == int(0.3 * COUNT)
    assert scores.grad is not None and bool((scores.grad[~kept] != 0).any())


def test_zeros_stay_in_tuning(tmp_path):
    settled, network = recipe(), tiny.network()
    row = torch.rand(COUNT, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = parts_of(row, weight_shapes(network))
    start = set_to_zero(copy.deepcopy(network), mask)
    result = tune(
        start, tiny.data(), prompt={}, dense=Dense(network), classifier="linear", mask=mask, label_map=None,
        recipe=settled, compute=tiny.COMPUTE,
        journal=tiny.journal(tmp_path), display=tiny.QUIET,
    )  # fmt: skip
    for name, kept in mask.items():
        tuned, before = (dict(of.named_parameters())[name].detach() for of in (result.backbone, start))
        assert not bool(tuned[~kept].any()) and bool((tuned[kept] != before[kept]).any())


def test_the_certificate_measures_mask_against_zeros():
    network = tiny.network()
    row = torch.rand(COUNT, generator=torch.Generator().manual_seed(1)) < 0.3
    zeroed = set_to_zero(copy.deepcopy(network), parts_of(row, weight_shapes(network)))
    groups = tiny.groups_of(network)
    made = certify_weights(network, zeroed, groups, row, requested=0.3, canvas=batch()[0])
    assert made.budget == "weight_ratio" and made.reached == pytest.approx(float(row.double().mean()))
    assert made.masked_vs_pruned == 0 and made.mask_effect > 0.01
    assert all(record.kept == record.width for record in made.groups)
    with torch.no_grad():
        zeroed.get_submodule("conv1").get_parameter("weight")[0, 0, 0, 0] += 0.5
    with pytest.raises(Exception, match="masked and pruned logits differ by"):
        certify_weights(network, zeroed, groups, row, requested=0.3, canvas=batch()[0])
