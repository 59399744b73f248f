"""The recipe: strict, every problem at once, every key overridable, and the same again after a round trip."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from vpdeploy.errors import RecipeError
from vpdeploy.recipe import dump_recipe, flatten, load_recipe, parse_recipe, recipe_hash, relative_to, with_values

HERE = Path("/somewhere")
LEAST = {"model": {"name": "cifar_resnet8"}, "data": {"name": "digits"}, "budget": {"macs_ratio": 0.5}}


def merged(changes: dict) -> dict:
    """LEAST with the tables in ``changes`` laid over its own; None removes a key."""
    raw = {table: dict(values) for table, values in LEAST.items()}
    for table, values in changes.items():
        if isinstance(values, dict):
            raw[table] = {k: v for k, v in {**raw.get(table, {}), **values}.items() if v is not None}
        elif values is None:
            del raw[table]
        else:
            raw[table] = values
    return raw


def parse(changes: dict):
    return parse_recipe(merged(changes), where="r.toml", folder=HERE)


def problems(changes: dict) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(changes)
    return caught.value.problems


def written(folder: Path, changes: dict) -> Path:
    path = folder / "r.toml"
    path.write_text(tomli_w.dumps(merged(changes)))
    return path


def test_the_least_recipe_is_enough():
    recipe = parse({})
    assert recipe.budget.kind == "macs_ratio" and recipe.budget.ratio == 0.5
    assert recipe.arms == ("dense", "dense+prompt", "pruned")


# --- one wrong thing, one line --------------------------------------------------------------------------------------

ONE_PROBLEM = [
    # unknown keys, at each depth
    ({"tune": {"epoch": 3}}, "tune.epoch: unknown key; did you mean 'epochs'?"),
    ({"prompt": {"pixel": {}}}, "prompt.pixel: unknown key; did you mean 'pixels'?"),
    ({"prompt": {"pixels": {"widht": 2}}}, "prompt.pixels.widht: unknown key; known keys here: kind, size, stages"),
    ({"tunes": {"epochs": 3}}, "tunes: unknown key; did you mean 'tune'?"),
    # missing ones
    ({"model": None}, "model: missing; expected this table"),
    ({"data": {"name": None}}, "data.name: missing; expected "),
    # words
    (
        {"prompt": {"pixels": {"kind": "padd"}}},
        "prompt.pixels.kind: got 'padd'; expected 'pad', 'fix', 'random' or 'none'; did you mean 'pad'?",
    ),
    ({"tune": {"optimizer": "lion"}}, "tune.optimizer: got 'lion'; expected 'sgd' or 'adamw'"),
    ({"compare": {"arms": ["dense", "prune", "pruned"]}}, "compare.arms[1]: got 'prune'; expected 'dense', "),
    # kinds of value
    ({"tune": {"epochs": "3"}}, "tune.epochs: got '3'; expected a whole number"),
    ({"tune": {"epochs": 3.0}}, "tune.epochs: got 3.0; expected a whole number"),
    ({"tune": {"epochs": True}}, "tune.epochs: got True; expected a whole number"),
    ({"tune": {"weight_lr": "fast"}}, "tune.weight_lr: got 'fast'; expected a number"),
    ({"search": {"unprompted_step": "no"}}, "search.unprompted_step: got 'no'; expected true or false"),
    ({"data": {"root": 3}}, "data.root: got 3; expected a text in quotes"),
    ({"bench": {"batches": 8}}, "bench.batches: got 8; expected a list"),
    ({"bench": {"batches": [1, "x"]}}, "bench.batches[1]: got 'x'; expected a whole number"),
    ({"prompt": "pad"}, "prompt: got 'pad'; expected a table"),
    ({"model": {"args": 3}}, "model.args: got 3; expected a table"),
    ({"compute": {"workers": "x"}}, "compute.workers: got 'x'; expected 'auto' or a whole number"),
    ({"compute": {"workers": -1}}, "compute.workers: got -1; expected 'auto' or at least 0"),
    # ranges
    ({"tune": {"epochs": 0}}, "tune.epochs: got 0; expected at least 1"),
    ({"data": {"val_fraction": 1.0}}, "data.val_fraction: got 1.0; expected less than 1"),
    ({"tune": {"weight_lr": float("inf")}}, "tune.weight_lr: got inf; expected a finite number"),
    ({"input": {"mean": [0.5, float("nan"), 0.5]}}, "input.mean[1]: got nan; expected a finite number"),
    ({"bench": {"batches": []}}, "bench.batches: got []; expected at least 1 of them"),
    ({"model": {"name": ""}}, "model.name: got ''; expected a text that is not empty"),
    (
        {"model": {"weights": ""}},
        "model.weights: got ''; expected a text that is not empty: leave the key out for none",
    ),
    ({"data": {"root": ""}}, "data.root: got ''; expected a text that is not empty: leave the key out for none"),
    (
        {"compute": {"device": "bogus"}},
        "compute.device: got 'bogus'; expected 'auto', 'cpu' or 'cuda' or 'cuda:N' with the number of a GPU, such as "
        "'cuda:1'",
    ),
    ({"compute": {"device": "cuda:"}}, "compute.device: got 'cuda:'; expected 'auto', 'cpu' or 'cuda' or 'cuda:N' "),
    ({"compute": {"device": "cdua"}}, "compute.device: got 'cdua'; expected 'auto', "),
    # lists: how many, how large, each once
    ({"bench": {"image_size": [8]}}, "bench.image_size: got [8]; expected 2 numbers"),
    ({"input": {"mean": [1, 2]}}, "input.mean: got [1, 2]; expected 3 numbers"),
    ({"input": {"mean": []}}, "input.mean: got []; expected 3 numbers"),
    ({"input": {"std": [0.1, 0.2, 0.3, 0.4]}}, "input.std: got [0.1, 0.2, 0.3, 0.4]; expected 3 numbers"),
    (
        {"input": {"mean": [123.7, 116.3, 103.5]}},
        "input.mean: got [123.7, 116.3, 103.5]; expected at most 1 for each colour, as pixels are in [0, 1]: "
        "divide by 255",
    ),
    (
        {"input": {"mean": [-0.5, 0.5, 0.5]}},
        "input.mean: got [-0.5, 0.5, 0.5]; expected at least 0 for each colour, as pixels are in [0, 1]",
    ),
    (
        {"input": {"std": [58.4, 57.1, 57.4]}},
        "input.std: got [58.4, 57.1, 57.4]; expected at most 1 for each colour, as pixels are in [0, 1]: divide by 255",
    ),
    (
        {"export": {"forms": ["uint8", "uint8"]}},
        "export.forms: got ['uint8', 'uint8']; expected each value once: remove the second 'uint8'",
    ),
    ({"bench": {"batches": [8, 1, 8]}}, "bench.batches: got [8, 1, 8]; expected each value once: remove the second 8"),
    ({"bench": {"threads": [2, 2]}}, "bench.threads: got [2, 2]; expected each value once: remove the second 2"),
    # budgets
    ({"budget": {"macs_ratio": 0}}, "budget.macs_ratio: got 0; expected more than 0"),
    ({"budget": {"macs_ratio": 1.01}}, "budget.macs_ratio: got 1.01; expected at most 1"),
    (
        {"budget": {"params_ratio": 0.5}},
        "budget: got macs_ratio and params_ratio; expected exactly one of channel_ratio, macs_ratio, params_ratio: "
        "remove the others",
    ),
    ({"budget": {"macs_ratio": None}}, "budget: got none; expected exactly one of channel_ratio, macs_ratio, "),
    # what no key can know alone
    (
        {"input": {"image_size": 32, "canvas_size": 16}, "prompt": {"pixels": {"size": 2}}},
        "input.canvas_size: got 16, smaller than input.image_size 32; expected at least that: raise it, or leave it out",
    ),
    (
        {"input": {"image_size": 8}, "prompt": {"pixels": {"size": 4}}},
        "prompt.pixels.size: got 4; a 'pad' prompt on a canvas of 8 takes at most 3: ",
    ),
    (
        {"input": {"image_size": 8}, "prompt": {"pixels": {"kind": "fix", "size": 9}}},
        "prompt.pixels.size: got 9; a 'fix' prompt on a canvas of 8 takes at most 8: ",
    ),
    ({"compare": {"arms": ["dense"]}}, "compare.arms: 'pruned' is missing; every report compares dense with pruned"),
    (
        {"compare": {"arms": ["pruned", "dense", "pruned"]}},
        "compare.arms: got ['pruned', 'dense', 'pruned']; expected each value once: remove the second 'pruned'",
    ),
    (
        {"compare": {"arms": ["dense", "dense+prompt", "pruned"]}, "prompt": {"pixels": {"kind": "none"}}},
        "compare.arms: 'dense+prompt' needs a prompt, but prompt.pixels.kind is 'none'; ",
    ),
    (
        {"compare": {"arms": ["dense", "dense+prompt", "pruned"]}, "prompt": {"pixels": {"stages": "search"}}},
        "compare.arms: 'dense+prompt' is tuned with the prompt, but prompt.pixels.stages is 'search'; ",
    ),
    ({"data": {"name": "imagefolder"}}, "data.root: missing; expected the folder or .zip that holds the images"),
    ({"model": {"head": "flm"}}, "model.head: got 'flm' without model.weights; a label map needs a trained source "),
    (
        {"model": {"weights": "DEFAULT"}},
        "model.weights: got 'DEFAULT' for 'cifar_resnet8'; expected a file that ends in .pt, .pth, .th, .safetensors; "
        "only 'torchvision:...' networks have weights by name: rename the file",
    ),
    ({"model": {"args": {"width": 2}}}, "model.args: got values for 'cifar_resnet8'; only a factory "),
    ({"fit": {"what": "none"}}, "fit.what: got 'none' without model.weights; expected 'all', or give weights"),
]


@pytest.mark.parametrize(("changes", "message"), ONE_PROBLEM, ids=[message.split(";")[0] for _, message in ONE_PROBLEM])
def test_one_wrong_thing_gives_one_line(changes, message):
    (found,) = problems(changes)
    assert found.startswith(message)


def test_every_problem_is_told_at_once():
    found = problems(
        {
            "tune": {"epoch": 3, "optimizer": "sdg"},
            "data": {"name": "imagefolder", "max_pixels": 0},
            "budget": {"macs_ratio": 0.5, "channel_ratio": 0.5, "round_to": 0},
            "input": {"image_size": 32, "canvas_size": 16},
            "compute": {"workers": "many"},
        }
    )
    keys = {
        "tune.epoch",
        "tune.optimizer",
        "data.max_pixels",
        "data.root",
        "budget",
        "budget.round_to",
        "compute.workers",
    }
    assert {line.split(":")[0] for line in found} >= keys | {"input.canvas_size"}
    assert len(found) == len(set(found))


def test_a_wrong_key_says_nothing_of_the_keys_that_depend_on_it():
    # With the wrong kind at its default, "pad", a size of 7 on a canvas of 8 would be called too large.
    found = problems({"input": {"image_size": 8}, "prompt": {"pixels": {"kind": "fxi", "size": 7}}})
    assert [line.split(":")[0] for line in found] == ["prompt.pixels.kind"]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device):
    assert parse({"compute": {"device": device}}).compute.device == device


def test_what_is_found_further_is_told_with_the_rest_but_not_of_wrong_keys():
    def further(recipe):
        assert recipe.data.root == str(HERE / "d")
        yield ("data.root",), "data.root: is not there"
        yield ("model.weights", "model.name"), "model.weights: is not there"

    raw = merged({"data": {"root": "d"}, "model": {"weights": 3}, "tune": {"epochs": 0}})
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, where="r.toml", folder=HERE, further=further)
    assert sorted(caught.value.problems) == [
        "data.root: is not there",
        "model.weights: got 3; expected a text in quotes",
        "tune.epochs: got 0; expected at least 1",
    ]


def test_the_home_folder_of_nobody_is_a_folder_like_any_other():
    assert parse({"data": {"root": "~nobody-of-that-name/x"}}).data.root == str(HERE / "~nobody-of-that-name/x")


def test_the_message_counts_and_names_the_file():
    with pytest.raises(RecipeError, match=r"^r\.toml: 2 problems\n  tune\.epochs: .*\n  tune\.batch_size: "):
        parse({"tune": {"epochs": 0, "batch_size": 0}})
    with pytest.raises(RecipeError, match=r"^r\.toml: 1 problem\n"):
        parse({"seed": -1})


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.toml: 1 problem\n  no such file; expected a recipe in TOML, such as"):
        load_recipe(tmp_path / "no.toml")


def test_a_folder_and_an_unreadable_file(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="cannot be read: .*directory"):
        load_recipe(tmp_path)
    path = written(tmp_path, {})

    def refused(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)
        with pytest.raises(RecipeError, match="cannot be read: .*Permission denied"):
            load_recipe(path)


def test_what_is_no_text_and_no_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read: .*utf-8"):
        load_recipe(path)
    path.write_text("[model\nname = 3")
    with pytest.raises(RecipeError, match=r"not valid TOML: .*line 1"):
        load_recipe(path)


def test_relative_paths_start_at_the_recipes_folder(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    changes = {
        "model": {"name": "nets/small.py:make", "weights": "../w.pth"},
        "data": {"name": "imagefolder", "root": "photos.zip"},
    }
    path = written(folder, changes)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path.relative_to(tmp_path))
    assert recipe.model.name == f"{folder / 'nets/small.py'}:make"
    assert recipe.model.weights == str(tmp_path / "w.pth")
    assert recipe.data.root == str(folder / "photos.zip")


def test_a_recipe_can_be_shown_without_the_machines_own_folders(tmp_path):
    changes = {
        "model": {"name": "nets/small.py:make", "weights": "../w.pth"},
        "data": {"name": "imagefolder", "root": "photos.zip"},
    }
    recipe = load_recipe(written(tmp_path, changes))
    run = tmp_path / "runs" / "first"
    shown = dump_recipe(relative_to(recipe, run))
    assert str(tmp_path) not in shown
    assert parse_recipe(tomllib.loads(shown), where="shown", folder=run) == recipe


@pytest.mark.parametrize(
    ("name", "weights"),
    [("cifar_resnet8", None), ("torchvision:resnet18", "IMAGENET1K_V1"), ("package.module:factory", None)],
)
def test_what_is_no_path_stays_as_it_is(name, weights):
    model = parse({"model": {"name": name, "weights": weights}}).model
    assert (model.name, model.weights) == (name, weights)


def test_absolute_paths_stay():
    assert parse({"data": {"name": "imagefolder", "root": "/data/x"}}).data.root == "/data/x"


# --- overriding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("tune.epochs=3", "tune.epochs", 3),
        (" tune.epochs = 3", "tune.epochs", 3),
        ("tune.weight_lr=1e-3", "tune.weight_lr", 0.001),
        ("seed=11", "seed", 11),
        ("prompt.pixels.kind=fix", "prompt.pixels.kind", "fix"),
        ('prompt.pixels.kind="fix"', "prompt.pixels.kind", "fix"),
        ("search.unprompted_step=true", "search.unprompted_step", True),
        ("bench.batches=[1, 4]", "bench.batches", [1, 4]),
        ('export.forms=["float"]', "export.forms", ["float"]),
        ("data.root=a=b.zip", "data.root", str(Path("a=b.zip"))),
        ("data.root=the photos [new].zip", "data.root", str(Path("the photos [new].zip"))),
    ],
)
def test_set_replaces_a_key(tmp_path, text, key, value):
    recipe = load_recipe(written(tmp_path, {}), [text])
    assert flatten(recipe)[key] == (str(tmp_path / value) if key == "data.root" else value)


def test_set_of_one_budget_replaces_the_other(tmp_path):
    recipe = load_recipe(written(tmp_path, {}), ["budget.channel_ratio=0.3"])
    assert (recipe.budget.kind, recipe.budget.ratio) == ("channel_ratio", 0.3)
    recipe = load_recipe(written(tmp_path, {}), ["budget.round_to=4"])
    assert (recipe.budget.kind, recipe.budget.round_to) == ("macs_ratio", 4)


def test_the_last_set_wins(tmp_path):
    assert load_recipe(written(tmp_path, {}), ["tune.epochs=3", "tune.epochs=4"]).tune.epochs == 4


def test_what_is_wrong_with_set_is_told_with_the_rest(tmp_path):
    path = written(tmp_path, {"tune": {"epochs": 0}})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["tune.epochs", "=3", "seed.x=3", "tune.epoch=4", "tune.batch_size=", "tune.optimizer=sgdd"])
    told = [line.split(":")[0] for line in caught.value.problems]
    assert told[:2] == ["--set tune.epochs", "--set =3"]
    assert sorted(told[2:]) == ["seed", "tune.batch_size", "tune.epoch", "tune.epochs", "tune.optimizer"]
    assert "got no key=value; expected for example --set tune.epochs=3" in caught.value.problems[0]
    with pytest.raises(RecipeError, match="--set tune.epochs.x=1: epochs is a value, not a table"):
        load_recipe(path, ["tune.epochs.x=1"])


# --- what is written down ---------------------------------------------------------------------------------------------

FULL = {
    "seed": 3,
    "model": {"name": "nets.py:make", "weights": "w.pth", "args": {"width": 8, "act": "relu", "sizes": [1, 2]}},
    "data": {"name": "imagefolder", "root": "d", "test_fraction": 0.25},
    "compare": {"arms": ["pruned", "dense"]},
    "budget": {"macs_ratio": None, "params_ratio": 0.25},
    "prompt": {"pixels": {"kind": "none"}},
}


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
        "model.head": "replace",
        "fit.what": "all",
        "data.on_bad_image": "skip",
        "data.augment": "none",
        "input.resize": "shorter-side-crop",
        "search.score_init": "random",
        "tune.optimizer": "adamw",
        "compute.precision": "fp32",
        "compute.channels_last": "no",
        "compute.device": "cpu",
        "compute.workers": 1,
        "compare.arms": ["dense", "pruned"],
        "export.forms": ["float"],
        "model.args": {"x": 1},
    }
    if key in words:
        return words[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return (value + 0.01) / 2
    if isinstance(value, list):
        return [other("", item) for item in value]
    return {"input.canvas_size": 300, "data.test_fraction": 0.3, "budget.channel_ratio": 0.3}.get(key, "another")


def test_the_hash_changes_with_every_key():
    recipe = parse({})
    values = {
        key: value for key, value in flatten(recipe).items() if key not in ("search.method", "budget.params_ratio")
    }
    hashes = {key: recipe_hash(with_values(recipe, {key: other(key, value)})) for key, value in values.items()}
    assert len(values) > 50
    assert len({*hashes.values(), recipe_hash(recipe)}) == len(values) + 1
    assert recipe_hash(parse({})) == recipe_hash(recipe)


def test_checking_a_recipe_does_not_import_torch(tmp_path):
    path = written(tmp_path, {})
    code = (
        "import sys; from pathlib import Path; from vpdeploy.recipe import load_recipe; load_recipe(Path(sys.argv[1]));"
        "print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
