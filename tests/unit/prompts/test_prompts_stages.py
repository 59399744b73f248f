"""prompt.pixels.stages, arm by arm: where the prompt is learned, where it starts, and which arm ships one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch

from vpdeploy.models.build import Built
from vpdeploy.pipeline import searched, tuned
from vpdeploy.recipe.tables import ARMS, Method, Recipe
from vpdeploy.run_folder import read_network
from vpdeploy.stages import Ledger
from vpdeploy.values import Dense, Found
from vpdeploy.workbench import Workbench


def workbench(folder: Path, settled: Recipe) -> Workbench:
    backbone: Any = tiny.network()
    source: Any = None  # nothing is opened here
    return Workbench(
        run=folder,
        recipe=settled,
        source=source,
        search_source=None,
        built=Built(backbone, "keep", "linear", tiny.CLASSES),
        ledger=Ledger(folder / "stages.json", {}),
        display=tiny.QUIET,
        training_data=tiny.data,
        compute=lambda: tiny.COMPUTE,
    )


def searched_and_tuned(folder: Path, settled: Recipe, arm: str) -> tuple[Found | None, dict[str, torch.Tensor]]:
    """What the search of ``arm`` found (None for an arm without one), and the prompt that the arm ships."""
    work = workbench(folder, settled)
    dense, found = Dense(work.built.backbone), None
    if arm.startswith("pruned"):
        selector = tiny.task(dense.backbone, settled).selector
        found = searched(work, arm, dense, tiny.groups_of(dense.backbone), selector)
    tuned(work, arm, dense, prompt={} if found is None else found.prompt, dense=dense, mask={})
    return found, read_network(folder / f"{arm}.safetensors")[1]


SHIPS = {"both": {"pruned", "dense+prompt"}, "tune": {"pruned", "dense+prompt"}, "search": set[str]()}
SEARCHES = {"both": {"pruned"}, "tune": set[str](), "search": {"pruned"}}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("stages", ["both", "search", "tune"])
def test_where_a_prompt_is_learned_and_which_arm_ships_one(tmp_path: Path, stages: str, arm: str) -> None:
    settled = tiny.recipe({"prompt.pixels.stages": stages, "search.epochs": 1, "tune.epochs": 1})
    found, shipped = searched_and_tuned(tmp_path, settled, arm)
    if found is not None:
        assert bool(found.prompt) == (arm in SEARCHES[stages])
        assert all(value.count_nonzero() for value in found.prompt.values())
    assert bool(shipped) == (arm in SHIPS[stages])
    assert all(value.count_nonzero() for value in shipped.values())


@pytest.mark.parametrize("arm", ["dense", "pruned"])
@pytest.mark.parametrize("method", get_args(Method))
def test_kind_none_ships_none(tmp_path: Path, method: str, arm: str) -> None:
    settled = tiny.recipe(
        {
            **{"search.method": method, "search.rounds": 2 if method == "iterative" else 1},
            **{"prompt.pixels.kind": "none", "search.epochs": 1, "tune.epochs": 1},
        }
    )
    found, shipped = searched_and_tuned(tmp_path, settled, arm)
    assert shipped == {}
    assert found is None or found.prompt == {}


@pytest.mark.parametrize("method", ["taylor", "omp"])
def test_without_a_prompt_to_learn_one_look_takes_no_epochs(tmp_path: Path, method: str) -> None:
    """A prompt would learn for search.epochs under the scores' mask; methods that train weights need the epochs for these."""
    settled = tiny.recipe({"search.method": method, "prompt.pixels.kind": "none", "search.epochs": 2, "tune.epochs": 1})
    searched_and_tuned(tmp_path, settled, "pruned")
    lines = [json.loads(line)["stage"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines.count("search:pruned") == (0 if method == "taylor" else 2)


def test_scores_of_an_earlier_run_need_no_prompt_where_none_learns(tmp_path: Path) -> None:
    """The scores of a search without a prompt."""
    tables = {"search.method": "magnitude", "prompt.pixels.kind": "none", "tune.epochs": 1}
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    found, _ = searched_and_tuned(first, tiny.recipe(tables), "pruned")
    again, _ = searched_and_tuned(
        second, tiny.recipe({**tables, "search.found": str(first / "found.safetensors")}), "pruned"
    )
    assert found is not None and again is not None
    assert all(torch.equal(scores, again.scores[name]) for name, scores in found.scores.items())


@pytest.mark.parametrize("stages", ["both", "tune"])
def test_tune_starts_where_the_search_ended_or_at_zero(tmp_path: Path, stages: str) -> None:
    """At a rate that is 0 in float32, no step is taken."""
    settled = tiny.recipe(
        {"prompt.pixels.stages": stages, "search.epochs": 1, "tune.epochs": 1, "tune.prompt_lr": 1e-60}
    )
    found, shipped = searched_and_tuned(tmp_path, settled, "pruned")
    assert found is not None and set(shipped) == {"top", "bottom", "left", "right"}
    for name, value in shipped.items():
        start = found.prompt[name] if stages == "both" else torch.zeros_like(value)
        assert torch.equal(value, start), name
