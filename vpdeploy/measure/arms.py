"""Measure all arms of a run side by side: every latency in one interleaved session, every setting for every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.memory import measure_memory
from vpdeploy.recipe.tables import Recipe
from vpdeploy.values import Latency, Memory

Files = Mapping[str, Mapping[str, Path]]  # arm -> form -> file


def measure_latencies(files: Files, *, recipe: Recipe) -> dict[str, tuple[Latency, ...]]:
    """Arm -> one distribution for every form, thread count and batch of the recipe; the float form first."""
    table, found = recipe.bench, {arm: [] for arm in files}
    for form in _forms(recipe):
        for threads in table.threads:
            for batch in table.batches:
                rows = measure_latency(
                    {arm: forms[form] for arm, forms in files.items()},
                    form=form,
                    image_shape=image_shape(form, recipe),
                    batch=batch,
                    threads=threads,
                    seconds=table.seconds,
                    seed=recipe.seed,
                )
                for arm, row in rows.items():
                    found[arm].append(row)
    return {arm: tuple(rows) for arm, rows in found.items()}


def measure_memories(files: Mapping[str, Path], *, recipe: Recipe) -> tuple[Memory, ...]:
    """Peak memory of one arm's files, at the first thread count and the smallest and largest batch."""
    threads, batches = recipe.bench.threads[0], sorted({min(recipe.bench.batches), max(recipe.bench.batches)})
    rows = (
        measure_memory(files[form], form=form, image_shape=image_shape(form, recipe), batch=batch, threads=threads)
        for form in _forms(recipe)
        for batch in batches
    )
    return tuple(row for row in rows if row is not None)


def image_shape(form: str, recipe: Recipe) -> Sequence[int]:
    """One image as ``form`` takes it in the benchmark."""
    side = recipe.input.image_size
    return (3, side, side) if form == "float" else (*recipe.bench.image_size, 3)


def _forms(recipe: Recipe) -> list[str]:
    return sorted(recipe.export.forms)  # "float" is the headline and comes first


def disagreement(onnx_accuracy: float, torch_accuracy: float, *, n: int) -> float:
    """How far the exported file's accuracy is from torch's beyond what is allowed, max(0.1 point, one image); 0 when within."""
    excess = abs(onnx_accuracy - torch_accuracy) - max(0.001, 1 / n)
    return excess if excess > 1e-12 and not math.isnan(excess) else 0.0
