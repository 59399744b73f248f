"""Tokens of a transformer: what learns, what is handed on, which stay when they are condensed, and what ships."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from vpdeploy.deploy.bake import bake
from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import ConstantMemory
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.prompt import new_tokens, put_tokens, split_prompt
from vpdeploy.recipe.tables import Recipe, TokensTable
from vpdeploy.scoring.condense import gradient_scores, kept_tokens
from vpdeploy.scoring.select import build_selector
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.training.condense import condense
from vpdeploy.training.methods.registry import search
from vpdeploy.training.methods.task import SearchTask, with_tensors
from vpdeploy.training.network import Prompted, add_prompt, build_canvas, prompt_parameters, prompt_state
from vpdeploy.training.streams import stream
from vpdeploy.training.tune import tune
from vpdeploy.values import Dense, Found, Tuned

WIDTH, COUNT = 24, 5
SAME_FLOAT32 = 1e-5


def vit() -> nn.Module:
    """Two blocks of three heads, patches of 4 of a canvas of 12."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = VisionTransformer(
            image_size=tiny.CANVAS, patch_size=4, num_layers=2, num_heads=3, hidden_dim=WIDTH, mlp_dim=32,
            num_classes=tiny.CLASSES,
        )  # fmt: skip
        nn.init.normal_(network.heads.head.weight)  # type: ignore[union-attr]
    return replace_attention(network.eval(), torch.zeros(1, 3, tiny.CANVAS, tiny.CANVAS)).network


def settled(**values: Any) -> Recipe:
    """Tokens alone; keys with their dots written as two underscores."""
    given = {"prompt.pixels.kind": "none", "prompt.tokens.kind": "vpt-deep", "prompt.tokens.count": COUNT}
    return tiny.recipe({**given, **{key.replace("__", "."): value for key, value in values.items()}})


def task_of(backbone: nn.Module, recipe: Recipe, *, prompted: bool = True) -> SearchTask:
    example = example_input(tiny.CANVAS, batch=1)
    groups = probe(backbone, find_groups(backbone, example), example=example).prunable
    cost = build_cost_model(backbone, groups, example=example)
    selector = build_selector(groups, cost, budget="macs_ratio", requested=0.6, round_to=1, max_removal=0.9)
    return SearchTask(Dense(backbone), groups, selector, prompted=prompted)


def searched(folder: Path, recipe: Recipe, backbone: nn.Module, *, prompted: bool = True) -> Found:
    task = task_of(backbone, recipe, prompted=prompted)
    return search(
        task, tiny.data(), recipe=recipe, compute=tiny.COMPUTE, journal=tiny.journal(folder), display=tiny.QUIET
    )


def tuned(folder: Path, recipe: Recipe, backbone: nn.Module, prompt: dict[str, Tensor] | None) -> Tuned:
    return tune(
        backbone, tiny.data(), prompt=prompt, dense=Dense(backbone), classifier="heads.head", mask={}, label_map=None,
        recipe=recipe,
        compute=tiny.COMPUTE, journal=tiny.journal(folder, "tune"), display=tiny.QUIET,
    )  # fmt: skip


def drawn(backbone: nn.Module, *, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: scale * rows for name, rows in new_tokens(backbone, settled().prompt.tokens, generator=generator).items()
    }


@pytest.mark.parametrize("method", ["vpns", "iterative", "slim", "taylor", "bip", "omp"])
def test_tokens_learn_in_a_search_and_are_no_weights(tmp_path, method):
    network = vit()
    before = tiny.snapshot(network)
    recipe = settled(search__method=method, search__epochs=2)
    found = searched(tmp_path, recipe, network)
    assert tiny.snapshot(network) == before
    pixels, tokens = split_prompt(found.prompt)
    assert not pixels and {name: rows.shape for name, rows in tokens.items()} == {
        block.name: (COUNT, WIDTH) for block in blocks_of(network)
    }
    start = new_tokens(network, recipe.prompt.tokens, generator=stream(recipe.seed, "prompt", 0, "tokens"))
    assert all(rows.isfinite().all() and not torch.equal(rows, start[name]) for name, rows in tokens.items())
    assert not any("memory" in name for name in found.tensors)
    assert (found.tensors == {}) == (method in ("vpns", "taylor", "omp"))
    again = searched(tmp_path / "again", recipe, network)
    assert all(torch.equal(again.prompt[name], rows) for name, rows in found.prompt.items())


