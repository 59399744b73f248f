"""inspect: what can be removed, what not and why, and how small the network can get, as a table and as JSON."""

from __future__ import annotations

import json
import re
import sys
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
        build_selector(groups, cost, budget=budget, requested=least, round_to=8, max_removal=0.9)
        with pytest.raises(BudgetError, match="the best reachable is"):
            build_selector(groups, cost, budget=budget, requested=least * 0.999, round_to=8, max_removal=0.9)


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


WIDE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
"""
ENDLESS = """
import time
from torch import nn

class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x):
        while True:
            time.sleep(0.01)
"""
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

class Grey(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.first(x).mean((2, 3)))

class Views(Two):
    def forward(self, x):
        return self.head(x.view(-1, 48))

class Flat(Two):
    def forward(self, x):
        return self.head(x.flatten(1))

class Maps(Two):
    def forward(self, x):
        return x

def needs(width):
    return Two()

made = Two()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision:resnet19",
            "error: got 'torchvision:resnet19'; torchvision has no such classifier; did you mean",
        ),
        ("nothing", "error: got 'nothing'; expected a built-in network, 'torchvision:NAME'"),
        ("net.py:Three", "Three"),
        ("net.py:Two", "the forward of Two takes x, y; expected one input, a batch of images"),
        ("net.py:Grey", "images have 3 channels, and it takes 1: wrap it in a network for colour images"),
        (
            "net.py:Views",
            "Views gave a tensor [6272, 10] for 2 images of 3x224x224; expected one row for each: its code",
        ),
        ("net.py:Views", "; give by --size what it needs"),
        ("net.py:Flat", "; give by --size what it needs"),
        (
            "net.py:Maps",
            "[2, 3, 224, 224] of float32 for 2 images; expected its logits, a float tensor [2, classes]: let",
        ),
        ("net.py:made", "where 'made' is of type Two; expected a class or function that returns an nn.Module; it is a"),
        ("net.py:needs", "missing 1 required positional argument: 'width'"),
        ("net.py:Answers", "Answers gave a dictionary with the keys 'logits' for 2 images; expected its logits"),
    ],
)
def test_what_cannot_be_analysed_is_one_message(capsys, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(UNFIT)
    done = here(capsys, "inspect", name, "--json")
    assert (done.status, done.out) == (1, "")
    assert message in done.err and "Traceback" not in done.err and done.err.startswith("error: ")
    assert not re.search(r"model\.(name|head|classifier)|input\.", done.err)  # there is no recipe


ANOTHER = """
from torch import nn

class Another(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.aside = nn.Conv2d(3, 8, 3), nn.Linear(8, 7), nn.Linear(8, 20)

    def forward(self, x):
        return self.head(self.first(x).relu().mean((2, 3)))
"""


def test_by_name_any_number_of_logits_will_do(tmp_path):
    (tmp_path / "net.py").write_text(ANOTHER)
    assert [group.root for group in inspect_model(f"{tmp_path}/net.py:Another", size=8).groups] == ["first", "head"]


def test_what_takes_too_long_is_refused(capsys, monkeypatch):
    monkeypatch.delattr("vpdeploy.inspection.probe")  # stopped before, where the groups are looked for
    for what in ("cifar_resnet8", QUICKSTART):
        done = here(capsys, "inspect", what, "--limit-seconds", "0")
        assert (done.status, done.out) == (1, "")
        assert "the analysis was stopped after 0 s (the limit is 0 s), when" in done.err


def test_what_takes_too_much_memory_is_refused(capsys, tmp_path):
    (tmp_path / "net.py").write_text(WIDE)
    done = here(capsys, "inspect", f"{tmp_path}/net.py:net", "--size", "512", "--limit-gib", "0.05")
    assert (done.status, done.out) == (1, "")
    assert "(the limit is 0.05 GiB), when" in done.err and "--limit-gib" in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
def test_a_forward_without_end_is_refused(capsys, tmp_path):
    (tmp_path / "net.py").write_text(ENDLESS)
    done = here(capsys, "inspect", f"{tmp_path}/net.py:Endless", "--limit-seconds", "1")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(
        "error: the analysis was stopped after 1 s (the limit is 1 s); analyse at a smaller input"
    )


PRINTS = """
from torch import nn
print("imported")

class Prints(nn.Sequential):
    def forward(self, x):
        print("called")
        return super().forward(x)

def net():
    print("made")
    return Prints(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


def test_what_the_users_code_prints_goes_to_stderr(capsys, tmp_path):
    (tmp_path / "net.py").write_text(PRINTS)
    name = f"{tmp_path}/net.py:net"
    for arguments in ((name, "--size", "8"), (QUICKSTART, *settings([f"model.name={name}"]))):
        done = here(capsys, "inspect", *arguments, "--json")
        assert done.status == 0 and json.loads(done.out)["model"] == name
        assert {"imported", "made", "called"} <= set(done.err.splitlines())


def test_the_table_shows_how_much_an_approximate_group_differs(capsys, tmp_path):
    (tmp_path / "net.py").write_text(NORMED)
    chosen = [f"model.name={tmp_path}/net.py:net", "budget.round_to=1", "budget.allow_approximate=true"]
    (group, _, _) = inspect_recipe(load_recipe(QUICKSTART, chosen)).groups
    shown = here(capsys, "inspect", QUICKSTART, *settings(chosen))
    assert shown.status == 0 and group.difference is not None and group.difference > 1e-6
    assert f"{group.difference:.2g} of the largest logit" in " ".join(shown.out.replace("│", " ").split())


LOOKED_AT = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 10)
        self.seen, self.good = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.seen(x, x, x)[0] / self.seen.num_heads
        return self.head((x + self.good(x, x, x)[0]).mean(1))
"""


def test_attention_that_the_network_looks_at_is_told(capsys, tmp_path):
    (tmp_path / "net.py").write_text(LOOKED_AT)
    done = here(capsys, "inspect", f"{tmp_path}/net.py:Net", "--size", "16")
    assert done.status == 0
    assert "attention: 1 modules stand replaced by equal ones" in done.out
    assert "attention: seen keeps its heads: torch.nn.MultiheadAttention: code around it looks at its type" in done.out


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
