"""Stage 1: scores and prompt learn, weights do not; the mask stays under the budget at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import VpdeployError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring import straight_through
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.select import prices
from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.training import loop
from vpdeploy.training.methods import learned as module
from vpdeploy.training.methods.criteria import LOOKING
from vpdeploy.training.methods.learned import search_step
from vpdeploy.training.methods.registry import search
from vpdeploy.training.methods.task import SearchTask, with_tensors
from vpdeploy.training.network import Compute, build_canvas
from vpdeploy.training.streams import stream
from vpdeploy.values import Dense, Found


def recipe(**values: Any) -> Recipe:
    """Keys with their dots written as two underscores."""
    return tiny.recipe({key.replace("__", "."): value for key, value in values.items()})


def searched(task: SearchTask, folder: Path, settled: Recipe, *, compute: Compute = tiny.COMPUTE) -> Found:
    return search(task, tiny.data(), recipe=settled, compute=compute, journal=tiny.journal(folder), display=tiny.QUIET)


@dataclass
class Watched:
    """What a search did: its learner, whether each step was prompted, and each step's mask, prompt and gradient."""

    learner: Any = None
    prompted: list[bool] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    prompt_learns: list[bool] = field(default_factory=list)  # whether the step's gradient reached the prompt
    prompt_moved: list[bool] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    seen = Watched()
    make, step, mask = module._learner, module.search_step, straight_through.select_row

    def learner(*args: Any, **values: Any) -> Any:
        made = make(*args, **values)
        seen.learner = made
        before: list[Tensor] = []

        def prompt() -> list[Tensor]:
            canvas = made.network.canvas
            return [] if canvas.prompt is None else list(canvas.prompt.parameters())

        def at_step(*_: Any) -> None:
            seen.prompt_learns.append(any(p.grad is not None for p in prompt()))
            before[:] = [p.detach().clone() for p in prompt()]

        def after_step(*_: Any) -> None:
            seen.prompt_moved.append(any(not torch.equal(a, b) for a, b in zip(before, prompt(), strict=True)))

        made.optimizer.register_step_pre_hook(at_step)
        made.optimizer.register_step_post_hook(after_step)
        return made

    def search_step(*args: Any, prompted: bool) -> Tensor:
        seen.prompted.append(prompted)
        return step(*args, prompted=prompted)

    def select_row(selector: Any, row: np.ndarray) -> np.ndarray:
        seen.masks.append(mask(selector, row))
        return seen.masks[-1]

    monkeypatch.setattr(module, "_learner", learner)
    monkeypatch.setattr(module, "search_step", search_step)
    monkeypatch.setattr(straight_through, "select_row", select_row)
    yield seen


def same(first: Found, second: Found) -> bool:
    """Equal in every bit."""
    parts = [(f.scores, f.prompt, f.tensors) for f in (first, second)]
    return first.label_map == second.label_map and all(
        set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*parts, strict=True)
    )


# --- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_prompt_and_statistics_move_and_weights_do_not(watched: Watched, tmp_path: Path, bf16: bool) -> None:
    settled, backbone = recipe(), tiny.network(dropout=0.2)
    task = tiny.task(backbone, settled)
    found = searched(task, tmp_path, settled, compute=Compute(torch.device("cpu"), bf16=bf16, channels_last=bf16))
    inner = watched.learner.network.backbone.backbone
    assert inner is not backbone
    for (name, old), new in zip(backbone.named_parameters(), inner.parameters(), strict=True):
        assert torch.equal(old, new), name
        assert new.grad is None and not new.requires_grad, name
    start = magnitude(backbone, task.groups)
    assert set(found.scores) == set(start) == {"conv1", "conv2"}
    for root, scores in found.scores.items():
        assert scores.dtype == torch.float32 and scores.shape == start[root].shape
        assert bool((scores != start[root]).all())  # masked channels learn, too
    assert {name: value.count_nonzero() == value.numel() for name, value in found.prompt.items()} == dict.fromkeys(
        ("top", "bottom", "left", "right"), True
    )
    buffers = {name for name, _ in backbone.named_buffers()}
    assert set(found.tensors) == buffers
    for name, old in backbone.named_buffers():
        assert not torch.equal(found.tensors[name], old), name
    steps = settled.search.epochs * 4  # 28 images in batches of 8
    assert found.tensors["norm1.num_batches_tracked"] == steps == len(watched.prompted)