def test_prototypes_are_of_the_unprompted_network_on_training_images(tmp_path):
    """A rate of next to nothing leaves them where they began: what the second block reads of one of the images."""
    network, recipe = vit(), settled(prompt__tokens__init="prototype", search__epochs=1, search__prompt_lr=1e-12)
    tokens = split_prompt(searched(tmp_path, recipe, network).prompt)[1]
    canvas = build_canvas(recipe, prompted=False)
    pixels = tiny.data().train.pixels
    assert pixels is not None
    first, second = blocks_of(network)
    seen: list[Tensor] = []
    hook = second.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(canvas(pixels / 255))
    hook.remove()
    there = seen[0][:, 1:].flatten(0, 1)
    nearest = torch.cdist(tokens[second.name].double(), there.double()).amin(dim=1)
    assert float(nearest.max()) < 1e-4 * float(there.norm(dim=1).mean())
    assert not torch.equal(tokens[first.name], tokens[second.name])


@pytest.mark.parametrize("kind", ["vpt-deep", "vpt-shallow"])
def test_a_projection_learns_with_narrow_tokens_and_is_folded_into_them(tmp_path, kind):
    """By hand: one step of a network whose tokens are a product of two factors moves both."""
    network, recipe = vit(), settled(prompt__tokens__width=6, prompt__tokens__kind=kind, search__epochs=1)
    backbone = copy.deepcopy(network)
    canvas = add_prompt(backbone, recipe, tiny.data(), stage="search")
    parameters = prompt_parameters(Prompted(canvas, backbone, tiny.COMPUTE))
    blocks = 2 if kind == "vpt-deep" else 1
    assert [tuple(p.shape) for p in parameters] == [(COUNT, 6)] * blocks + [(WIDTH, 6), (WIDTH,)]
    *tokens, weight, bias = parameters
    assert torch.equal(bias, torch.zeros(WIDTH)) and 0.5 < float(weight.detach().std()) / (2 / WIDTH) ** 0.5 < 1.5
    rows = split_prompt(prompt_state(Prompted(canvas, backbone, tiny.COMPUTE)))[1]
    for row, token in zip(rows.values(), tokens, strict=True):
        torch.testing.assert_close(row, token @ weight.t() + bias)
    wide = copy.deepcopy(network)
    put_tokens(wide, rows, recipe.prompt.tokens)
    images = torch.rand(2, 3, tiny.CANVAS, tiny.CANVAS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(images), backbone.eval()(images), rtol=SAME_FLOAT32, atol=SAME_FLOAT32)
    backbone(images).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)

    found = split_prompt(searched(tmp_path, recipe, network).prompt)[1]
    assert [tuple(row.shape) for row in found.values()] == [(COUNT, WIDTH)] * blocks
    again = tuned(tmp_path / "tune", recipe, network, {f"tokens.{name}": row for name, row in found.items()})
    assert all(again.prompt[f"tokens.{name}"].shape == row.shape for name, row in found.items())


def test_blocks_of_unlike_widths_have_no_projection():
    swin = replace_attention(
        SwinTransformer([2, 2], 24, [1, 1], [3, 6], [4, 4], num_classes=3).eval(), torch.zeros(1, 3, 16, 16)
    ).network
    with pytest.raises(
        ModelError, match=r"prompt\.tokens\.width: got 6 for SwinTransformer, whose blocks differ in width"
    ):
        new_tokens(swin, TokensTable(kind="vpt-deep", width=6), generator=torch.Generator())


def test_without_a_prompt_in_the_arm_there_are_none(tmp_path):
    found = searched(tmp_path, settled(search__epochs=1), vit(), prompted=False)
    assert found.prompt == {}


