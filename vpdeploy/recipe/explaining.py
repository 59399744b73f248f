"""What pydantic says of a recipe's keys, one line each, in words of ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic_core import ErrorDetails

from vpdeploy.recipe.tables import Recipe, Table, table_in


def explain(errors: Sequence[ErrorDetails]) -> list[str]:
    """One line for each place that pydantic's errors speak of."""
    by_place: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        if error["type"] == "too_short" and len(error["input"]) >= error.get("ctx", {})["min_length"]:
            continue  # pydantic counts right items only: what is wrong are the items, told at their own places
        by_place.setdefault(_place(_whole(error)), []).append(error)
    return [_line(place, errors) for place, errors in by_place.items()]


def wrong_keys(errors: Sequence[ErrorDetails]) -> list[tuple[str, ...]]:
    """The recipe's keys that pydantic's errors speak of."""
    return [_key(error["loc"]) for error in errors]


def _table(path: Sequence[str]) -> type[Table] | None:
    """The table at ``path``, None where a value stands there, or nothing."""
    table: Any = Recipe
    for part in path:
        info = table.model_fields.get(part)
        found = None if info is None else table_in(info.annotation)
        if found is None:
            return None
        table = found
    return table


def _key(loc: Sequence[str | int]) -> tuple[str, ...]:
    """The recipe's key in one of pydantic's locations: below a value come list positions and branches of unions."""
    parts = [str(part) for part in loc]
    return tuple(part for i, part in enumerate(parts) if _table(parts[:i]) is not None)


def _whole(error: ErrorDetails) -> Sequence[str | int]:
    """Where ``error`` is: what lacks in a list is a problem of the list."""
    loc = error["loc"]
    return loc[:-1] if error["type"] == "missing" and isinstance(loc[-1], int) else loc


def _place(loc: Sequence[str | int]) -> str:
    """The dotted key, and the position in it: bench.batches[0]."""
    return ".".join(_key(loc)) + "".join(f"[{part}]" for part in loc if isinstance(part, int))


def _length(key: Sequence[str]) -> int | None:
    """How many values the list at ``key`` takes; None for any number, and for what is no list."""
    table = _table(key[:-1])
    info = table.model_fields.get(key[-1]) if table else None
    parts = get_args(info.annotation) if info and get_origin(info.annotation) is tuple else (...,)
    return None if ... in parts else len(parts)


# pydantic's kind of error -> what was expected, in its own words and with its context filled in
EXPECTED = {
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "a text that is not empty",
}


def _line(place: str, errors: Sequence[ErrorDetails]) -> str:
    """One line for what pydantic says of one place: key, what came, what was expected (each branch of a union)."""
    error, key = errors[0], _key(errors[0]["loc"])
    table, kind, got = _table(key[:-1]), error["type"], error["input"]
    known = table.model_fields if table else {}
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return f"{place}: unknown key; {advice}"
    length = _length(key) if kind in ("missing", "too_long") else None
    if length is not None:
        return f"{place}: got {got!r}; expected {length} numbers"
    if kind == "missing":
        return f"{place}: missing; expected {known[key[-1]].description or 'this table'}"
    expected = " or ".join(_expected(one) for one in errors)
    if kind == "string_too_short" and not known[key[-1]].is_required():
        expected += ": leave the key out for none"
    near = difflib.get_close_matches(str(got), [w.strip("'") for w in _words(expected)], n=1, cutoff=0.6)
    advice = f"; did you mean {near[0]!r}?" if near and kind == "literal_error" else ""
    return f"{place}: got {got!r}; expected {expected}{advice}"


def _expected(error: ErrorDetails) -> str:
    words = EXPECTED.get(error["type"])
    return words.format(**error.get("ctx", {})) if words else error["msg"]


def _words(text: str) -> list[str]:
    return text.replace(" or ", ", ").split(", ")
