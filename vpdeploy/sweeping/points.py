"""Runs that begin from one search: each in a folder of its own, told by what is different in it."""

from __future__ import annotations

import shlex
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpdeploy import run_folder
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import dump_recipe, with_values
from vpdeploy.report.render import Pages
from vpdeploy.stages import Ledger

SHARED = "search"  # the run that all points begin from


def written(amount: float) -> str:
    """Short where that is the same number."""
    return f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)


def settled(recipe: Recipe, values: Mapping[str, Any], *, where: str, folder: Path) -> Recipe:
    """``recipe`` with other ``values`` of dotted keys, read as if it came from disk, where it will be."""
    return parse_recipe(tomllib.loads(dump_recipe(with_values(recipe, dict(values)))), where=where, folder=folder)


def command_of(again: Sequence[str], path: Path, values: Mapping[str, Any]) -> str:
    """What gives the run in ``path`` again. again: the words of a command for its recipe; values: what is different in it."""
    told = (f"{key}={written(value) if isinstance(value, float) else value}" for key, value in values.items())
    return shlex.join([*again, "-o", str(path), *(word for text in told for word in ("--set", text))])


def write_pages(folder: Path, name: str, made: Any, pages: Pages) -> None:
    """``made`` as JSON, and both of its pages."""
    run_folder.write_value(folder / f"{name}.json", made)
    run_folder.write_bytes(folder / f"{name}.md", pages.markdown.encode())
    run_folder.write_bytes(folder / f"{name}.html", pages.html.encode())


def begin_from(shared: Path, path: Path, *, recipe: Recipe) -> None:
    """A run folder in which stage 0 stands done, and the dense arms that ``recipe``, a settled one, tunes alike. It appears under
    its name when it is whole.
    """
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(shared, part, ignore=shutil.ignore_patterns("*.lock", ".lock", "state", "export", "measured"))
    Ledger(part / "stages.json", inputs={}, machine={}).forget("search", recipe)
    part.rename(path)