def test_with_tensors_is_the_dense_network_with_the_searchs_norms(tmp_path: Path) -> None:
    settled, backbone = recipe(), tiny.network()
    task = tiny.task(backbone, settled)
    found = searched(task, tmp_path, settled)
    source = with_tensors(task.dense, found)
    state = source.state_dict()
    assert all(torch.equal(state[name], value) for name, value in found.tensors.items())
    assert all(torch.equal(state[name], value) for name, value in backbone.named_parameters())
    assert not source.training


def test_the_same_search_gives_the_same_bits_whatever_ran_before(tmp_path: Path) -> None:
    settled = recipe(prompt__pixels__kind="random")
    task = tiny.task(tiny.network(dropout=0.3), settled)
    first = searched(task, tmp_path / "first", settled)
    torch.rand(5)
    assert same(first, searched(task, tmp_path / "second", settled))
    other = recipe(prompt__pixels__kind="random", seed=8)
    assert not same(first, searched(task, tmp_path / "third", other))


@pytest.mark.parametrize("kind", ["scaled", "random"])
def test_where_scores_start(watched: Watched, tmp_path: Path, kind: str) -> None:
    """At a rate that is 0 in float32, no step is taken."""
    settled = recipe(search__score_init=kind, search__epochs=1, search__score_lr=1e-60)
    task = tiny.task(tiny.network(), settled)
    row = torch.cat(list(searched(task, tmp_path, settled).scores.values()))
    if kind == "scaled":
        assert torch.equal(row, torch.cat(list(magnitude(task.dense.backbone, task.groups).values())))
    else:
        assert row.shape == (18,) and 0 <= float(row.min()) < float(row.max()) < 1
        other = recipe(search__score_init=kind, search__epochs=1, search__score_lr=1e-60, seed=8)
        assert not torch.equal(row, torch.cat(list(searched(task, tmp_path / "8", other).scores.values())))


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_scores_start_from_what_the_dense_network_needs(kind: str, watched: Watched, tmp_path: Path) -> None:
    settled = recipe(search__score_init=kind, search__epochs=1, search__score_lr=1e-60)
    network = tiny.network()
    task = tiny.task(network, settled)
    scores = searched(task, tmp_path, settled).scores
    # By other means: a factor on what each norm gives is what the gate behind it is.
    factors = {norm: torch.ones(width, requires_grad=True) for norm, width in (("norm1", 8), ("norm2", 10))}
    for norm, factor in factors.items():
        network.get_submodule(norm).register_forward_hook(lambda *args, f=factor: args[2] * f.view(1, -1, 1, 1))
    data, squares = tiny.data().train, {norm: torch.zeros(len(factor)) for norm, factor in factors.items()}
    order = torch.randperm(len(data), generator=stream(settled.seed, "search", 0, kind))
    canvas = build_canvas(settled, prompted=False)
    assert data.pixels is not None
    drawn = torch.Generator().manual_seed(0)
    for part in order.split(LOOKING[kind].batch):
        logits = network(canvas(data.pixels[part] / 255))
        own = torch.multinomial(logits.detach().softmax(1), 1, generator=drawn)[:, 0]
        loss = F.cross_entropy(logits, own if kind == "fisher" else data.labels[part])
        for norm, gradient in zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True):
            squares[norm] += gradient.square()
    price = dict(zip(task.selector.roots, prices(task.selector).tolist(), strict=True))
    worth = torch.cat([squares["norm1"] / price["conv1"], squares["norm2"] / price["conv2"]])
    row = torch.cat([scores["conv1"], scores["conv2"]])
    assert torch.equal(row.argsort(), worth.argsort())
    assert torch.allclose(row.sort().values, torch.arange(1, 19) / 9)


# --- the second step, and no prompt -----------------------------------------------------------------------------------


def test_the_unprompted_step_is_for_the_scores_alone(watched: Watched, tmp_path: Path) -> None:
    settled = recipe(search__unprompted_step=True)
    searched(tiny.task(tiny.network(), settled), tmp_path, settled)
    assert watched.prompted == [True, False] * 8
    # Without a gradient Adam leaves the prompt alone; a gradient of 0 would move it on its momentum.
    assert watched.prompt_learns == watched.prompt_moved == [True, False] * 8


def test_without_it_every_step_is_prompted(watched: Watched, tmp_path: Path) -> None:
    settled = recipe()
    searched(tiny.task(tiny.network(), settled), tmp_path, settled)
    assert watched.prompted == watched.prompt_learns == watched.prompt_moved == [True] * 8


