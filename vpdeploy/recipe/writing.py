"""A recipe written down: as TOML, as dotted keys with their values, as a hash; and with some of the values replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import tomli_w

from vpdeploy.recipe.tables import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every key in it. ``parse_recipe(tomllib.loads(text))`` gives the same recipe back."""
    return tomli_w.dumps(_without_none(recipe.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, for comparing and hashing parts of a recipe."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and prefix != "model.args":
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            yield prefix, value

    return dict(walk("", recipe.model_dump(mode="json")))


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of the resolved recipe, as it stands in the metadata of every exported file."""
    return hashlib.sha256(json.dumps(flatten(recipe), sort_keys=True).encode()).hexdigest()


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with some dotted keys replaced; the result is checked like any other."""
    raw = recipe.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        table = raw
        for part in path:
            table = table[part]
        table[last] = value
    return Recipe.model_validate(raw)
