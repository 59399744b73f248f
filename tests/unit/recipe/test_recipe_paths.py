"""Paths in a recipe start at its folder, and need not say where on a machine that is."""

from __future__ import annotations

import tomllib

import pytest
from unit.recipe.least import HERE, parse, written

from vpdeploy.recipe.paths import relative_to
from vpdeploy.recipe.reading import load_recipe, parse_recipe
from vpdeploy.recipe.writing import dump_recipe


def test_the_home_folder_of_nobody_is_a_folder_like_any_other():
    assert parse({"data": {"root": "~nobody-of-that-name/x"}}).data.root == str(HERE / "~nobody-of-that-name/x")


def test_relative_paths_start_at_the_recipes_folder(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    changes = {
        "model": {"name": "nets/small.py:make", "weights": "../w.pth"},
        "data": {"name": "imagefolder", "root": "photos.zip"},
    }
    path = written(folder, changes)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path.relative_to(tmp_path))
    assert recipe.model.name == f"{folder / 'nets/small.py'}:make"
    assert recipe.model.weights == str(tmp_path / "w.pth")
    assert recipe.data.root == str(folder / "photos.zip")


def test_a_recipe_can_be_shown_without_the_machines_own_folders(tmp_path):
    changes = {
        "model": {"name": "nets/small.py:make", "weights": "../w.pth"},
        "data": {"name": "imagefolder", "root": "photos.zip"},
    }
    recipe = load_recipe(written(tmp_path, changes))
    run = tmp_path / "runs" / "first"
    shown = dump_recipe(relative_to(recipe, run))
    assert str(tmp_path) not in shown
    assert parse_recipe(tomllib.loads(shown), where="shown", folder=run) == recipe


@pytest.mark.parametrize(
    ("name", "weights"),
    [("cifar_resnet8", None), ("torchvision:resnet18", "IMAGENET1K_V1"), ("package.module:factory", None)],
)
def test_what_is_no_path_stays_as_it_is(name, weights):
    model = parse({"model": {"name": name, "weights": weights}}).model
    assert (model.name, model.weights) == (name, weights)


def test_absolute_paths_stay():
    assert parse({"data": {"name": "imagefolder", "root": "/data/x"}}).data.root == "/data/x"
