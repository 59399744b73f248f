"""From exported files to measurements of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vpdeploy import run_folder
from vpdeploy.data.raw import raw_batches
from vpdeploy.data.resize import resize
from vpdeploy.deploy.bake import Deployable
from vpdeploy.errors import DataError, ParityError
from vpdeploy.measure.accuracy import predictor, walk
from vpdeploy.measure.arms import disagreement, measure_latencies, measure_layers, measure_memories, settings_to_report
from vpdeploy.measure.engines import Subject
from vpdeploy.measure.environment import environment
from vpdeploy.measure.layers import layers_of
from vpdeploy.measure.macs import count_macs, preprocessing_macs
from vpdeploy.measure.settings import settings_of
from vpdeploy.measure.statistics import wilson
from vpdeploy.recipe.tables import BenchTable, Recipe
from vpdeploy.shipping.export import baked
from vpdeploy.shipping.tokens import measure_tokens
from vpdeploy.stages import Stage, measurement_file, measuring_machine_file, onnx_file, skipped_file
from vpdeploy.values import Latency, Measurement
from vpdeploy.workbench import Workbench

TEST_BATCH = 64


def measure_arms(work: Workbench) -> None:
    """Accuracy on the test split, MACs, parameters, bytes, latency and memory of every exported file."""
    stage, recipe = Stage("bench"), work.recipe
    work.require([Stage("export")], command=f"vpdeploy export {work.run}")
    if work.is_done(stage):
        return
    files = {arm: {form: onnx_file(work.run, arm, form) for form in recipe.export.forms} for arm in recipe.arms}
    with work.doing(stage):
        labels, predictions = _predictions(work, files)
        settings, seconds = settings_to_report(recipe), recipe.bench.seconds
        latencies = measure_latencies(_subjects(work, files), recipe=recipe, settings=settings, seconds=seconds)
        for arm, forms in files.items():
            right = predictions[arm] == labels
            by_torch = float((predictions[f"torch {arm}"] == labels).mean())
            _agree(arm, float(right.mean()), by_torch, n=len(labels))
            deployable = baked(work, arm, "float")
            network = deployable.backbone
            counted = count_macs(network, canvas_size=recipe.input.canvas)
            height, width = recipe.bench.image_size
            measurement = Measurement(
                accuracy_top1=float(right.mean()),
                accuracy_top1_interval=wilson(int(right.sum()), len(labels)),
                accuracy_top1_torch=by_torch,
                n=len(labels),
                macs=counted.macs,
                macs_uncounted=counted.uncounted,
                macs_preprocessing=preprocessing_macs(
                    height, width, image_size=recipe.input.image_size, resize_how=recipe.input.resize
                ),
                params=sum(p.numel() for p in network.parameters()),
                file_bytes={form: path.stat().st_size for form, path in forms.items()},
                latency=latencies.arms[arm],
                memory=measure_memories(forms, recipe=recipe),
                layers=layers_of(network, measure_layers(forms, recipe=recipe), counted.by_module),
                compressed_bytes=_compressed(forms) if recipe.search.granularity != "channel" else {},
                folds=deployable.folds,
                tokens=measure_tokens(work, arm),
            )
            run_folder.write_value(measurement_file(work.run, arm), measurement)
        buffer = {"labels": labels, **{arm: predictions[arm] for arm in files}}
        run_folder.write_arrays(work.run / "predictions.npz", buffer)
        run_folder.write_json(measuring_machine_file(work.run), {**environment(), "engines": latencies.engines})


def _compressed(forms: Mapping[str, Path]) -> dict[str, int]:
    """What gzip makes of each file: zeros cost nothing to store."""
    return {form: len(gzip.compress(path.read_bytes(), mtime=0)) for form, path in forms.items()}


def measure_more(work: Workbench, table: BenchTable) -> list[Latency]:
    """Latencies of every arm under the conditions of ``table`` and no others, added to what was measured; those under the same
    are new. Gives those of them that were not steady.
    """
    recipe, stage = work.recipe, Stage("bench")
    work.require([stage], command=f"vpdeploy bench {work.run}")
    files = {arm: {form: onnx_file(work.run, arm, form) for form in recipe.export.forms} for arm in recipe.arms}
    settings = settings_of(table)
    latencies = measure_latencies(_subjects(work, files), recipe=recipe, settings=settings, seconds=table.seconds)
    # Until all is written: rounds of two sessions would stand side by side as if they were of one.
    work.ledger.begin(stage, recipe)
    for arm, more in latencies.arms.items():
        path = measurement_file(work.run, arm)
        measured = run_folder.read_value(path, Measurement)
        new = {row.conditions: row for row in more}
        rows = [new.pop(row.conditions, row) for row in measured.latency]
        run_folder.write_value(path, replace(measured, latency=(*rows, *new.values())))
    path = measuring_machine_file(work.run)
    noted = json.loads(run_folder.read_bytes(path))
    run_folder.write_json(path, {**noted, "engines": {**noted.get("engines", {}), **latencies.engines}})
    work.ledger.finish(stage, recipe)
    return [row for more in latencies.arms.values() for row in more if not row.steady]


def unsteady(run: Path, recipe: Recipe) -> list[Latency]:
    """Of what was measured, those rows whose first and last half disagree."""
    measured = (run_folder.read_value(measurement_file(run, arm), Measurement) for arm in recipe.arms)
    return [row for arm in measured for row in arm.latency if not row.steady]


def _subjects(work: Workbench, files: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, Subject]]:
    """What the engines run: each arm's files, and the networks that they were exported from."""
    return {
        arm: {form: Subject(path, partial(baked, work, arm, form)) for form, path in forms.items()}
        for arm, forms in files.items()
    }


