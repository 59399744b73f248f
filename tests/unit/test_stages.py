"""What every stage reads: a change redoes what it must and nothing else, and training is never thrown away silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpdeploy.errors import RecipeError, RunFolderError
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.writing import dump_recipe, flatten, with_values
from vpdeploy.stages import (
    ORDER,
    Ledger,
    Stage,
    arm_file,
    files_left,
    measurement_file,
    onnx_file,
    read_recipe,
    training_stages,
    values_read,
)

INPUTS = {"data": "d1", "model.weights": "w1"}
ARMS = ["dense", "dense+prompt", "pruned", "pruned-prompt"]


def recipe(**changes):
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "digits"},
        "budget": {"macs_ratio": 0.5},
        "compare": {"arms": ARMS},
    }
    return with_values(
        parse_recipe(raw, where="r.toml", folder=Path("/")), {k.replace("__", "."): v for k, v in changes.items()}
    )


def stages_of(of) -> list[Stage]:
    pruned = [arm for arm in of.arms if arm.startswith("pruned")]
    return [
        Stage("groups"),
        Stage("price"),
        *training_stages(of),
        *(Stage("cut", arm) for arm in pruned),
        Stage("export"),
        Stage("bench"),
    ]


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    """Of a run whose every stage is done."""
    done = Ledger(tmp_path / "stages.json", INPUTS)
    for stage in stages_of(recipe()):
        done.begin(stage, recipe())
        done.finish(stage, recipe())
    return done


def undone(ledger: Ledger, now) -> set[str]:
    return {stage.name for stage in stages_of(now) if not ledger.is_done(stage, now)}


AFTER = {"export", "bench"}
TUNES = {f"tune:{arm}" for arm in ARMS}
PRUNED = {f"{kind}:{arm}" for kind in ("search", "cut", "tune") for arm in ("pruned", "pruned-prompt")}
PROMPTED = {"search:pruned", "cut:pruned", "tune:pruned", "tune:dense+prompt"}
CASES = [
    ("bench.seconds", 1.0, {"bench"}),
    ("data.limit_test", 100, {"bench"}),
    ("export.opset", 20, {*AFTER, "price"}),
    ("tune.epochs", 3, {*TUNES, *AFTER}),
    ("prompt.pixels.size", 3, {*PROMPTED, *AFTER}),
    ("search.epochs", 3, {*PRUNED, *AFTER}),
    ("budget.macs_ratio", 0.4, {*PRUNED, *AFTER, "price"}),
    ("target.threads", 2, {"price"}),
    ("fit.epochs", 3, {*PRUNED, *TUNES, *AFTER, "fit"}),
    ("seed", 8, {*PRUNED, *TUNES, *AFTER, "fit"}),
    ("model.name", "cifar_resnet14", {*PRUNED, *TUNES, *AFTER, "groups", "price", "fit"}),
    ("input.image_size", 200, {*PRUNED, *TUNES, *AFTER, "groups", "price", "fit"}),
    ("compute.workers", 1, set()),
    ("data.download", True, set()),
]


def test_the_same_recipe_redoes_nothing(ledger):
    assert undone(ledger, recipe()) == set()
    ledger.refuse_retraining(recipe(), run=Path("RUN"), redo=None)


@pytest.mark.parametrize(("key", "value", "again"), CASES, ids=[case[0] for case in CASES])
def test_a_changed_key_redoes_the_stages_that_read_it(ledger, key, value, again):
    now = with_values(recipe(), {key: value})
    assert undone(ledger, now) == again
    trains = [stage.name for stage in training_stages(now) if stage.name in again]
    if not trains:
        ledger.refuse_retraining(now, run=Path("RUN"), redo=None)
        return
    with pytest.raises(RunFolderError) as caught:
        ledger.refuse_retraining(now, run=Path("RUN"), redo=None)
    first = trains[0]
    assert str(caught.value) == (
        f"RUN: holds another recipe's run: {key} was {flatten(recipe())[key]!r}, is {value!r}. Going on would train "
        f"{first!r} again: choose another folder with -o, or train again from there with --redo {first.partition(':')[0]}"
    )


def test_every_key_is_read_by_some_stage_but_those_that_change_no_result():
    """A key that no stage read could be changed without effect, and without a word."""
    known = {key for stage in stages_of(recipe()) for key in values_read(stage, recipe())}
    assert set(flatten(recipe())) - known == {"data.download", "compute.workers"}


def test_another_target_searches_again_where_it_decides_what_is_cut(tmp_path):
    before = recipe(budget__macs_ratio=None, budget__latency_ratio=0.5)
    ledger = Ledger(tmp_path / "stages.json", INPUTS)
    for stage in stages_of(before):
        ledger.finish(stage, before)
    now = with_values(before, {"target.threads": 2})
    assert undone(ledger, now) == {*PRUNED, *AFTER, "price"}


def test_a_new_price_leaves_stage_0_and_the_dense_arms(ledger):
    gone = ledger.forget("price", recipe())
    assert set(gone) == {*PRUNED, *AFTER, "price"}


def test_an_arm_more_leaves_the_training_of_the_others(tmp_path):
    before, now = recipe(compare__arms=["dense", "pruned"]), recipe()
    ledger = Ledger(tmp_path / "stages.json", INPUTS)
    for stage in stages_of(before):
        ledger.finish(stage, before)
    ledger.refuse_retraining(now, run=tmp_path, redo=None)
    new = {"tune:dense+prompt", "search:pruned-prompt", "cut:pruned-prompt", "tune:pruned-prompt"}
    assert undone(ledger, now) == {*new, *AFTER}


def test_changed_files_are_told_as_such(ledger):
    now = Ledger(ledger.path, {**INPUTS, "data": "d2"})
    assert undone(now, recipe()) == {stage.name for stage in stages_of(recipe())}
    with pytest.raises(RunFolderError, match=r"another recipe's run: the contents of data changed\. .* --redo fit$"):
        now.refuse_retraining(recipe(), run=Path("RUN"), redo=None)


def test_a_file_that_was_moved_is_the_same_file(tmp_path):
    before, now = recipe(model__weights="/a/w.safetensors"), recipe(model__weights="/b/w.safetensors")
    ledger = Ledger(tmp_path / "stages.json", INPUTS)
    for stage in stages_of(before):
        ledger.finish(stage, before)
    assert undone(ledger, now) == set()
    key = ledger.key(Stage("fit"), before)
    assert ledger.key(Stage("fit"), now) == key
    ledger.follow(now)
    assert ledger.key(Stage("fit"), now) == key  # what was half trained goes on, too
    blind = Ledger(ledger.path, {})  # the report's, which reads the recipe that is there now
    assert undone(blind, now) == set() and undone(blind, before) != set()
    now = before
    for other in ({"data": "d1"}, {**INPUTS, "model.weights": "w2"}):  # not there to be looked at, and another
        with pytest.raises(RunFolderError, match="model.weights"):
            Ledger(ledger.path, other).refuse_retraining(now, run=Path("RUN"), redo=None)


def test_a_long_list_of_changes_is_cut(ledger):
    now = recipe(
        fit__epochs=1, fit__weight_lr=1.0, fit__batch_size=1, fit__weight_decay=0.1, seed=1, data__augment="none"
    )
    with pytest.raises(RunFolderError, match=r"; and 2 more\. Going on would train 'fit' again"):
        ledger.refuse_retraining(now, run=Path("RUN"), redo=None)


def test_a_stage_begun_with_other_values_is_refused_too(tmp_path):
    """Its finished epochs would be lost."""
    ledger = Ledger(tmp_path / "stages.json", INPUTS)
    ledger.begin(Stage("fit"), recipe())
    assert not ledger.is_done(Stage("fit"), recipe())
    with pytest.raises(RunFolderError, match=r"seed was 7, is 8\. .* --redo fit"):
        ledger.refuse_retraining(recipe(seed=8), run=tmp_path, redo=None)


def test_redo_forgets_its_stage_and_all_after_it(ledger):
    gone = ledger.forget("tune", recipe())
    assert set(gone) == {*TUNES, *AFTER}
    assert undone(ledger, recipe()) == set(gone)
    assert ledger.forget("bench", recipe()) == []


@pytest.mark.parametrize("kind", ["search", "cut"])
def test_a_new_search_leaves_dense_arms_alone(ledger, kind):
    ledger.begin(Stage("tune", "dense"), recipe())  # half done: its epochs stay, too
    searches = {name for name in PRUNED if kind == "search" or name.startswith("cut")}
    assert set(ledger.forget(kind, recipe())) == {*searches, "tune:pruned", "tune:pruned-prompt", *AFTER}
    assert undone(ledger, recipe()) == {*searches, *TUNES, *AFTER} - {"tune:dense+prompt"}


def test_a_new_search_with_another_tuning_tunes_dense_arms_too(ledger):
    now = recipe(tune__epochs=1)
    now_gone = ledger.forget("search", now)
    assert set(TUNES) <= set(now_gone)


def test_redo_is_refused_where_an_earlier_stage_changed(ledger):
    tuned, fitted = recipe(tune__epochs=3), recipe(fit__epochs=3)
    ledger.refuse_retraining(tuned, run=Path("RUN"), redo="tune")
    ledger.refuse_retraining(fitted, run=Path("RUN"), redo="fit")
    with pytest.raises(RunFolderError, match=r"fit\.epochs was .* --redo fit$"):
        ledger.refuse_retraining(fitted, run=Path("RUN"), redo="tune")


def test_keys_tell_stages_apart_and_follow_what_they_read(ledger):
    fit = Stage("fit")
    assert ledger.key(fit, recipe()) == ledger.key(fit, recipe(tune__epochs=3))
    assert ledger.key(fit, recipe()) != ledger.key(fit, recipe(fit__epochs=3))
    assert ledger.key(fit, recipe()) != Ledger(ledger.path, {**INPUTS, "data": "d2"}).key(fit, recipe())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"fit": 3}', b'{"fti": {}}', b'{"fit": {"finished": true}}']
)
def test_a_damaged_ledger(tmp_path, content):
    (tmp_path / "stages.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"stages\.json: damaged: .*; choose another folder with -o, or remove it"):
        Ledger(tmp_path / "stages.json", INPUTS).is_done(Stage("fit"), recipe())


def test_files_of_arms_never_collide(tmp_path):
    of = recipe()
    left = [path for stage in stages_of(of) for path in files_left(stage, of, run=tmp_path)]
    assert len({*left}) == len(left)
    assert arm_file(tmp_path, "plan.json", "pruned") == tmp_path / "plan.json"
    assert arm_file(tmp_path, "plan.json", "pruned-prompt") == tmp_path / "plan.pruned-prompt.json"
    assert measurement_file(tmp_path, "dense") == tmp_path / "measured" / "dense.json"
    assert onnx_file(tmp_path, "pruned", "uint8") == tmp_path / "export" / "pruned.onnx"
    assert onnx_file(tmp_path, "pruned", "float") == tmp_path / "export" / "pruned.float.onnx"


def test_every_stage_has_a_place_in_the_order():
    assert {stage.kind for stage in stages_of(recipe())} | {"condense"} == set(ORDER)


@pytest.mark.parametrize(("scope", "reads"), [("global", False), ("layer", True)])
def test_the_price_depends_on_what_condensing_surely_takes(scope, reads):
    condensed = recipe(condense__keep=0.5, condense__scope=scope)
    assert ("condense.keep" in values_read(Stage("price"), condensed)) == reads


def test_condensing_otherwise_tunes_again_and_searches_not():
    tokens = {"prompt__tokens__kind": "vpt-deep"}
    ledger = Ledger(Path("stages.json"), {})
    keys = [
        {stage.name: ledger.key(stage, recipe(**tokens, condense__keep=keep)) for stage in stages}
        for keep in (0.3, 0.5)
        for stages in [(*stages_of(recipe(**tokens)), Stage("condense", "pruned"))]
    ]
    changed = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed == {"condense:pruned", "cut:pruned", "tune:pruned", "export", "bench"}


def test_the_recipe_of_a_run(tmp_path):
    with pytest.raises(
        RunFolderError, match="got a folder without recipe.toml; expected a run folder, as `vpdeploy run"
    ):
        read_recipe(tmp_path)
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe()))
    assert read_recipe(tmp_path) == recipe()
    for content, message in ((b"[model", "not valid TOML"), (b"seed = 1\ntune = 3\n", "tune: got 3")):
        (tmp_path / "recipe.toml").write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read_recipe(tmp_path)


def test_files_that_nobody_looked_at_are_taken_to_be_as_they_were(ledger):
    blind = Ledger(ledger.path, {})  # the report's, and that of a run whose checkpoint has moved
    assert all(blind.is_done(stage, recipe()) for stage in stages_of(recipe()))
    assert blind.key(Stage("fit"), recipe()) == ledger.key(Stage("fit"), recipe())
    blind.refuse_retraining(recipe(), run=Path("run"), redo=None)
    assert not blind.is_done(Stage("bench"), recipe(export__opset=20))
    ledger.forget("tune", recipe())
    assert not blind.is_done(Stage("bench"), recipe())


def test_a_bench_on_another_machine_or_engine_is_another(ledger):
    here = Ledger(ledger.path, INPUTS, {"cpu": "one", "onnxruntime": "1"})
    for stage in stages_of(recipe()):
        here.finish(stage, recipe())
    assert not undone(here, recipe())
    for elsewhere in ({"cpu": "other", "onnxruntime": "1"}, {"cpu": "one", "onnxruntime": "2"}):
        assert undone(Ledger(ledger.path, INPUTS, elsewhere), recipe()) == {"bench"}
    assert not undone(Ledger(ledger.path, {}), recipe())  # a report of it may be written anywhere


def test_a_bench_that_was_cut_off_does_not_count(ledger):
    ledger.begin(Stage("bench"), recipe())
    assert not Ledger(ledger.path, {}).is_done(Stage("bench"), recipe())
