"""The paper's comparison: its grids are recipes, and what is said of its rows is what they say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarked import BENCHMARKS, loaded
from scipy import stats

from vpdeploy.recipe.tables import SearchTable, TuneTable

GRIDS = sorted((BENCHMARKS / "grids").glob("*.toml"))

rows = loaded("paper_rows")
grids = loaded("paper_grid")
paper = loaded("paper")


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_run_of_a_grid_is_a_recipe(path: Path) -> None:
    grid = grids.read_grid(path)
    for cell in grids.cells(grid):
        recipe = grids.recipe_of(path, cell)
        searches = 0 if recipe.search.method in grids.ONCE else recipe.search.epochs
        assert (recipe.seed, getattr(recipe.budget, cell.budget)) == (cell.seed, cell.ratio)
        epochs = grid["methods"][cell.method].get("epochs", grid["epochs"])
        assert searches + recipe.tune.epochs == epochs, cell.name
        assert epochs == grid["epochs"] or cell.method.endswith("-longer")  # the same for all whose name does not tell


@pytest.mark.parametrize("name", ["cifar10-resnet20", "cifar10-resnet56"])
def test_the_row_that_is_called_the_default_is_it(name: str) -> None:
    path = BENCHMARKS / "grids" / f"{name}.toml"
    for cell in grids.cells(grids.read_grid(path), only=["fisher"]):
        recipe = grids.recipe_of(path, cell)
        asked = {"epochs": recipe.search.epochs, "batch_size": recipe.search.batch_size}
        default = SearchTable(**asked)
        told = {"per_cost": default.weighs_cost}
        assert recipe.search == default.model_copy(update=told)
        assert (recipe.tune.distill, recipe.tune.teacher) == (0.9, TuneTable().teacher)  # no head is replaced


def test_an_ablation_changes_one_thing() -> None:
    """Everything of it lies in one table, or is the size of the image on its canvas."""
    grid = grids.read_grid(BENCHMARKS / "grids" / "cifar10-resnet20-ablations.toml")
    raw = {
        method: flat(grids.raw_recipe(grid, method=method, budget="macs_ratio", ratio=0.33, seed=0))
        for method in grid["methods"]
    }
    base = raw.pop("vpns")
    seen = set()
    for method, values in raw.items():
        changed = {key: values.get(key) for key in base.keys() | values.keys() if base.get(key) != values.get(key)}
        assert changed, method
        assert len({key.partition(".")[0] for key in changed} - {"input"}) <= 1, (method, changed)
        seen.add(tuple(sorted(changed.items(), key=str)))
    assert len(seen) == len(raw)  # no two are the same


def row(method: str = "vpns", seed: int = 0, *, ratio: float = 0.5, top1: float = 0.8) -> Any:
    return rows.Row(
        method=method, budget="macs_ratio", ratio=ratio, seed=seed, recipe="0a", macs_ratio=ratio, params_ratio=0.5,
        channel_ratio=0.7, layer_ratio=0.7, top1_dense_val=0.9, top1_cut_val=0.5, top1_norms_val=0.6, top1_val=top1,
        top1_dense_test=math.nan, top1_test=math.nan,
        epochs_search=4, epochs_tune=8, steps=100, cpu_minutes_search=1.0, cpu_minutes_tune=2.0, wall_minutes=3.0,
        threads=2, machine="a CPU, torch 2", commit="0a1b2c3",
    )  # fmt: skip


def test_rows_are_kept_once_and_read_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    first, other = row(top1=0.1 + 0.2), row("random")
    for one in (first, other):
        rows.hand_over(one, tmp_path)
    rows.take_over(tmp_path)
    assert {one.name for one in rows.read_rows(tmp_path)} == {first.name, other.name}
    assert repr(next(one for one in rows.read_rows(tmp_path) if one.method == "vpns")) == repr(first)
    opened = replace(first, top1_test=0.7, top1_dense_test=0.8)
    rows.hand_over(opened, tmp_path)
    rows.take_over(tmp_path)
    assert len(rows.read_rows(tmp_path)) == 2 and opened in rows.read_rows(tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == []


def test_a_changed_setting_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its row is not taken for the grid's any more, and what has no row is named."""
    path = tmp_path / "grid.toml"
    text = """epochs = 3\nseeds = [0, 1]\nbudgets.macs_ratio = [0.5]\nrecipe.model.name = "resnet18"\n
    [methods.random]\n"search.method" = "random"\n"tune.weight_lr" = 0.1\n"""
    path.write_text(text)
    (tmp_path / "runs").mkdir()
    ran = [cell.name for cell in grids.cells(grids.read_grid(path))]
    for cell in grids.cells(grids.read_grid(path)):
        rows.hand_over(replace(row("random", cell.seed), recipe=cell.recipe), tmp_path)
    rows.take_over(tmp_path)
    assert [found.name for found in paper.rows_of(path, tmp_path, test=False)] == ran
    assert paper.rows_of(path, tmp_path, test=True) == []  # test was not opened
    assert capsys.readouterr().err == f"Not run: 2 of 2: {', '.join(ran)}\n"
    path.write_text(text.replace("0.1", "0.2"))
    assert paper.rows_of(path, tmp_path, test=False) == []
    other = [cell.name for cell in grids.cells(grids.read_grid(path))]
    assert set(ran).isdisjoint(other) and len({*ran, *other}) == 4


def test_what_a_resumed_run_took_is_not_known() -> None:
    assert rows.known_mean([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(rows.known_mean([math.nan]))


def test_differences_are_paired_and_have_students_interval() -> None:
    pairs = [0.5, 1.25, -0.25, 0.75]
    low, high = stats.ttest_1samp(pairs, 0).confidence_interval()
    assert rows.difference(pairs) == f"{np.mean(pairs):+.2f} ({low:+.2f} to {high:+.2f})"
    assert rows.difference([0.5]) == "+0.50" and rows.difference([]) == "–"


def test_ranks_of_equal_ones_are_shared() -> None:
    assert rows.ranked([0.3, 0.1, 0.3, 0.2]) == [3.5, 1, 3.5, 2]


def test_the_table_pairs_seeds_and_ranks_means(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        *(row("vpns", seed, top1=0.80 + 0.01 * seed) for seed in range(3)),
        *(row("random", seed, top1=0.79 + 0.01 * seed) for seed in range(1, 4)),  # seed 3 has nothing beside it
        *(row(method, 0, ratio=0.33, top1=top1) for method, top1 in (("vpns", 0.6), ("random", 0.7))),
    ]
    rows.print_table(given, against="vpns", test=False)
    text = capsys.readouterr().out
    assert "| vpns | 3 | 81.00 ± 1.00 |" in text
    assert "| random | 3 | 81.00 ± 1.00 |" in text and "| -1.00 (-1.00 to -1.00) |" in text
    # At 0.5 the seeds that both have, 1 and 2, give vpns 81.5 and random 80.5; at 0.33 random is ahead.
    assert "| vpns | 1.50 |" in text and "| random | 1.50 |" in text
    assert "| vpns | 1 | 60.00 |" in text  # one seed has no deviation


def test_figures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    rows.draw([row(method, seed) for method in ("vpns", "random") for seed in range(2)], tmp_path, test=False)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"macs", "channels", "layers", "time", "cost"}
    assert all(path.read_text().startswith("<?xml") for path in (tmp_path / "figures").iterdir())
