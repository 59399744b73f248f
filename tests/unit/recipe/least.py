"""The least recipe that is enough, with changes laid over it: as a table, parsed, in a file."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe

HERE = Path("/somewhere")
LEAST = {"model": {"name": "cifar_resnet8"}, "data": {"name": "digits"}, "budget": {"macs_ratio": 0.5}}


def merged(changes: dict) -> dict:
    """LEAST with the tables in ``changes`` laid over its own; None removes a key."""
    raw = {table: dict(values) for table, values in LEAST.items()}
    for table, values in changes.items():
        if isinstance(values, dict):
            raw[table] = {k: v for k, v in {**raw.get(table, {}), **values}.items() if v is not None}
        elif values is None:
            del raw[table]
        else:
            raw[table] = values
    return raw


def parse(changes: dict) -> Recipe:
    return parse_recipe(merged(changes), where="r.toml", folder=HERE)


def written(folder: Path, changes: dict) -> Path:
    path = folder / "r.toml"
    path.write_text(tomli_w.dumps(merged(changes)))
    return path
