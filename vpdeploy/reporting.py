"""The end of the road: one report from what was measured. torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy import run_folder
from vpdeploy.errors import RunFolderError, VpdeployError
from vpdeploy.measure.factors import factors
from vpdeploy.measure.statistics import paired_difference
from vpdeploy.recipe.paths import relative_to
from vpdeploy.recipe.writing import dump_recipe
from vpdeploy.report.compare import About, check_consistency, compare, figure_problems, prompt_pairs
from vpdeploy.report.render import render
from vpdeploy.stages import (
    Ledger,
    Stage,
    arm_file,
    environment_file,
    is_done,
    measurement_file,
    measuring_machine_file,
    read_recipe,
    skipped_file,
)
from vpdeploy.values import AccuracyDifference, Certificate, Measurement, Parities, Price, Report


def write_report(run: Path) -> Report:
    """report.json, report.md and report.html from what was measured.

    Raises: RunFolderError when the run has not been measured yet.
    """
    recipe = read_recipe(run)
    if not is_done(Ledger(run / "stages.json", {}), Stage("bench"), recipe, run=run):
        raise RunFolderError(
            f"{run}: the arms that stand there now are not measured yet; run `vpdeploy export {run}` and "
            f"`vpdeploy bench {run}` first"
        )
    arms = {arm: run_folder.read_value(measurement_file(run, arm), Measurement) for arm in recipe.arms}
    if wrong := [problem for arm, measured in arms.items() for problem in figure_problems(arm, measured)]:
        raise RunFolderError(
            f"{run}: what was measured contradicts itself; run `vpdeploy run {run / 'recipe.toml'} -o {run} --redo bench` to "
            "measure again:" + "".join(f"\n  {problem}" for problem in wrong)
        )
    others = [arm for arm in arms if arm != "dense"]
    pruned = [arm for arm in arms if arm.startswith("pruned")]
    command, trained_in = _noted(environment_file(run))
    about = About(
        title=f"{recipe.model.name.rpartition('/')[2]} on {recipe.data.name}",
        recipe=dump_recipe(relative_to(recipe, run)),
        command=command,
        environment=_measured_in(measuring_machine_file(run), trained_in=trained_in),
        skipped_images=_skipped(run),
        price=run_folder.read_value(path, Price) if (path := run / "price.json").exists() else None,
    )
    made = compare(
        arms,
        factors={arm: factors(arms["dense"], arms[arm], seed=recipe.seed) for arm in others},
        accuracy_difference=_differences(run, dict.fromkeys(others, "dense")),
        prompt_difference=_differences(run, prompt_pairs(arms)),
        certificates={arm: _certificate(run, arm) for arm in pruned},
        history=[
            row for row in run_folder.read_history(run / "history.jsonl") if row.stage.partition(":")[2] in ("", *arms)
        ],
        about=about,
    )
    prompt, example = _pictures(run)
    pages = render(made, prompt=prompt, canvas_example=example)
    run_folder.write_value(run / "report.json", made)
    run_folder.write_bytes(run / "report.md", pages.markdown.encode())
    run_folder.write_bytes(run / "report.html", pages.html.encode())
    return made


def read_report(run: Path) -> Report:
    """What `vpdeploy report` wrote.

    Raises: RunFolderError when there is none, or it is damaged, or contradicts itself.
    """
    read_recipe(run)
    again = f"run `vpdeploy report {run}`"
    path = run / "report.json"
    found = run_folder.load(Report, run_folder.read_bytes(path, again=again), where=str(path), again=again)
    try:
        check_consistency(found)
    except VpdeployError as e:
        raise RunFolderError(f"{path}: {e}") from e
    return found


def _noted(path: Path) -> tuple[str, dict[str, Any]]:
    """The command and the environment that `prune` noted."""
    try:
        noted = json.loads(run_folder.read_bytes(path))
        return str(noted["command"]), dict(noted["environment"])
    except (ValueError, KeyError, TypeError) as e:
        raise RunFolderError(
            f"{path}: damaged: {e!r}; remove it and run the same `vpdeploy run` again, which writes it anew"
        ) from e


def _measured_in(path: Path, *, trained_in: dict[str, Any]) -> dict[str, Any]:
    """The environment that `bench` noted, and where it differs from that, the one that trained."""
    try:
        noted = dict(json.loads(run_folder.read_bytes(path)))
    except (ValueError, TypeError) as e:
        raise RunFolderError(f"{path}: damaged: {e!r}; remove it and run `vpdeploy bench` again") from e
    differs = {key: value for key, value in trained_in.items() if noted.get(key) != value}
    return {**noted, **({"training": differs} if differs else {})}


def _skipped(run: Path) -> tuple[str, ...]:
    paths = [skipped_file(run, splits) for splits in ("training", "search", "test")]
    return tuple(line for path in paths if path.exists() for line in run_folder.read_bytes(path).decode().splitlines())


def _certificate(run: Path, arm: str) -> Certificate:
    certificate = run_folder.read_value(arm_file(run, "certificate.json", arm), Certificate)
    parities = run_folder.read_value(arm_file(run, "parity.json", arm), Parities)
    return replace(certificate, torch_vs_onnx=parities.forms)


def _differences(run: Path, pairs: Mapping[str, str]) -> dict[str, AccuracyDifference]:
    """Of each arm against the other one of its pair."""
    arrays = run_folder.read_arrays(run / "predictions.npz")
    labels = arrays["labels"]

    def difference(base: np.ndarray, arm: np.ndarray) -> AccuracyDifference:
        return paired_difference(base == labels, arm == labels, predictions_a=base, predictions_b=arm)

    return {arm: difference(arrays[base], arrays[arm]) for arm, base in pairs.items()}


def _pictures(run: Path) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The learned prompt [3, C, C] of the pruned arm and one prompted canvas, uint8 [C, C, 3]; None without a prompt."""
    path = run / "prompt.npz"
    if not path.exists():
        return None, None
    arrays = run_folder.read_arrays(path)
    return arrays["prompt"], arrays["canvas"]
