"""One search, many cut-offs: the same scores cut at several budgets, each tuned, and the front of what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpdeploy import run_folder
from vpdeploy.errors import BudgetError, RecipeError
from vpdeploy.pipeline import run, search_only
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import BUDGETS, RATIOS, Recipe
from vpdeploy.report.sweep import render_sweep, sweep_of
from vpdeploy.stages import read_recipe
from vpdeploy.sweeping.points import SHARED, begin_from, command_of, settled, write_pages, written
from vpdeploy.values import Report, Sweep


def sweep(
    recipe: Recipe, folder: Path, *, kind: str, amounts: Sequence[float], again: Sequence[str], display: Display
) -> Sweep:
    """Search once under the recipe's own budget; then cut, tune, export and measure at each of ``amounts`` of budget ``kind``.

    again: the words of a command that runs this recipe, without its folder and budget. Interrupted, the same call goes on
    where it stopped.

    Raises: RecipeError for amounts that are out of range, or that the recipe's limits contradict; BudgetError for one that cannot
    be reached: before anything is trained where that is known then, otherwise after all others are done.
    """
    _check(kind, amounts)
    found = (folder / SHARED / "found.safetensors").resolve()
    recipes = {amount: at_budget(recipe, kind, amount, found) for amount in amounts}  # before anything is trained
    with run_folder.held(folder):  # the points stand in one sweep.json
        command = command_of(again, folder / SHARED, {})
        search_only(recipe, folder / SHARED, points=[*recipes.values()], command=command, display=display)
        reports: dict[str, Report] = {}
        commands: dict[str, str] = {}
        missed: dict[float, str] = {}
        made: Sweep | None = None
        for amount, of_point in recipes.items():
            name = f"{kind}-{written(amount)}"
            path = folder / name
            values: dict[str, Any] = {f"budget.{kind}": amount, "search.found": found}
            if recipe.budget.speed != of_point.budget.speed:
                values["budget.speed"] = "false"
            commands[name] = command_of(again, path, values)
            if not (path / "stages.json").exists():
                begin_from(folder / SHARED, path, recipe=read_recipe(folder / SHARED))
            display.say(f"{kind} {amount:g}:")
            try:
                reports[name] = run(of_point, path, command=commands[name], display=display)
            except BudgetError as e:  # what only measuring tells: the other points are none the worse
                display.say(f"{kind} {amount:g}: not reached")
                missed[amount] = str(e)
                continue
            made = sweep_of(reports, commands)
            write_pages(folder, "sweep", made, render_sweep(made))
    if made is None or missed:
        told = "".join(f"\n  {amount:g}: {reason}" for amount, reason in missed.items())
        stands = f"; the others are in {folder / 'sweep.html'}" if made else ""
        raise BudgetError(
            f"--{kind.replace('_', '-')}: {len(missed)} of {len(amounts)} could not be reached{stands}; leave them out, or "
            f"ask as told:{told}"
        )
    return made


def _check(kind: str, amounts: Sequence[float]) -> None:
    expected = "above 0 and at most 1" if kind in RATIOS else "a finite number above 0"
    problems = [
        f"--{kind.replace('_', '-')}: got {amount:g}; expected {expected}"
        for amount in amounts
        if not 0 < amount <= (1 if kind in RATIOS else sys.float_info.max)
    ]
    names = [written(amount) for amount in amounts]  # as folders are called
    twice = [amount for number, amount in enumerate(amounts) if names[number] in names[:number]]
    problems += [f"--{kind.replace('_', '-')}: got {amount:g} twice; expected each once" for amount in twice]
    if problems or not amounts:
        raise RecipeError("sweep", problems or ["expected at least one budget, such as --macs-ratio 0.7,0.5"])


def at_budget(recipe: Recipe, kind: str, amount: float, found: Path) -> Recipe:
    """Under this budget alone, from the scores in ``found``; read as if it came from disk, where it will be."""
    values = {f"budget.{other}": None for other in BUDGETS} | {f"budget.{kind}": amount, "search.found": str(found)}
    if kind.startswith("latency"):
        values["budget.speed"] = False  # importance is weighed against time in any case
    return settled(recipe, values, where=f"sweep, {kind} {amount:g}", folder=found.parent)
