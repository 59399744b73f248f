"""Runs that begin from one search: each in a folder of its own, told by what is different in it."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import dump_recipe, with_values
from vpdeploy.stages import Ledger

SHARED = "search"  # the run that all points begin from


def written(amount: float) -> str:
    """Short where that is the same number."""
    return f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)


def settled(recipe: Recipe, values: Mapping[str, Any], *, where: str, folder: Path) -> Recipe:
    """``recipe`` with other ``values`` of dotted keys, read as if it came from disk, where it will be."""
    return parse_recipe(tomllib.loads(dump_recipe(with_values(recipe, dict(values)))), where=where, folder=folder)


def begin_from(shared: Path, path: Path, *, recipe: Recipe) -> None:
    """A run folder in which stage 0 stands done, and the dense arms that ``recipe``, a settled one, tunes alike. It appears under
    its name when it is whole.
    """
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(shared, part, ignore=shutil.ignore_patterns("*.lock", ".lock", "state", "export", "measured"))
    Ledger(part / "stages.json", inputs={}, machine={}).forget("search", recipe)
    part.rename(path)
