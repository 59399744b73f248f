"""inspect: what can be removed, what not and why, and how small the network can get, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.command_line import QUICKSTART, here, settings

from vpdeploy.errors import BudgetError
from vpdeploy.inspection import inspect_model, inspect_recipe
from vpdeploy.models.build import build
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.writing import with_values
from vpdeploy.scoring.select import build_selector
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.limit import Limit


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
    assert found.attention == {"attention": "heads:torch.nn.MultiheadAttention"}  # by recipe and by name
    assert inspect_model(f"{tmp_path}/net.py:net", size=16).attention == found.attention


NORMED = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""


def test_what_exact_groups_reach_leaves_approximate_ones_whole(tmp_path):
    (tmp_path / "net.py").write_text(NORMED)
    recipe = with_values(load_recipe(QUICKSTART), {"model.name": f"{tmp_path}/net.py:net", "budget.round_to": 1})
    exact, also = (inspect_recipe(with_values(recipe, {"budget.allow_approximate": take})) for take in (False, True))
    assert [group.status for group in exact.groups] == ["excluded", "exact", "excluded"]
    assert [group.status for group in also.groups] == ["approximate", "exact", "excluded"]
    assert exact.groups[0].narrowest == exact.groups[0].width == 8 > also.groups[0].narrowest  # of two channels each
    first, last = 27 * 16, 10  # per pixel, and once
    inner, outer = ((recipe.input.canvas - 2 * i) ** 2 for i in (2, 1))
    least, dense = ((first * outer + 9 * 16 * b * inner + last * b) for b in (also.groups[1].narrowest, 8))
    assert exact.min_macs_ratio_exact == also.min_macs_ratio_exact == pytest.approx(least / dense)


# --- by name ------------------------------------------------------------------------------------------------------------

KEYS = {"model", "macs", "params", "groups", "min_macs_ratio_exact", "seconds", "peak_rss_mib"}
GROUP_KEYS = {"root", "members", "width", "macs_share", "status", "reason"}


def test_a_published_network_by_its_name(capsys):
    done = here(capsys, "inspect", "torchvision:resnet18", "--size", "64", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert found.keys() >= KEYS and found["model"] == "torchvision:resnet18" and found["size"] == 64
    # On paper: the stem, the 16 convolutions of the blocks at 16, 8, 4 and 2 pixels, 3 shortcuts, the head.
    stem, first = 49 * 3 * 64 * 32**2, 4 * 9 * 64 * 64 * 16**2
    others = sum((9 * 2 + 2 + 3 * 9 * 4) * c * c * side**2 for c, side in ((64, 8), (128, 4), (256, 2)))
    assert found["macs"] == stem + first + others + 512 * 1000
    assert found["params"] == 11_689_512
    assert 0 < found["min_macs_ratio_exact"] < 0.1 and found["seconds"] < 60 and found["peak_rss_mib"] > 100
    assert all(group.keys() >= GROUP_KEYS for group in found["groups"])
    by_root = {group["root"]: group for group in found["groups"]}
    assert {group["status"] for group in found["groups"]} == {"exact", "excluded"} and len(by_root) == 13
    assert (by_root["fc"]["status"], by_root["fc"]["reason"]) == ("excluded", "its channels are the network's outputs")
    assert by_root["layer1.0.conv1"]["members"] == ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]
    assert by_root["layer1.0.conv1"]["macs_share"] == pytest.approx(first / 2 / found["macs"])


def test_a_name_alone_is_analysed_at_its_own_size(capsys):
    shown = here(capsys, "inspect", "cifar_resnet8")
    assert (shown.status, shown.err) == (0, "")
    assert "input 32 x 32" in shown.out and "layer1.0.conv1" in shown.out
    assert inspect_model("cifar_resnet8").as_json() | {"seconds": 0, "peak_rss_mib": 0} == inspect_model(
        "cifar_resnet8", size=32
    ).as_json() | {"seconds": 0, "peak_rss_mib": 0}


def test_a_file_and_its_factory(capsys, tmp_path):
    (tmp_path / "net.py").write_text(FACTORY)
    done = here(capsys, "inspect", f"{tmp_path}/net.py:net", "--size", "16", "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert [group["root"] for group in found["groups"] if group["status"] == "exact"] == [
        "b",
        "attention.q",
        "attention.proj",
    ]
    (computed,) = [g for g in found["groups"] if g["root"].startswith("a.parametrizations")]
    assert computed["status"] == "excluded" and "remove_parametrizations" in computed["reason"]


UNFIT = """
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 10)

    def forward(self, x, y):
        return self.head((x * y).flatten(1)[:, :48])

class Answers(Two):
    def forward(self, x):
        return {"logits": super().forward(x, x)}
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision:resnet19",
            "model.name: got 'torchvision:resnet19'; torchvision has no such classifier; did you mean",
        ),
        ("nothing", "model.name: got 'nothing'; expected a built-in network, 'torchvision:NAME'"),
        ("net.py:Three", "Three"),
        ("net.py:Two", "the forward of Two takes x, y; expected one input, a batch of images"),
        ("net.py:Answers", "Answers gave a dictionary with the keys 'logits' for 2 images; expected its logits"),
    ],
)
def test_what_cannot_be_analysed_is_one_message(capsys, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(UNFIT)
    done = here(capsys, "inspect", name, "--json")
    assert (done.status, done.out) == (1, "")
    assert message in done.err and "Traceback" not in done.err and done.err.startswith("error: ")


def test_what_takes_too_long_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("vpdeploy.inspection.Limit", lambda: Limit(seconds=0))
    monkeypatch.delattr("vpdeploy.inspection.probe")  # stopped before, where the groups are looked for
    done = here(capsys, "inspect", "cifar_resnet8")
    assert (done.status, done.out) == (1, "")
    assert "the analysis was stopped after 0 s (the limit is 0 s), when" in done.err


def test_a_size_goes_with_a_model_and_overrides_with_a_recipe(capsys):
    for arguments, message in (
        ((QUICKSTART, "--size", "64"), "--size goes with a model"),
        (("cifar_resnet8", "--set", "seed=1"), "--set goes with a recipe"),
        (("cifar_resnet8", "--size", "0"), "Invalid value for '--size'"),
    ):
        done = here(capsys, "inspect", *arguments)
        assert (done.status, done.out) == (2, "") and message in done.err


def test_nothing_is_trained_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert here(capsys, "inspect", QUICKSTART, *settings(["fit.epochs=100000"])).status == 0
    assert list(Path(".").iterdir()) == []
