"""The grid of ``paper.py``: which runs it holds, and the recipe of each."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpdeploy.recipe.tables import Recipe

ONCE = ("random", "magnitude", "taylor", "fisher", "snip", "grasp", "synflow")  # methods that search without epochs


@dataclass(frozen=True)
class Cell:
    """One run of the grid. ``recipe``: a hash of all its settings, so that what ran with others is not taken for it."""

    method: str
    budget: str
    ratio: float
    seed: int
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget}-{self.ratio:g}-{self.seed}-{self.recipe}"


def read_grid(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def cells(grid: Mapping[str, Any], *, only: Sequence[str] = ()) -> Iterator[Cell]:
    """Seed by seed, so that a grid that is cut off has whole seeds."""
    for seed in grid["seeds"]:
        for budget, ratios in grid["budgets"].items():
            for ratio in ratios:
                for method in grid["methods"]:
                    if not only or method in only:
                        place = {"method": method, "budget": budget, "ratio": float(ratio), "seed": int(seed)}
                        yield Cell(**place, recipe=hash_of(raw_recipe(grid, **place)))


def hash_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def raw_recipe(grid: Mapping[str, Any], *, method: str, budget: str, ratio: float, seed: int) -> dict[str, Any]:
    """The recipe of one run, as a file would hold it."""
    raw = json.loads(json.dumps(grid["recipe"]))
    given = dict(grid["methods"][method])
    epochs = given.pop("epochs", grid["epochs"])
    searches = 0 if given.get("search.method", "vpns") in ONCE else given.get("search.epochs", 5)
    given.setdefault("tune.epochs", epochs - searches)
    for key, value in {**given, "seed": seed, f"budget.{budget}": ratio}.items():
        *path, last = key.split(".")
        table = raw
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    raw.setdefault("compare", {}).setdefault("arms", ["dense", "pruned"])
    return raw


def recipe_of(grid_file: Path, cell: Cell) -> Recipe:
    from vpdeploy.recipe.reading import parse_recipe

    raw = raw_recipe(read_grid(grid_file), method=cell.method, budget=cell.budget, ratio=cell.ratio, seed=cell.seed)
    return parse_recipe(raw, where=grid_file.name, folder=grid_file.parent)


def folder_of(cell: Cell, out: Path) -> Path:
    return out / "runs" / cell.name


def dense_folder(recipe: Recipe, out: Path) -> Path:
    """Where the dense network lies that ``recipe`` starts from: one for each seed, input, head and fit."""
    from vpdeploy.stages import Stage, values_read

    return out / "dense" / f"{recipe.seed}-{hash_of(values_read(Stage('fit'), recipe))}"