def test_tuning_goes_on_with_the_tokens_and_hands_them_on_apart(tmp_path):
    network = vit()
    prompt = {f"tokens.{name}": rows for name, rows in drawn(network).items()}
    result = tuned(tmp_path, settled(), network, prompt)
    assert {name: tensor.shape for name, tensor in result.backbone.state_dict().items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    assert result.prompt.keys() == prompt.keys()
    assert all(not torch.equal(result.prompt[name], rows) for name, rows in prompt.items())
    assert tuned(tmp_path / "plain", settled(), network, None).prompt == {}


def test_with_the_head_alone_all_other_weights_stay(tmp_path):
    network = vit()
    prompt = {f"tokens.{name}": rows for name, rows in drawn(network).items()}
    result = tuned(tmp_path, settled(tune__what="head"), network, prompt)
    before, after = network.state_dict(), result.backbone.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {"heads.head.weight", "heads.head.bias"}
    assert all(not torch.equal(result.prompt[name], rows) for name, rows in prompt.items())


def test_pixels_and_tokens_learn_side_by_side(tmp_path):
    recipe = settled(prompt__pixels__kind="pad", prompt__pixels__size=2)
    pixels, tokens = split_prompt(searched(tmp_path, recipe, vit()).prompt)
    assert set(pixels) == {"top", "bottom", "left", "right"} and all(bool(part.any()) for part in pixels.values())
    assert len(tokens) == 2


@torch.no_grad()
def test_what_is_baked_computes_what_was_tuned():
    """Tokens of unlike counts, so large that they matter; folded to constants, with nothing of them left to compute."""
    network, recipe = vit(), settled()
    first, second = drawn(network, scale=8.0).items()
    prompt = {f"tokens.{first[0]}": first[1][:2], f"tokens.{second[0]}": second[1]}
    backbone = copy.deepcopy(network)
    canvas = add_prompt(backbone, recipe, tiny.data(), stage="tune", state=prompt)
    images = torch.rand(4, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))
    expected = Prompted(canvas, backbone, tiny.COMPUTE).eval()(images)
    plain = Prompted(build_canvas(recipe, prompted=False), network, tiny.COMPUTE).eval()(images)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    deployable = bake(Tuned(network, prompt), recipe=recipe, classifier="heads.head", form="float")
    torch.testing.assert_close(deployable(images), expected, rtol=SAME_FLOAT32, atol=SAME_FLOAT32)
    memories = [block.attention.memory for block in blocks_of(deployable.backbone)]
    assert [type(memory) for memory in memories] == [ConstantMemory] * 2
    assert [memory.key.shape for memory in memories] == [(1, 3, 2, 8), (1, 3, COUNT, 8)]  # type: ignore[union-attr]
    assert not any(block.attention.memory for block in blocks_of(network))


def test_a_network_without_blocks_is_refused_by_name():
    table = settled().prompt.tokens
    with pytest.raises(
        ModelError, match=r"got 'vpt-deep' for Network, which has no block for it; expected a vision transfor"
    ):
        put_tokens(tiny.network(), {"conv1": torch.zeros(1, 8)}, table)
    with pytest.raises(ModelError, match=r"got tokens for 'x'; expected one of encoder.layers.encoder_layer_0, "):
        put_tokens(vit(), {"x": torch.zeros(1, WIDTH)}, table)
    with pytest.raises(ModelError, match=r"got \[1, 3\] for '[a-z_.0]*'; expected \[count, 24\]"):
        put_tokens(vit(), {"encoder.layers.encoder_layer_0": torch.zeros(1, 3)}, table)


# --- condensation -----------------------------------------------------------------------------------------------------


