"""Measure all arms of a run side by side: every latency in one interleaved session, every setting for every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vpdeploy.measure.engines import Setting, Subject, check_engine
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.layers import layer_times
from vpdeploy.measure.memory import measure_memory
from vpdeploy.measure.settings import setting_of, settings_of
from vpdeploy.recipe.tables import Recipe
from vpdeploy.values import Conditions, Latency, Memory

Subjects = Mapping[str, Mapping[str, Subject]]  # arm -> form -> what runs


@dataclass(frozen=True)
class Latencies:
    """Arm -> its distributions, and engine -> what it said of itself."""

    arms: Mapping[str, tuple[Latency, ...]]
    engines: Mapping[str, Mapping[str, Any]]


def measure_latencies(subjects: Subjects, *, recipe: Recipe, settings: Sequence[Setting], seconds: float) -> Latencies:
    """One distribution of every arm for every form of the recipe and each of ``settings``, of so many ``seconds``; the float form
    first.

    Raises: VpdeployError for an engine that is not there, before anything is timed.
    """
    # By conditions: a device by its name and the engine's first may be the same.
    rows: dict[str, dict[Conditions, Latency]] = {arm: {} for arm in subjects}
    engines: dict[str, Mapping[str, Any]] = {}
    for setting in settings:
        check_engine(setting)
    for form, setting in product(_forms(recipe), settings):
        images = random_images(form, image_shape(form, recipe), batch=setting.batch, seed=recipe.seed)
        timed = measure_latency(
            {arm: forms[form] for arm, forms in subjects.items()},
            images,
            form=form,
            setting=setting,
            seconds=seconds,
        )
        engines[setting.engine] = {key: value for key, value in timed.about.items() if key != "threads"}
        for arm, row in timed.latencies.items():
            rows[arm][row.conditions] = row
    return Latencies({arm: tuple(of_arm.values()) for arm, of_arm in rows.items()}, engines)


def settings_to_report(recipe: Recipe) -> list[Setting]:
    """Those of [bench], and where a latency budget has to hold."""
    target = [setting_of(recipe.target)] if "latency_ms" in recipe.budget.measured else []
    return list(dict.fromkeys([*settings_of(recipe.bench), *target]))


def measure_memories(files: Mapping[str, Path], *, recipe: Recipe) -> tuple[Memory, ...]:
    """Peak memory of one arm's files: at the first thread count with the smallest and largest batch, and where a budget has to
    hold.
    """
    threads, target = recipe.bench.threads[0], recipe.target
    places = {(batch, threads) for batch in (min(recipe.bench.batches), max(recipe.bench.batches))}
    if "memory_mib" in recipe.budget.measured:
        places.add((target.batch, target.threads))
    rows = (
        measure_memory(files[form], form=form, image_shape=image_shape(form, recipe), batch=batch, threads=threads)
        for form in _forms(recipe)
        for batch, threads in sorted(places)
    )
    return tuple(row for row in rows if row is not None)


def measure_layers(files: Mapping[str, Path], *, recipe: Recipe) -> dict[str, float]:
    """Milliseconds of each module of one arm: of its float form where there is one, with one image and the fewest threads."""
    form = _forms(recipe)[0]
    images = random_images(form, image_shape(form, recipe), batch=1, seed=recipe.seed)
    return layer_times(files[form], images, setting=Setting(threads=min(recipe.bench.threads)))


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
