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
    groups = probe(network, find_groups(network, example_input(canvas)), example=example_input(canvas)).prunable
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
    measured = {"seconds": 0, "peak_rss_mib": 0}  # of another run
    assert plain | measured == json.loads(json.dumps(found.as_json())) | measured


FACTORY = """
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.Conv2d(8, 16, 1)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        x = self.b(self.a(x).relu()).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

def net():
    return Net()
"""


def test_a_share_is_all_that_goes_with_the_group(capsys, tmp_path):
    """Attention by heads: the products of queries, keys and values, outside every layer, go with the heads."""
    (tmp_path / "net.py").write_text(FACTORY)
    recipe = with_values(load_recipe(QUICKSTART), {"model.name": f"{tmp_path}/net.py:net"})
    found, area = inspect_recipe(recipe), recipe.input.canvas**2
    by_root = {group.root: group for group in found.groups}
    scores = 2 * 16 * area**2  # each position with each, twice
    assert found.macs == (27 * 8 + 8 * 16 + 4 * 16 * 16) * area + scores + 16 * 10
    expected = {
        "a.parametrizations.weight.original1": (27 * 8 + 8 * 16) * area,
        "b": (8 * 16 + 3 * 16 * 16) * area,
        "attention.q": 4 * 16 * 16 * area + scores,
        "attention.proj": 16 * 16 * area + 16 * 10,
        "head": 16 * 10,
    }
    assert {root: group.macs_share for root, group in by_root.items()} == pytest.approx(
        {root: macs / found.macs for root, macs in expected.items()}
    )
    assert {root: (group.width, group.status) for root, group in by_root.items()} == {
        "a.parametrizations.weight.original1": (8, "excluded"), "b": (16, "exact"), "attention.q": (2, "exact"),
        "attention.proj": (16, "exact"), "head": (10, "excluded"),
    }  # fmt: skip
    shown = here(capsys, "inspect", QUICKSTART, *settings([f"model.name={tmp_path}/net.py:net"]))
    assert (shown.status, shown.err) == (0, "")
    (line,) = [line for line in shown.out.splitlines() if "attention.q" in line]
    assert f"{100 * by_root['attention.q'].macs_share:.1f}%" in line


def test_nothing_is_trained_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert here(capsys, "inspect", QUICKSTART, *settings(["fit.epochs=100000"])).status == 0
    assert list(Path(".").iterdir()) == []