def test_a_tokens_score_is_the_mean_size_of_its_first_order_term():
    """Of logits that are linear in two tokens, by hand."""
    tokens = {"a": nn.Parameter(torch.tensor([[1.0, 2.0], [0.5, -1.0]]))}
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(3, 2, generator=generator), torch.tensor([0, 1, 1])) for _ in range(4)]

    def walk():
        for x, labels in batches:
            yield torch.stack([x @ tokens["a"][0], x @ tokens["a"][1]], dim=1), labels

    expected = torch.zeros(2, dtype=torch.float64)
    for x, labels in batches:
        logits = torch.stack([x @ tokens["a"][0], x @ tokens["a"][1]], dim=1).detach()
        error = logits.softmax(1) - torch.eye(2)[labels]  # dL/dlogits, times the number of images
        by_token = error.T @ x / len(x)
        expected += (tokens["a"].detach() * by_token).sum(dim=1).abs()
    (scores,) = gradient_scores(tokens, walk()).values()
    assert torch.allclose(scores, expected / len(batches), rtol=1e-5)


def test_what_stays_is_the_best_of_all_or_of_each():
    scores = {"a": torch.tensor([0.9, 0.8, 0.7, 0.1]), "b": torch.tensor([0.2, 0.3, 0.05, 0.04])}
    whole = {"a": [True, True, True, False], "b": [False, False, False, False]}
    assert {name: row.tolist() for name, row in kept_tokens(scores, keep=0.375, scope="global").items()} == whole
    each = {"a": [True, True, False, False], "b": [True, True, False, False]}
    assert {name: row.tolist() for name, row in kept_tokens(scores, keep=0.375, scope="layer").items()} == each
    ties = {"a": torch.ones(3), "b": torch.ones(3)}
    assert [int(row.sum()) for row in kept_tokens(ties, keep=0.5, scope="global").values()] == [3, 0]
    assert sum(int(row.sum()) for row in kept_tokens(scores, keep=1e-9, scope="global").values()) == 1


@pytest.mark.parametrize(
    ("score", "kind", "left"),
    [
        ("gradient", "vpt-deep", 3),  # of 10
        ("norm", "vpt-deep", 3),
        ("random", "vpt-deep", 3),
        ("gradient", "vpt-shallow", 2),  # of 5
        ("gradient", "cvpt", 3),
        ("gradient", "ffn-memory", 3),
    ],
)
def test_condensing_removes_rows_and_changes_nothing_else(tmp_path, score, kind, left):
    network = vit()
    recipe = settled(condense__keep=0.3, condense__score=score, prompt__tokens__kind=kind)
    task = task_of(network, recipe)
    found = searched(tmp_path, recipe, network)
    before = {name: rows.clone() for name, rows in found.prompt.items()}
    fewer = condense(task, found, tiny.data(), recipe=recipe, compute=tiny.COMPUTE)
    assert all(torch.equal(found.prompt[name], rows) for name, rows in before.items())
    assert sum(len(rows) for rows in fewer.prompt.values()) == left
    for name, rows in fewer.prompt.items():
        assert all(any(torch.equal(row, own) for own in before[name]) for row in rows)
    assert (fewer.scores, fewer.tensors) == (found.scores, found.tensors)
    result = tuned(tmp_path, recipe, with_tensors(Dense(network), fewer), dict(fewer.prompt))
    counts = {name: len(rows) for name, rows in fewer.prompt.items() if len(rows)}
    assert {name: len(rows) for name, rows in result.prompt.items()} == counts


@torch.no_grad()
def test_removed_is_not_zeroed():
    """A token of zeros has the norm's bias for a key, and takes its share of attention."""
    network = vit()
    name, rows = next(iter(drawn(network, scale=8.0).items()))
    next(blocks_of(network)).norm.bias.normal_(generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr]
    x = torch.rand(2, 3, tiny.CANVAS, tiny.CANVAS, generator=torch.Generator().manual_seed(1))

    def logits(tokens: Tensor) -> Tensor:
        twin = copy.deepcopy(network)
        put_tokens(twin, {name: tokens}, settled().prompt.tokens)
        return twin(x)

    zeroed = rows.clone()
    zeroed[2:] = 0
    assert (logits(rows[:2]) - logits(zeroed)).abs().max() > 1e-3 * logits(rows).abs().max()
    assert torch.equal(logits(rows[:0]), network(x))
