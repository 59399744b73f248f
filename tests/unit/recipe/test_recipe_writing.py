"""A recipe comes back the same from what is written, and its hash changes with every key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from unit.recipe.least import parse

from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import AMOUNTS, BUDGETS
from vpdeploy.recipe.writing import dump_recipe, flatten, recipe_hash, with_values

FULL = {
    "seed": 3,
    "model": {"name": "nets.py:make", "weights": "w.pth", "args": {"width": 8, "act": "relu", "sizes": [1, 2]}},
    "data": {"name": "imagefolder", "root": "d", "test_fraction": 0.25},
    "compare": {"arms": ["pruned", "dense"]},
    "budget": {"macs_ratio": None, "params_ratio": 0.25},
    "prompt": {"pixels": {"kind": "none"}},
}


LIMITS = {f"budget.limits.{name}": 5.0 for name in AMOUNTS}


@pytest.mark.parametrize("changes", [{}, FULL], ids=["least", "full"])
def test_the_resolved_recipe_comes_back_from_its_toml(changes):
    recipe = parse(changes)
    again = parse_recipe(tomllib.loads(dump_recipe(recipe)), where="again", folder=Path("/elsewhere"))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_arms_stand_in_one_order_whatever_the_recipe_says():
    assert parse(FULL).arms == ("dense", "pruned")


@pytest.mark.parametrize(
    ("pixels", "arms"),
    [
        ({"kind": "none"}, ("dense", "pruned")),
        ({"stages": "search"}, ("dense", "pruned")),
        ({"stages": "tune"}, ("dense", "dense+prompt", "pruned")),
    ],
)
def test_arms_without_a_word_are_those_that_the_prompt_allows(pixels, arms):
    assert parse({"prompt": {"pixels": pixels}}).arms == arms


def other(key: str, value: object) -> object:
    """Another value that ``key`` may have."""
    words = {
        "prompt.pixels.kind": "fix",
        "prompt.pixels.stages": "tune",
        "prompt.tokens.kind": "cvpt",
        "prompt.tokens.stages": "tune",
        "prompt.tokens.position": "after-mlp",
        "prompt.tokens.init": "prototype",
        "prompt.tokens.width": 24,
        "prompt.tokens.prototype": "max",
        "condense.score": "norm",
        "condense.scope": "layer",
        "model.head": "replace",
        "fit.what": "all",
        "data.on_bad_image": "skip",
        "data.augment": "none",
        "input.resize": "shorter-side-crop",
        "search.method": "hydra",
        "search.norm": "l1",
        "search.score_init": "random",
        "tune.optimizer": "adamw",
        "tune.what": "head",
        "tune.distill": 0.5,
        "tune.teacher": "every-step",
        "compute.precision": "fp32",
        "compute.channels_last": "no",
        "compute.device": "cpu",
        "compute.workers": 1,
        "compare.arms": ["dense", "pruned"],
        "export.forms": ["float"],
        "bench.engines": ["torch-eager"],
        "bench.device": "cpu",
        "bench.precision": "bf16",
        "model.args": {"x": 1},
    }
    if key in words:
        return words[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return (value + 0.013) / 2
    if isinstance(value, list):
        return [other("", item) for item in value]
    return {
        "input.canvas_size": 300,
        "data.test_fraction": 0.3,
        "search.strength": 0.01,
        "search.rounds": 3,
        "search.per_cost": True,
        "search.granularity": "weight",
        "search.data": {"name": "digits"},
        "budget.channel_ratio": 0.3,
        "target.engine": "torch-eager",
        "target.device": "cpu",
        "target.form": "uint8",
        "target.precision": "bf16",
        **LIMITS,
    }.get(key, "another")


def test_the_hash_changes_with_every_key():
    recipe = parse({})
    fixed = {f"budget.{name}" for name in BUDGETS if name not in ("channel_ratio", "macs_ratio")}
    values = {key: value for key, value in flatten(recipe).items() if key not in fixed}
    hashes = {key: recipe_hash(with_values(recipe, {key: other(key, value)})) for key, value in values.items()}
    assert len(values) > 50
    assert len({*hashes.values(), recipe_hash(recipe)}) == len(values) + 1
    assert recipe_hash(parse({})) == recipe_hash(recipe)
