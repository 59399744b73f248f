"""Every recipe: resolved, and run in smoke size on stand-in images and weights unless its header says smoke = false."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from integration.command_line import ROOT
from integration.stand_ins import write_images

from vpdeploy import pipeline
from vpdeploy.models.build import build
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import load_recipe, parse_recipe
from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES
from vpdeploy.recipe.tables import Recipe as RecipeModel
from vpdeploy.recipe.writing import dump_recipe

RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
CLASSES = 10  # of the stand-ins, and so of the networks that keep their head
IN_SMOKE_SIZE = (
    "fit.epochs=1",
    "search.epochs=1",
    "tune.epochs=1",
    "data.val_fraction=0.2",
    "data.limit_train=40",
    "data.limit_test=20",
    "bench.seconds=0.001",
    "bench.batches=[1]",
    "bench.threads=[1]",
    'export.forms=["float"]',
    'compare.arms=["dense", "pruned"]',
    'compute.precision="fp32"',
    'compute.channels_last="no"',
)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT / "recipes")) for path in paths]


def runs_in_smoke_size(path: Path) -> bool:
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return "smoke = false" not in header


def stand_ins(recipe: RecipeModel, folder: Path) -> list[str]:
    """Overrides that put generated images and random weights in the place of the recipe's own."""
    values = []
    if recipe.data.root is not None:
        side = recipe.input.image_size
        labels = [f"class {k}" for k in range(CLASSES)]
        write_images(
            folder / "images.zip", classes=labels, each=6, sizes=((side, side + 5), (side + 9, side)), test_each=2
        )
        values.append(f"data.root={folder / 'images.zip'}")
    if recipe.model.weights is not None and recipe.model.weights.endswith(CHECKPOINT_SUFFIXES):
        network = build(recipe.model, classes=CLASSES, seed=0, with_weights=False, source_classes=CLASSES).backbone
        torch.save({"state_dict": network.state_dict()}, folder / "random.th")
        values.append(f"model.weights={folder / 'random.th'}")
    return values


def test_there_are_recipes():
    assert {"quickstart.toml", "cifar10-resnet20.toml"} <= set(names(RECIPES))


@pytest.mark.parametrize("path", RECIPES, ids=names(RECIPES))
def test_a_recipe_resolves_and_says_what_it_is(path):
    recipe = load_recipe(path)
    again = parse_recipe(tomllib.loads(dump_recipe(recipe)), where="again", folder=path.parent)
    assert again == recipe
    header = path.read_text().split("\n\n")[0]
    assert f"vpdeploy run {path.relative_to(ROOT)}" in header


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "vgg16_bn"])
def test_the_papers_recipes_build(network):
    """Each network once: what differs between data sets is no network."""
    paths = [path for path in RECIPES if path.parent.name == "paper" and path.stem.startswith(f"{network}-")]
    recipes = [load_recipe(path) for path in paths]
    assert len(recipes) == 16 and all(recipe.model == recipes[0].model for recipe in recipes)
    built = build(recipes[0].model, classes=CLASSES, seed=0, with_weights=False, source_classes=1000)
    assert built.head == "flm" and built.source_classes == 1000


@pytest.mark.parametrize("path", [path for path in RECIPES if runs_in_smoke_size(path)], ids=lambda path: path.stem)
def test_a_recipe_runs_in_smoke_size(path, tmp_path):
    recipe = load_recipe(path, [*IN_SMOKE_SIZE, *stand_ins(load_recipe(path), tmp_path)])
    report = pipeline.run(recipe, tmp_path / "run", command="a test", display=Display(quiet=True))
    certificate = report.certificates["pruned"]
    assert certificate.reached <= certificate.requested == recipe.budget.requested
    assert report.arms["pruned"].macs < report.arms["dense"].macs
    assert (tmp_path / "run" / "export" / "pruned.float.onnx").is_file()
