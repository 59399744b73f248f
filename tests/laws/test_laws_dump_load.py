"""Law 3: what is written is what is read, to the type: 1 is not 1.0, a tuple is not a list, a key 0 is not "0"."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpdeploy import values
from vpdeploy.errors import RunFolderError
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import dump_recipe, flatten, recipe_hash
from vpdeploy.run_folder import dump, load, read_found, read_history, write_found
from vpdeploy.values import EpochRecord, Found, PrunePlan

WITH_TENSORS = (values.Dense, values.Found, values.Tuned)
NOUNS = [
    noun
    for noun in vars(values).values()
    if dataclasses.is_dataclass(noun) and isinstance(noun, type) and noun not in WITH_TENSORS
]
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: FLOATS,
    str: st.text(max_size=8),
    bool: st.booleans(),
    Any: PLAIN,
    type(None): st.none(),
}


def of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotation in ``vpdeploy.values``."""
    if kind in LEAVES:
        return LEAVES[kind]
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):  # or a named tuple
        return st.builds(kind, **{name: of(hint) for name, hint in hints(kind).items()})  # type: ignore[arg-type]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(of, args))
    if origin is Mapping:
        return st.dictionaries(of(args[0]), of(args[1]), max_size=2)
    assert origin in (typing.Union, types.UnionType), f"no strategy for {kind}"
    return st.one_of(*map(of, args))


def hints(kind: Any) -> dict[str, Any]:
    return {k: v for k, v in typing.get_type_hints(kind).items() if k != "schema"}  # the schema is checked apart


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(map(type, a)) == list(map(type, b)) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
@given(data=st.data())
def test_every_noun_comes_back_as_it_was(noun, data):
    value = data.draw(of(noun))
    content = dump(value)
    assert json.loads(content)["schema"] == 1
    assert same(load(noun, content, where="file"), value)


def test_a_plan_keeps_whole_numbers_as_keys_and_tuples():
    plan = PrunePlan(
        fits={"conv.weight": (4, 3, 1, 1)},
        kept={"conv.weight": {0: (0, 2), 1: (1,)}},
        attributes={"conv": {"out_channels": 2}, "norm": {"normalized_shape": (2,)}},
        widths={"conv": (4, 2)},
    )
    back = load(PrunePlan, dump(plan), where="plan.json")
    assert same(back, plan)
    assert list(back.kept["conv.weight"]) == [0, 1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "damaged"),
        (b"[]", "damaged"),
        (b'{"schema": 1, "fits": 3}', "damaged"),
        (b'{"schema": 2}', "got schema 2; expected 1: it was written by another version"),
        (b"{}", "got schema None; expected 1"),
    ],
)
def test_a_damaged_file_is_named(content, told):
    with pytest.raises(RunFolderError, match=f"plan.json: {told}"):
        load(PrunePlan, content, where="plan.json")


@given(record=of(EpochRecord))
@settings(max_examples=5)
def test_a_line_of_history_is_an_epoch(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "history.jsonl"
    path.write_text(json.dumps({"schema": 1, **dataclasses.asdict(record)}) + "\n" + '{"schema": 1, "sta')
    assert same(read_history(path), (record,))


# --- Found ----------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 9).to(dtype)


@given(data=st.data())
def test_found_comes_back_bit_for_bit(data, tmp_path_factory):
    parts = [data.draw(st.dictionaries(NAMES, tensors(), max_size=3)) for _ in range(3)]
    found = Found(*parts, label_map=data.draw(st.none() | st.lists(st.integers(0, 999)).map(tuple)))
    path = tmp_path_factory.mktemp("run") / "found.safetensors"
    write_found(path, found)
    back = read_found(path)
    assert same(back.label_map, found.label_map)
    for before, after in zip(parts, (back.scores, back.prompt, back.tensors), strict=True):
        assert before.keys() == after.keys()
        assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


def test_a_damaged_found_is_named(tmp_path):
    path = tmp_path / "found.safetensors"
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_found(path)
    write_found(path, Found({"conv": torch.ones(2)}, {}, {}))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match="found.safetensors: damaged"):
        read_found(path)


# --- Recipe ---------------------------------------------------------------------------------------------------------

FOLDERS = st.text(st.characters(codec="utf-8", exclude_characters="\0~"), min_size=1, max_size=6)
SHARE = st.floats(0.05, 0.95)
ARGS = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | FLOATS
    | st.text(max_size=5)
    | st.lists(st.integers(0, 9), max_size=2),
    max_size=3,
)


def table(optional: dict[str, st.SearchStrategy[Any]], **required: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(required, optional=optional)


BUDGETS = st.sampled_from(["channel_ratio", "macs_ratio", "params_ratio"])
PIXELS = {"kind": st.sampled_from(["pad", "fix", "random"]), "stages": st.sampled_from(["both", "tune"])}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    size = draw(st.integers(16, 64))
    canvas = {"canvas_size": st.integers(size, 99), "std": st.just([1.0, 0.5, 0.25])}
    raw = {
        "seed": draw(st.integers(0, 2**31 - 1)),
        "model": draw(table({"weights": st.sampled_from(["a b.pt", "c.safetensors"])}, name=st.just("net.py:make"), args=ARGS)),
        "data": draw(table({"val_fraction": SHARE, "test_fraction": SHARE}, name=st.just("imagefolder"), root=FOLDERS)),
        "input": draw(table(canvas, image_size=st.just(size))),
        "prompt": {"pixels": draw(table(PIXELS, size=st.integers(1, 7)))},
        "search": {"method": "iterative"} | draw(table({"weight_lr": SHARE, "per_cost": st.booleans()})),
        "budget": draw(table({"max_removal": SHARE}, **{draw(BUDGETS): SHARE})),
        "compare": draw(table({"arms": st.permutations(["dense", "pruned", "pruned-prompt"])})),
        "bench": draw(table({"threads": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True)})),
    }  # fmt: skip
    return parse_recipe(raw, where="recipe", folder=Path("/data"))


@given(recipe=recipes())
def test_a_recipe_comes_back_from_its_toml(recipe):
    back = parse_recipe(tomllib.loads(dump_recipe(recipe)), where="recipe", folder=Path("/elsewhere"))
    assert back == recipe
    assert same(flatten(back), flatten(recipe))
    assert recipe_hash(back) == recipe_hash(recipe)
