"""search.data: scores and prompt from other images than those that the network is tuned on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from vpdeploy import pipeline, run_folder
from vpdeploy.errors import DataError, ModelError, RecipeError, RunFolderError
from vpdeploy.models.cifar_resnet import CifarResNet
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.stages import Stage, training_stages

CLASSES = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """The first digits as a folder of their own."""
    root, digits = tmp_path_factory.mktemp("images"), load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label < CLASSES and number < 400:
            folder = root / ("test" if number < 40 else "train") / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    return root


def recipe(folder: Path, **tables: Any) -> Recipe:
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "digits", "limit_train": 200},
        "input": {"image_size": 8, "canvas_size": 12},
        "prompt": {"pixels": {"size": 2}},
        "compute": {"precision": "fp32", "channels_last": "no", "device": "cpu"},
        "budget": {"macs_ratio": 0.5},
        "compare": {"arms": ["dense", "pruned"]},
        **{name: {"epochs": 1} for name in ("fit", "tune")},
        **tables,
    }
    return parse_recipe(raw, where="r", folder=folder)


def prune(folder: Path, given: Recipe, **more: Any) -> None:
    pipeline.prune(given, folder, command="", display=Display(quiet=True), **more)


def stages_of(run: Path) -> list[str]:
    return [line.split('"stage":')[1].split('"')[1] for line in (run / "history.jsonl").read_text().splitlines()]


def test_scores_and_prompt_come_from_there_and_everything_else_from_here(tmp_path, images):
    given = recipe(tmp_path, search={"epochs": 1, "data": {"name": "imagefolder", "root": str(images)}})
    prune(tmp_path / "run", given)
    assert set(stages_of(tmp_path / "run")) == {"fit", "fit:search", "search:pruned", "tune:dense", "tune:pruned"}
    assert {path.name for path in (tmp_path / "run").glob("skipped.*.txt")} >= {
        "skipped.search.txt",
        "skipped.training.txt",
    }
    there = run_folder.read_network(tmp_path / "run/source.search.safetensors")[0]
    here = run_folder.read_network(tmp_path / "run/pruned.safetensors")[0]
    assert there["linear.weight"].shape[0] == CLASSES and here["linear.weight"].shape[0] == 10
    found = run_folder.read_found(tmp_path / "run/found.safetensors")
    assert found.prompt and not found.tensors and found.label_map is None
    before = stages_of(tmp_path / "run")
    prune(tmp_path / "run", given)
    assert stages_of(tmp_path / "run") == before
    other = recipe(
        tmp_path, search={"epochs": 1, "data": {"name": "imagefolder", "root": str(images), "val_fraction": 0.3}}
    )
    with pytest.raises(RunFolderError, match=r"search\.data\.val_fraction was 0\.1, is 0\.3.*'fit:search'"):
        prune(tmp_path / "run", other)


def test_once_searched_its_images_may_be_gone(tmp_path, images):
    there = tmp_path / "there"
    shutil.copytree(images, there)
    given = recipe(tmp_path, search={"epochs": 1, "data": {"name": "imagefolder", "root": "there"}})
    prune(tmp_path / "run", given)
    shutil.rmtree(there)
    before = stages_of(tmp_path / "run")
    prune(tmp_path / "run", given)
    assert stages_of(tmp_path / "run") == before
    with pytest.raises(DataError, match=r"^search\.data\.root: .* does not exist"):
        prune(tmp_path / "run", given, redo="search")


def test_the_same_data_there_gives_the_same_scores(tmp_path):
    data = {"name": "digits", "limit_train": 200, "augment": "none"}
    prune(tmp_path / "there", recipe(tmp_path, search={"epochs": 1, "data": data}))
    prune(tmp_path / "here", recipe(tmp_path, search={"epochs": 1}, data=data))
    there, here = (run_folder.read_found(tmp_path / name / "found.safetensors") for name in ("there", "here"))
    for name, scores in here.scores.items():
        torch.testing.assert_close(there.scores[name], scores, rtol=0, atol=0)
    for name, value in here.prompt.items():
        torch.testing.assert_close(there.prompt[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("head, rows, moves", [("auto", CLASSES, {"linear"}), ("flm", 10, set())])
def test_the_network_there_learns_what_its_classes_need(tmp_path, images, head, rows, moves):
    """Of published weights nothing is fitted here; there, a new classifier alone, and none where classes are mapped."""
    torch.manual_seed(0)
    published = CifarResNet(1, 10).state_dict()
    save_file(published, tmp_path / "published.safetensors")
    model = {"name": "cifar_resnet8", "weights": "published.safetensors", "head": head}
    given = recipe(tmp_path, model=model, search={"epochs": 1, "data": {"name": "imagefolder", "root": str(images)}})
    prune(tmp_path / "run", given)
    there = run_folder.read_network(tmp_path / "run/source.search.safetensors")[0]
    assert len(there["linear.weight"]) == rows
    moved = {name for name, tensor in there.items() if not torch.equal(tensor, published[name])}
    assert {name.split(".")[0] for name in moved if "running" not in name and "tracked" not in name} == moves
    assert ("fit:search" in stages_of(tmp_path / "run")) == bool(moves)
    found, here = (run_folder.read_tensors(tmp_path / f"run/{name}.safetensors")[1] for name in ("found", "source"))
    assert found["label_map"] == here["label_map"]
    assert (found["label_map"] is None) == (head == "auto")


def test_with_scores_given_nothing_is_fitted_there(tmp_path):
    search = {"found": "x.safetensors", "data": {"name": "digits"}}
    assert Stage("fit", "search") not in training_stages(recipe(tmp_path, search=search))


def test_single_weights_need_as_many_classes(tmp_path, images):
    given = recipe(
        tmp_path,
        search={"epochs": 1, "granularity": "weight", "data": {"name": "imagefolder", "root": str(images)}},
        budget={"weight_ratio": 0.5},
    )
    with pytest.raises(ModelError, match=r"search\.data: its network's classifier has weights of \[3, 64\]"):
        prune(tmp_path / "run", given)


def test_what_is_wrong_with_it_is_told_under_its_own_name(tmp_path):
    with pytest.raises(RecipeError, match=r"search\.data\.root: missing"):
        recipe(tmp_path, search={"data": {"name": "imagefolder"}})
    with pytest.raises(RecipeError, match=r"search\.data\.val_fraction: got 2"):
        recipe(tmp_path, search={"data": {"name": "digits", "val_fraction": 2.0}})
    with pytest.raises(RecipeError, match=r"search\.data\.nam: unknown key; did you mean 'name'"):
        recipe(tmp_path, search={"data": {"nam": "digits"}})
    (tmp_path / "empty").mkdir()
    given = recipe(tmp_path, search={"data": {"name": "imagefolder", "root": "empty"}})
    with pytest.raises(DataError, match=r"^search\.data\.root: "):
        prune(tmp_path / "run", given)
