"""inspect: what can be removed, what not and why, and how small the network can get, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.command_line import QUICKSTART, here, settings

from vpdeploy.errors import BudgetError
from vpdeploy.inspection import inspect_recipe
from vpdeploy.models.build import build
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.writing import with_values
from vpdeploy.scoring.select import build_selector
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups


@pytest.fixture(scope="module")
def found():
    return inspect_recipe(load_recipe(QUICKSTART))


def test_every_group_is_shown_with_its_members_and_its_share(found):
    assert found.model == "cifar_resnet8"
    assert {group.status for group in found.groups} == {"exact", "excluded"}
    for group in found.groups:
        assert group.root in group.members and 0 < group.macs_share <= 1
        if group.status == "excluded":
            assert group.reason and group.narrowest == group.width
        else:
            assert not group.reason and 0 < group.narrowest < group.width
    # The classes are never cut.
    (head,) = [group for group in found.groups if group.root == "linear"]
    assert (head.status, head.width) == ("excluded", 10)


def test_the_reachable_ratio_is_the_least_budget_that_selection_takes(found):
    recipe = load_recipe(QUICKSTART)
    network, canvas = build(recipe.model, classes=10, seed=recipe.seed).backbone, recipe.input.canvas
    groups = probe(network, find_groups(network, example_input(canvas)), canvas_size=canvas).prunable
    cost = build_cost_model(network, groups, example=example_input(canvas, batch=1))
    for budget, least in (("macs_ratio", found.min_macs_ratio_exact), ("params_ratio", found.min_params_ratio_exact)):
        build_selector(groups, cost, budget=budget, ratio=least, round_to=8, max_removal=0.9)
        with pytest.raises(BudgetError, match="the best reachable is"):
            build_selector(groups, cost, budget=budget, ratio=least * 0.999, round_to=8, max_removal=0.9)


def test_a_smaller_max_removal_leaves_more(found):
    cautious = inspect_recipe(with_values(load_recipe(QUICKSTART), {"budget.max_removal": 0.5}))
    assert cautious.min_macs_ratio_exact > found.min_macs_ratio_exact
    assert (cautious.macs, cautious.params) == (found.macs, found.params)


def test_the_table_and_the_json_say_the_same(capsys, found):
    shown = here(capsys, "inspect", QUICKSTART)
    assert (shown.status, shown.err) == (0, "")
    for group in found.groups:
        assert any(group.root in line and group.status in line for line in shown.out.splitlines())
    assert f"{found.macs:,} MACs, {found.params:,} parameters; exact groups can reach macs_ratio" in shown.out
    done = here(capsys, "inspect", QUICKSTART, "--json")
    assert (done.status, done.err) == (0, "")
    plain = json.loads(done.out)
    assert plain | {"seconds": 0} == json.loads(json.dumps(found.as_json())) | {"seconds": 0}


def test_nothing_is_trained_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert here(capsys, "inspect", QUICKSTART, *settings(["fit.epochs=100000"])).status == 0
    assert list(Path(".").iterdir()) == []
