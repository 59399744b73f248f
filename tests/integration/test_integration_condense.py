"""``vpdeploy condense``: one search, fewer and fewer tokens, beside baselines."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.command_line import fresh, here

from vpdeploy import run_folder
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import load_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import read_found, read_value
from vpdeploy.sweeping import condensation
from vpdeploy.values import Condensation, Measurement, Report

NETWORK = """
from torchvision.models import VisionTransformer


def vit():
    return VisionTransformer(image_size=12, patch_size=4, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=32, num_classes=10)
"""
RECIPE = """
[model]
name = "net.py:vit"

[data]
name = "digits"
limit_train = 256
limit_test = 64

[input]
image_size = 8
canvas_size = 12

[prompt.pixels]
kind = "none"

[prompt.tokens]
kind = "vpt-deep"
count = 10

[fit]
epochs = 2

[search]
method = "vpns"
epochs = 1

[tune]
epochs = 1

[budget]
macs_ratio = 0.7
round_to = 1

[compare]
arms = ["dense", "pruned"]

[export]
forms = ["float"]

[bench]
seconds = 0.1
threads = [1]
batches = [1]

[compute]
precision = "fp32"
"""
NAMES = ["all", "gradient-0.35", "scratch-0.35"]
OPTIONS = ("--keep", "1,0.35", "--score", "gradient,scratch")


@pytest.fixture(scope="module")
def condensed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("condense")
    (folder / "net.py").write_text(NETWORK)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder, fresh("condense", str(folder / "recipe.toml"), "-o", str(folder / "out"), *OPTIONS)


def made_in(folder: Path) -> Condensation:
    return read_value(folder / "condensation.json", Condensation)


def test_every_point_keeps_what_it_says(condensed):
    folder, done = condensed
    assert done.status == 0, done.err
    found = made_in(folder / "out")
    assert [point.run for point in found.points] == NAMES
    assert [point.tokens for point in found.points] == [20, 7, 8]  # of 2 x 10; 4, of 3.5, in each block from the start
    assert found.points[0].difference is None
    labels = run_folder.read_arrays(folder / "out" / "all" / "predictions.npz")["labels"]
    for point in found.points:
        arrays = run_folder.read_arrays(folder / "out" / point.run / "predictions.npz")
        assert point.accuracy_top1 == np.mean(arrays["pruned"] == labels)
        if point.difference:
            assert point.difference.difference == pytest.approx(
                point.accuracy_top1 - found.points[0].accuracy_top1, abs=1e-9
            )
        assert point.published.macs > point.shipped.macs


def test_there_is_one_search_and_one_dense_network(condensed):
    folder = condensed[0] / "out"
    searched = read_found(folder / "search" / "found.safetensors")
    for name in NAMES:
        same = [
            (folder / name / file).read_bytes() == (folder / "search" / file).read_bytes()
            for file in ("source.safetensors", "dense.safetensors")
        ]
        assert same == [True, True]
        trained = {json.loads(line)["stage"] for line in (folder / name / "history.jsonl").read_text().splitlines()}
        assert trained >= {"tune:pruned"}
        found = read_found(folder / name / "found.safetensors")
        assert (found.scores.keys() == searched.scores.keys()) and name.startswith("scratch") != all(
            bool((found.scores[root] == row).all()) for root, row in searched.scores.items()
        )
    told = condensed[1].err
    assert told.count("tune:dense ...") == 1 and told.count("price ...") == 2
    assert len(re.findall(r"^tune:pruned \.\.\.$", told, re.M)) == len(NAMES)


def test_the_page_has_a_curve_and_the_command_of_each_point(condensed):
    folder = condensed[0] / "out"
    page = (folder / "condensation.html").read_text()
    assert "<svg" in page and "--set condense.keep=0.35" in page and "prompt.tokens.count=4" in page
    assert "src=" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert "against all, points" in (folder / "condensation.md").read_text()


def test_again_it_does_nothing_and_a_trained_run_is_condensed_alone(condensed, capsys, tmp_path):
    folder = condensed[0]
    before = (folder / "out" / "all" / "stages.json").read_bytes()
    done = here(capsys, "condense", str(folder / "recipe.toml"), "-o", str(folder / "out"), *OPTIONS)
    assert done.status == 0 and "epoch" not in done.err
    assert (folder / "out" / "all" / "stages.json").read_bytes() == before

    run = tmp_path / "trained"
    shutil.copytree(folder / "out" / "all", run)
    options = ("--keep", "0.4", "--score", "random")
    done = here(capsys, "condense", str(run), "-o", str(tmp_path / "few"), *options)
    assert done.status == 0, done.err
    assert "search:pruned  epoch" not in done.err and "tune:dense  epoch" not in done.err
    assert [point.run for point in made_in(tmp_path / "few").points] == ["all", "random-0.4"]
    recipe = tomllib.loads((tmp_path / "few" / "random-0.4" / "recipe.toml").read_text())
    assert recipe["condense"]["score"] == "random"
    assert read_value(tmp_path / "few" / "random-0.4" / "measured" / "pruned.json", Measurement).tokens is not None


def test_a_page_never_loses_a_point(condensed, monkeypatch):
    """Interrupted while it goes through what is there."""
    folder = condensed[0] / "out"
    page, run = (folder / "condensation.html").read_bytes(), condensation.run

    def interrupted(recipe: Recipe, path: Path, **options: Any) -> Report:
        if path.name != "all":
            raise KeyboardInterrupt
        return run(recipe, path, **options)

    monkeypatch.setattr(condensation, "run", interrupted)
    recipe = load_recipe(condensed[0] / "recipe.toml", [])
    with pytest.raises(KeyboardInterrupt):
        condensation.condense(
            recipe,
            folder,
            trained=None,
            shares=(1.0, 0.35),
            scores=("gradient", "scratch"),
            again=(),
            display=Display(),
        )
    assert [point.run for point in made_in(folder).points] == NAMES
    assert (folder / "condensation.html").read_bytes() == page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "0.5,0.5,2"), "--keep: got 2; expected above 0 and at most 1\n  --keep: got 0.5 twice"),
        (("--score", "taylor"), "--score: got 'taylor'; expected one of gradient, random, norm, scratch, each once"),
        (
            ("--set", "prompt.tokens.kind=none"),
            "prompt.tokens: expected tokens that the search learns and tuning goes on with, in the arm",
        ),
        (
            ("--keep", "1", "--set", "prompt.tokens.stages=search"),
            "prompt.tokens: expected tokens that the search learns and tuning goes on with, in the arm",
        ),
        (
            ("--set", "search.method=hydra"),
            "prompt.tokens: expected tokens that the search learns and tuning goes on with, in the arm",
        ),
    ],
)
def test_what_cannot_be_condensed_is_told_before_anything_is_trained(condensed, capsys, tmp_path, options, message):
    done = here(capsys, "condense", str(condensed[0] / "recipe.toml"), "-o", str(tmp_path / "out"), *options)
    assert done.status == 1 and message in done.err
    assert not (tmp_path / "out").exists()
