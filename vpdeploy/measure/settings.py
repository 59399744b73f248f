"""How networks are run, from the tables of a recipe."""

from __future__ import annotations

from itertools import product

from vpdeploy.measure.engines import Setting
from vpdeploy.recipe.tables import BenchTable, TargetTable


def setting_of(table: TargetTable) -> Setting:
    return Setting(table.engine, table.threads, table.batch, table.device, table.precision)


def settings_of(table: BenchTable) -> list[Setting]:
    """Every engine with every thread count and batch."""
    return [
        Setting(engine, threads=threads, batch=batch, device=table.device, precision=table.precision)
        for engine, threads, batch in product(table.engines, table.threads, table.batches)
    ]
