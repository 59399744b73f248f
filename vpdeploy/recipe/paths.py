"""The paths in a recipe: absolute once it is read, relative where it is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES, Recipe


def absolute(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with every path absolute, so that it means the same from anywhere."""
    return _with_paths(recipe, lambda path: str((folder / os.path.expanduser(path)).resolve()))


def relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe for a file in ``folder``: no path of it says where on a machine that is."""
    return _with_paths(recipe, lambda path: Path(os.path.relpath(path, folder)).as_posix())


def _with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    model, data, search = recipe.model, recipe.data, recipe.search
    file, colon, factory = model.name.rpartition(":")
    if colon and file.endswith(".py"):
        model = model.model_copy(update={"name": f"{change(file)}:{factory}"})
    if model.weights and model.weights.endswith(CHECKPOINT_SUFFIXES):
        model = model.model_copy(update={"weights": change(model.weights)})
    if data.root:
        data = data.model_copy(update={"root": change(data.root)})
    if search.data and search.data.root:
        search = search.model_copy(update={"data": search.data.model_copy(update={"root": change(search.data.root)})})
    if search.found:
        search = search.model_copy(update={"found": change(search.found)})
    return recipe.model_copy(update={"model": model, "data": data, "search": search})