@pytest.mark.parametrize("unprompted_step", [False, True])
def test_without_a_prompt_it_is_hydra(watched: Watched, tmp_path: Path, unprompted_step: bool) -> None:
    """One step a batch, on scores alone: the same whether the arm has no prompt or the recipe names none."""
    settled = recipe(search__unprompted_step=unprompted_step)
    none = recipe(search__unprompted_step=unprompted_step, prompt__pixels__kind="none")
    backbone = tiny.network(dropout=0.3)
    arm = searched(tiny.task(backbone, settled, prompted=False), tmp_path / "arm", settled)
    named = searched(tiny.task(backbone, none), tmp_path / "named", none)
    assert watched.prompted == [True] * 16
    assert arm.prompt == named.prompt == {}
    assert same(arm, named)


# --- warm-up ----------------------------------------------------------------------------------------------------------


def test_while_it_warms_up_nothing_is_masked_and_the_prompt_alone_learns(watched: Watched, tmp_path: Path) -> None:
    settled = recipe(search__epochs=3, search__warmup=2)
    searched(tiny.task(tiny.network(), settled), tmp_path, settled)
    assert watched.prompt_moved == [True] * 12
    assert watched.prompted == [True] * 4 and len(watched.masks) == 4 + 1  # of the last epoch, and of its evaluation


def test_a_prompt_that_warmed_up_is_that_of_the_dense_network(tmp_path: Path) -> None:
    """As under a budget that leaves everything."""
    warm = recipe(search__method="random", search__warmup=2)
    whole = recipe(search__method="random", budget__macs_ratio=1.0)
    first, second = (
        searched(tiny.task(tiny.network(), settled), tmp_path / name, settled)
        for name, settled in (("warm", warm), ("whole", whole))
    )
    assert set(first.prompt) and all(torch.equal(value, second.prompt[name]) for name, value in first.prompt.items())


def test_scores_are_taken_under_the_prompt_that_warmed_up(tmp_path: Path) -> None:
    backbone = tiny.network()
    found = {}
    for method in ("taylor", "magnitude"):
        for warmup in (0, 2):
            settled = recipe(search__method=method, search__warmup=warmup)
            found[method, warmup] = searched(
                tiny.task(backbone, settled), tmp_path / f"{method}{warmup}", settled
            ).scores
    assert not torch.equal(found["taylor", 0]["conv1"], found["taylor", 2]["conv1"])
    assert torch.equal(found["magnitude", 0]["conv1"], found["magnitude", 2]["conv1"])


def test_an_arm_without_a_prompt_does_not_warm_up(tmp_path: Path) -> None:
    backbone = tiny.network()
    first, second = (
        searched(tiny.task(backbone, settled, prompted=False), tmp_path / str(settled.search.warmup), settled)
        for settled in (recipe(), recipe(search__warmup=1))
    )
    assert same(first, second)


# --- the budget -------------------------------------------------------------------------------------------------------


def test_a_gradual_budget_shrinks_by_the_same_share_in_every_step(watched: Watched, tmp_path: Path) -> None:
    settled = recipe(search__epochs=4, search__gradual=0.5, budget__round_to=1)
    task = tiny.task(tiny.network(), settled)
    searched(task, tmp_path, settled)
    cost, dense = task.selector.budget.cost, task.selector.budget.dense
    left = [
        cost(np.bincount(task.selector.group_of[mask], minlength=len(task.groups)).astype(float)) / dense
        for mask in watched.masks
    ]
    steps = [share for number, share in enumerate(left) if number % 5 != 4]  # 4 steps an epoch, then its evaluation
    for step, share in enumerate(steps):
        assert share <= 0.6 ** min(1.0, step / 8) + 1e-12
    assert steps[0] == 1 and steps[0] > steps[4] > steps[8]
    assert all(
        share > 0.6 ** ((step + 2) / 8) for step, share in enumerate(steps[:7])
    )  # and is no smaller than it must


@pytest.mark.parametrize("kind", ["channel_ratio", "macs_ratio", "params_ratio"])
@pytest.mark.parametrize("score_lr", [0.05, 1e6])
def test_every_steps_mask_is_under_the_budget(watched: Watched, tmp_path: Path, kind: str, score_lr: float) -> None:
    settled = recipe(budget={"macs_ratio": None, kind: 0.6, "round_to": 2}, search__score_lr=score_lr)
    task = tiny.task(tiny.network(), settled)
    searched(task, tmp_path, settled)
    bound, selector = task.selector.budget, task.selector
    assert len(watched.masks) >= 8
    for mask in watched.masks:
        widths = np.bincount(selector.group_of[mask], minlength=len(task.groups)).astype(float)
        assert bound.cost(widths) <= 0.6 * bound.dense * (1 + 1e-12)
        assert widths.min() >= 1
    assert len({mask.tobytes() for mask in watched.masks}) > 1  # and it follows the scores


