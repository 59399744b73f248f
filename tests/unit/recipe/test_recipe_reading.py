"""A recipe is read from its file, every key of it can be overridden, and no torch is imported for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from unit.recipe.least import parse, written

from vpdeploy.errors import RecipeError
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.writing import flatten


def test_the_least_recipe_is_enough():
    recipe = parse({})
    assert recipe.budget.kind == "macs_ratio" and recipe.budget.requested == 0.5
    assert recipe.arms == ("dense", "dense+prompt", "pruned")


def test_what_a_recipe_does_not_say_of_its_input_is_asked_for(tmp_path):
    asked = []

    def own_input(model):
        asked.append(model.name)
        return {"image_size": 40, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}

    path = written(tmp_path, {"model": {"name": "net.py:f"}, "input": {"mean": [0.5, 0.5, 0.5]}})
    read = load_recipe(path, own_input=own_input).input
    assert (read.image_size, read.canvas, read.mean, read.std) == (40, 40, (0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    assert asked == [f"{tmp_path}/net.py:f"]
    load_recipe(path, ["input.image_size=8", "input.std=[1, 1, 1]", "prompt.pixels.size=2"], own_input=own_input)
    assert len(asked) == 1  # of a recipe that says it all, nobody is asked


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device):
    assert parse({"compute": {"device": device}}).compute.device == device


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.toml: 1 problem\n  no such file; expected a recipe in TOML, such as"):
        load_recipe(tmp_path / "no.toml")


def test_a_folder_and_an_unreadable_file(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="cannot be read: .*directory"):
        load_recipe(tmp_path)
    path = written(tmp_path, {})

    def refused(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)
        with pytest.raises(RecipeError, match="cannot be read: .*Permission denied"):
            load_recipe(path)


def test_what_is_no_text_and_no_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read: .*utf-8"):
        load_recipe(path)
    path.write_text("[model\nname = 3")
    with pytest.raises(RecipeError, match=r"not valid TOML: .*line 1"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("tune.epochs=3", "tune.epochs", 3),
        (" tune.epochs = 3", "tune.epochs", 3),
        ("tune.weight_lr=1e-3", "tune.weight_lr", 0.001),
        ("seed=11", "seed", 11),
        ("prompt.pixels.kind=fix", "prompt.pixels.kind", "fix"),
        ('prompt.pixels.kind="fix"', "prompt.pixels.kind", "fix"),
        ("search.per_cost=true", "search.per_cost", True),
        ("bench.batches=[1, 4]", "bench.batches", [1, 4]),
        ('export.forms=["float"]', "export.forms", ["float"]),
        ("data.root=a=b.zip", "data.root", str(Path("a=b.zip"))),
        ("data.root=the photos [new].zip", "data.root", str(Path("the photos [new].zip"))),
    ],
)
def test_set_replaces_a_key(tmp_path, text, key, value):
    recipe = load_recipe(written(tmp_path, {}), [text])
    assert flatten(recipe)[key] == (str(tmp_path / value) if key == "data.root" else value)


def test_set_of_one_budget_replaces_the_other(tmp_path):
    recipe = load_recipe(written(tmp_path, {}), ["budget.channel_ratio=0.3"])
    assert (recipe.budget.kind, recipe.budget.requested) == ("channel_ratio", 0.3)
    recipe = load_recipe(written(tmp_path, {}), ["budget.round_to=4"])
    assert (recipe.budget.kind, recipe.budget.round_to) == ("macs_ratio", 4)


def test_the_last_set_wins(tmp_path):
    assert load_recipe(written(tmp_path, {}), ["tune.epochs=3", "tune.epochs=4"]).tune.epochs == 4


def test_what_is_wrong_with_set_is_told_with_the_rest(tmp_path):
    path = written(tmp_path, {"tune": {"epochs": 0}})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["tune.epochs", "=3", "seed.x=3", "tune.epoch=4", "tune.batch_size=", "tune.optimizer=sgdd"])
    told = [line.split(":")[0] for line in caught.value.problems]
    assert told[:2] == ["--set tune.epochs", "--set =3"]
    assert sorted(told[2:]) == ["seed", "tune.batch_size", "tune.epoch", "tune.epochs", "tune.optimizer"]
    assert "got no key=value; expected for example --set tune.epochs=3" in caught.value.problems[0]
    with pytest.raises(RecipeError, match="--set tune.epochs.x=1: epochs is a value, not a table"):
        load_recipe(path, ["tune.epochs.x=1"])


def test_checking_a_recipe_does_not_import_torch(tmp_path):
    path = written(tmp_path, {})
    code = (
        "import sys; from pathlib import Path; from vpdeploy.recipe.reading import load_recipe;"
        "load_recipe(Path(sys.argv[1]));"
        "print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_budgets_in_one_command_are_an_error_and_one_takes_the_place_of_the_recipes_own(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[model]\nname = 'cifar_resnet8'\n[data]\nname = 'digits'\n[budget]\nmacs_ratio = 0.5\n")
    assert load_recipe(path, ["budget.latency_ms=1"]).budget.kind == "latency_ms"
    with pytest.raises(RecipeError, match="--set: got budget.latency_ms and budget.file_mib; expected one"):
        load_recipe(path, ["budget.latency_ms=1", "budget.file_mib=2"])
