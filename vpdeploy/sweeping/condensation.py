"""One search, fewer and fewer tokens: which of them stay, by several scores, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vpdeploy import run_folder
from vpdeploy.errors import RecipeError, RunFolderError
from vpdeploy.measure.statistics import paired_difference
from vpdeploy.pipeline import run, search_only
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.report.condensation import condensation_of, render_condensation
from vpdeploy.scoring.condense import count_kept
from vpdeploy.stages import Ledger, Stage, is_done, read_recipe
from vpdeploy.sweeping.points import SHARED, begin_from, command_of, settled, write_pages, written
from vpdeploy.values import AccuracyDifference, Condensation, Report

ALL = "all"  # every token: where the curve begins
SCRATCH = "scratch"  # as few from the start, trained for as long
SCORES = ("gradient", "random", "norm", SCRATCH)
ARM = "pruned"


def condense(
    recipe: Recipe,
    folder: Path,
    *,
    trained: Path | None,
    shares: Sequence[float],
    scores: Sequence[str],
    again: Sequence[str],
    display: Display,
) -> Condensation:
    """Search once; then, for each of ``shares`` of the tokens and each of ``scores``, condense, cut, tune, export and measure.

    trained: a run of ``recipe`` whose search is taken; None to search in ``folder``. again: the words of a command that runs the
    recipe, without its folder. Interrupted, the same call goes on where it stopped.

    Raises: RecipeError for a recipe without tokens to condense, or shares that are out of range; RunFolderError for a run that
    was not searched.
    """
    _check(recipe, shares, scores)
    shared = folder / SHARED if trained is None else trained
    found = (shared / "found.safetensors").resolve()
    names = _names(shares, scores)
    for name in names:
        _point(recipe, name, found)  # what is wrong with one is told before anything is trained
    with run_folder.held(folder):  # the points stand in one condensation.json
        if trained is None:
            search_only(recipe, shared, points=[], command=command_of(again, shared, {}), display=display)
        elif not is_done(Ledger(trained / "stages.json", {}), Stage("search", ARM), read_recipe(trained), run=trained):
            raise RunFolderError(
                f"{trained}: its search is not done; run `vpdeploy prune {trained / 'recipe.toml'} -o {trained}` first"
            )
        before = {name for name in names if (folder / name / "report.json").exists()}
        reports: dict[str, Report] = {}
        commands: dict[str, str] = {}
        made: Condensation | None = None
        begun = read_recipe(shared)  # with nothing left to settle, as the dense arms there were tuned
        for name in names:
            path, of_point = folder / name, _point(begun, name, found)
            commands[name] = command_of(again, path, _values(recipe, name, found))
            if not (path / "stages.json").exists():
                begin_from(shared, path, recipe=of_point)
            display.say(f"{name}:")
            reports[name] = run(of_point, path, command=commands[name], display=display)
            made = condensation_of(reports, commands, differences=_differences(folder, list(reports)))
            if before <= reports.keys():  # what a page of before shows, one of now shows too
                write_pages(folder, "condensation", made, render_condensation(made))
    assert made is not None
    return made


def _names(shares: Sequence[float], scores: Sequence[str]) -> list[str]:
    """Of the points, as their folders are called."""
    return [ALL, *(f"{score}-{written(share)}" for share in shares if share < 1 for score in scores)]


def _values(recipe: Recipe, name: str, found: Path) -> Mapping[str, str | float | int]:
    """What a point has in place of the recipe's."""
    if name == ALL:
        return {"condense.keep": 1.0, "search.found": str(found)}
    score, _, share = name.partition("-")
    if score == SCRATCH:
        return {"condense.keep": 1.0, "prompt.tokens.count": count_kept(float(share), recipe.prompt.tokens.count)}
    return {"condense.keep": float(share), "condense.score": score, "search.found": str(found)}


def _point(recipe: Recipe, name: str, found: Path) -> Recipe:
    return settled(recipe, _values(recipe, name, found), where=f"condense, {name}", folder=found.parent)


def _check(recipe: Recipe, shares: Sequence[float], scores: Sequence[str]) -> None:
    problems = [f"--keep: got {share:g}; expected above 0 and at most 1" for share in shares if not 0 < share <= 1]
    problems += [f"--keep: got {share:g} twice; expected each once" for share in set(shares) if shares.count(share) > 1]
    problems += [
        f"--score: got {score!r}; expected one of {', '.join(SCORES)}, each once"
        for score in dict.fromkeys(scores)
        if score not in SCORES or scores.count(score) > 1
    ]
    if not shares or not scores:
        problems.append("expected at least one share and one score")
    tokens = recipe.prompt.tokens
    learned = tokens.learned_in("search") and tokens.learned_in("tune") and recipe.search.method != "hydra"
    if ARM not in recipe.arms or not learned:
        problems.append(
            "prompt.tokens: expected tokens that the search learns and tuning goes on with, in the arm 'pruned', such as "
            "prompt.tokens.kind = 'vpt-deep' with stages = 'both'"
        )
    if problems:
        raise RecipeError("condense", problems)


def _differences(folder: Path, names: Sequence[str]) -> dict[str, AccuracyDifference]:
    """Each point against all tokens, on the same test images."""
    arrays = {name: run_folder.read_arrays(folder / name / "predictions.npz") for name in names}
    labels, base = arrays[ALL]["labels"], arrays[ALL][ARM]
    return {
        name: paired_difference(base == labels, of[ARM] == labels, predictions_a=base, predictions_b=of[ARM])
        for name, of in arrays.items()
        if name != ALL
    }