def _predictions(work: Workbench, files: dict[str, dict[str, Path]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels of the test split and what every arm predicts, by its exported file and ("torch ARM") by torch."""
    recipe, source = work.recipe, work.source.test
    form = "uint8" if "uint8" in recipe.export.forms else "float"
    threads = max(recipe.bench.threads)
    predictors: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for arm, forms in files.items():
        predictors[arm] = _from_bytes(predictor(forms[form], form, threads=threads), form, recipe)
        predictors[f"torch {arm}"] = _from_bytes(_by_torch(baked(work, arm, form, folded=False)), form, recipe)
    bad: list[str] = []
    batches = raw_batches(source, max_bad=recipe.data.on_bad_image, batch_size=TEST_BATCH, bad=bad)
    total = -(-len(source) // TEST_BATCH)
    with work.display.bar(batches, label="test images", total=total) as bar:
        labels, predictions = walk(bar, predictors=predictors)
    if len(labels) == 0:
        raise DataError(f"test images: all {len(source)} images are bad, the first: {bad[0]}")
    run_folder.write_lines(skipped_file(work.run, "test"), bad)
    return labels, predictions


def _from_bytes(
    predict: Callable[[np.ndarray], np.ndarray], form: str, recipe: Recipe
) -> Callable[[np.ndarray], np.ndarray]:
    """``predict`` behind the deployed resize, where the form leaves that to the caller."""
    if form == "uint8":
        return predict
    size, how = recipe.input.image_size, recipe.input.resize
    return lambda images: predict(resize(torch.from_numpy(images), size, how=how).numpy())


def _by_torch(deployable: Deployable) -> Callable[[np.ndarray], np.ndarray]:
    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return deployable(torch.from_numpy(images)).argmax(dim=1).numpy()

    return predict


def _agree(arm: str, by_file: float, by_torch: float, *, n: int) -> None:
    if disagreement(by_file, by_torch, n=n):
        raise ParityError(
            f"{arm}: the exported file scores {by_file:.2%} on the test split and torch {by_torch:.2%}; expected the same "
            f"within {max(0.001, 1 / n):.2%}: export again, and report this if it stays"
        )
