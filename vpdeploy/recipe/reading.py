"""A recipe: one TOML file that says everything a run depends on. Strict: every problem is found, and all are told at once."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vpdeploy.errors import ModelError, RecipeError
from vpdeploy.recipe.explaining import explain, wrong_keys
from vpdeploy.recipe.paths import absolute
from vpdeploy.recipe.problems import Problem, cross_field
from vpdeploy.recipe.tables import BUDGETS, BenchTable, ModelTable, Recipe


def _nothing_further(recipe: Recipe) -> Iterable[Problem]:
    return ()


def _nothing_known(model: ModelTable) -> Mapping[str, Any]:
    return {}


def load_recipe(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    own_input: Callable[[ModelTable], Mapping[str, Any]] = _nothing_known,
    further: Callable[[Recipe], Iterable[Problem]] = _nothing_further,
) -> Recipe:
    """The recipe in ``path`` with ``key=value`` overrides applied; relative paths start at the recipe's folder.

    ``own_input`` tells the network's own [input] keys, for those that the recipe is silent about.

    Raises: RecipeError with every problem of the file and of the overrides, and what ``further`` finds beside them.
    """
    where = str(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(where, ["no such file; expected a recipe in TOML, such as recipes/quickstart.toml"]) from None
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(where, [f"cannot be read: {e}"]) from e
    except tomllib.TOMLDecodeError as e:
        raise RecipeError(where, [f"not valid TOML: {e}"]) from e
    problems = [problem for text in overrides for problem in _override(raw, text)]
    problems += _two_budgets(overrides)
    return parse_recipe(
        raw, where=where, folder=path.resolve().parent, earlier_problems=problems, own_input=own_input, further=further
    )


def bench_table(given: Mapping[str, Any], *, base: BenchTable) -> BenchTable:
    """``base`` with what was given on the command line: key of [bench] -> value.

    Raises: RecipeError with every problem at once.
    """
    try:
        return BenchTable.model_validate({**base.model_dump(), **given})
    except ValidationError as e:
        raise RecipeError("bench", explain([{**error, "loc": ("bench", *error["loc"])} for error in e.errors()])) from e


def parse_recipe(
    raw: dict[str, Any],
    *,
    where: str,
    folder: Path,
    earlier_problems: Sequence[str] = (),
    own_input: Callable[[ModelTable], Mapping[str, Any]] = _nothing_known,
    further: Callable[[Recipe], Iterable[Problem]] = _nothing_further,
) -> Recipe:
    """Check ``raw`` and make its relative paths absolute from ``folder``.

    ``further`` is given the recipe with every wrong key at its default; what it says of wrong keys is not told.
    Raises: RecipeError with every problem at once.
    """
    problems, wrong = list(earlier_problems), []
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as e:
        problems += explain(e.errors())
        wrong = wrong_keys(e.errors())
        recipe = _without(raw, wrong)
    recipe, unknown = _with_own_input(recipe, absolute(recipe, folder).model, own_input)
    dotted = [".".join(key) for key in [*wrong, *unknown]]
    resolved = absolute(recipe, folder)
    found = [*cross_field(recipe, raw), *further(resolved)]
    problems += [text for keys, text in found if not any(_overlap(a, b) for a in keys for b in dotted)]
    if problems:
        raise RecipeError(where, problems)
    return resolved


def _with_own_input(
    recipe: Recipe, model: ModelTable, own_input: Callable[[ModelTable], Mapping[str, Any]]
) -> tuple[Recipe, list[tuple[str, ...]]]:
    """The recipe with what it does not say of its input filled in, and the keys for which nothing could be found."""
    silent = [key for key in ("image_size", "mean", "std") if key not in recipe.input.model_fields_set]
    if not silent:
        return recipe, []
    try:
        own = own_input(model)
    except ModelError:  # a wrong network is told where names are checked; what would follow from its size is not
        return recipe, [("input", key) for key in silent]
    values = {key: own[key] for key in silent if key in own}
    return recipe.model_copy(update={"input": recipe.input.model_copy(update=values)}), []


def _two_budgets(overrides: Sequence[str]) -> Iterator[str]:
    """One takes the place of the recipe's own; of two it is not known which is meant."""
    keys = dict.fromkeys(text.partition("=")[0].strip() for text in overrides)
    given = [key for key in keys if key in {f"budget.{name}" for name in BUDGETS}]
    if len(given) > 1:
        yield f"--set: got {' and '.join(given)}; expected one budget; budget.limits takes hard ones beside it"


def _override(raw: dict[str, Any], text: str) -> Iterator[str]:
    """Apply one ``key=value`` of --set to ``raw``; yields what is wrong with it."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        yield f"--set {text}: got no key=value; expected for example --set tune.epochs=3"
        return
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # bare words are strings: --set data.root=photos.zip
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            yield f"--set {text}: {part} is a value, not a table"
            return
    if parts[:-1] == ["budget"] and parts[-1] in BUDGETS:
        for name in BUDGETS:
            table.pop(name, None)
    table[parts[-1]] = parsed


def _without(raw: dict[str, Any], wrong: Sequence[tuple[str, ...]]) -> Recipe:
    """``raw`` with every wrong key at its default, so that cross-field checks can speak of the right ones."""
    rest = copy.deepcopy(raw)
    for *path, last in wrong:
        table = rest
        for part in path:
            table = table.get(part, {})
        table.pop(last, None)
    rest.setdefault("model", {}).setdefault("name", "?")
    rest.setdefault("data", {}).setdefault("name", "?")
    rest.setdefault("budget", {})
    if rest.get("search", {}).get("data") is not None:
        rest["search"]["data"].setdefault("name", "?")
    return Recipe.model_validate(rest)


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are the same, or one lies in the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