def test_every_step_looks_at_the_scores_that_the_last_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[np.ndarray] = []
    original = straight_through.select_row
    monkeypatch.setattr(straight_through, "select_row", lambda s, row: (rows.append(row.copy()), original(s, row))[1])
    settled = recipe(search__epochs=1)
    found = searched(tiny.task(tiny.network(), settled), tmp_path, settled)
    assert len(rows) == 4 + 1  # the steps, and the validation after them
    assert all(not np.array_equal(a, b) for a, b in pairwise(rows))
    assert np.array_equal(rows[-1], torch.cat(list(found.scores.values())).double().numpy())


def test_straight_through_forward_is_the_mask_and_backward_the_gates_gradient() -> None:
    scores = torch.tensor([0.3, -2.0, 5.0], requires_grad=True)
    gates = StraightThrough.apply(scores, torch.tensor([True, False, True]))
    assert isinstance(gates, Tensor) and gates.tolist() == [1, 0, 1]
    (gates * torch.tensor([1.0, -3.0, 0.5])).sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [1.0, -3.0, 0.5]


def test_one_steps_loss_is_that_of_the_masked_network() -> None:
    settled = recipe()
    task = tiny.task(tiny.network(), settled)
    learner = module._learner(
        task, tiny.data(), settled, tiny.COMPUTE, initial=lambda *_: torch.zeros(task.count), frozen=False
    )
    network, scores = learner.network.eval(), learner.scores
    images, labels = torch.rand(4, 3, tiny.SIZE, tiny.SIZE), torch.tensor([0, 1, 2, 0])
    loss = search_step(network, scores, task.selector, images, labels)
    mask = hard_mask(task.selector, scores)
    assert mask.dtype == torch.bool and 0 < int(mask.sum()) < mask.numel()
    with torch.no_grad():
        assert torch.equal(loss, nn.functional.cross_entropy(network(images, mask.float()), labels))
        assert not torch.equal(loss, nn.functional.cross_entropy(network(images, torch.ones(18)), labels))
    loss.backward()
    assert scores.grad is not None and bool((scores.grad[~mask] != 0).all())  # so that a channel can come back


def test_accuracy_is_that_of_the_masked_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(loop, "accuracy", lambda network, images, gates: given.append(gates) or 0.5)
    settled = recipe()
    task = tiny.task(tiny.network(), settled)
    found = searched(task, tmp_path, settled)
    row = torch.cat(list(found.scores.values()))
    assert len(given) == 2
    assert torch.equal(given[-1], hard_mask(task.selector, row).float())


# --- label maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "times"), [("flm", 1), ("ilm", 3)])
def test_flm_maps_once_and_ilm_again_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, times: int
) -> None:
    maps = [(0, 1, 2), (2, 1, 0), (5, 4, 3)]
    drawn = iter(maps)
    monkeypatch.setattr(module, "map_by_frequency", lambda *_: next(drawn))
    settled = recipe(model__head=head, model__weights="source.th", search__epochs=3)
    task = tiny.task(tiny.network(classes=6), settled, label_map=(3, 4, 5))
    found = searched(task, tmp_path, settled)
    assert found.label_map == maps[times - 1]
    assert len(list(drawn)) == len(maps) - times


def test_a_kept_head_has_no_map(tmp_path: Path) -> None:
    settled = recipe(model__head="keep")
    assert searched(tiny.task(tiny.network(), settled), tmp_path, settled).label_map is None


def test_the_map_is_that_of_the_masked_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(module, "map_by_frequency", lambda network, data, *values: given.append(values) or (0, 1, 2))
    settled = recipe(model__head="flm", model__weights="source.th")
    task = tiny.task(tiny.network(classes=6), settled, label_map=(3, 4, 5))
    searched(task, tmp_path, settled)
    start = torch.cat(list(magnitude(task.dense.backbone, task.groups).values()))
    ((gates,),) = given
    assert torch.equal(gates, hard_mask(task.selector, start).float())


# --- failure ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    settled, backbone = recipe(), tiny.network()
    with torch.no_grad():
        backbone.get_submodule("linear").get_parameter("bias").fill_(float("nan"))
    task = tiny.task(tiny.network(), settled)
    poisoned = SearchTask(Dense(backbone), task.groups, task.selector, prompted=True)
    with pytest.raises(VpdeployError) as error:
        searched(poisoned, tmp_path, settled)
    assert str(error.value) == (
        "training: the loss became nan; expected a number: the steps are too large, "
        "try a smaller search.score_lr or search.prompt_lr"
    )
    assert tiny.journal(tmp_path).resume() is None
