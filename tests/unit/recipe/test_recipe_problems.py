"""One wrong thing gives one line, and every problem is told at once."""

from __future__ import annotations

import pytest
from unit.recipe.least import HERE, merged, parse

from vpdeploy.errors import RecipeError
from vpdeploy.recipe.reading import parse_recipe


def problems(changes: dict) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(changes)
    return caught.value.problems


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
    # lists long enough, whose items are wrong
    ({"bench": {"threads": [0]}}, "bench.threads[0]: got 0; expected at least 1"),
    ({"bench": {"batches": ["a"]}}, "bench.batches[0]: got 'a'; expected a whole number"),
    (
        {"export": {"forms": ["flaot"]}},
        "export.forms[0]: got 'flaot'; expected 'uint8' or 'float'; did you mean 'float'?",
    ),
    ({"bench": {"image_size": [8, 16385]}}, "bench.image_size[1]: got 16385; expected at most 16384"),
    # budgets
    ({"budget": {"macs_ratio": 0}}, "budget.macs_ratio: got 0; expected more than 0"),
    ({"budget": {"macs_ratio": 1.01}}, "budget.macs_ratio: got 1.01; expected at most 1"),
    (
        {"budget": {"params_ratio": 0.5}},
        "budget: got macs_ratio and params_ratio; expected exactly one of channel_ratio, macs_ratio, params_ratio, "
        "weight_ratio, latency_ratio, latency_ms, file_mib, memory_mib: remove the others",
    ),
    ({"budget": {"macs_ratio": None}}, "budget: got none; expected exactly one of channel_ratio, macs_ratio, "),
    (
        {"budget": {"macs_ratio": None, "latency_ratio": 0.5, "latency_ms": 3.0}},
        "budget: got latency_ratio and latency_ms; expected exactly one of channel_ratio, macs_ratio, params_ratio, "
        "weight_ratio, latency_ratio, latency_ms, file_mib, memory_mib: two latency budgets cannot both be met "
        "exactly: keep one, or put latency_ms into [budget.limits]",
    ),
    (
        {"budget": {"macs_ratio": None, "latency_ratio": 0.5, "limits": {"latency_ms": 3.0}}},
        "budget.limits.latency_ms: got 3 beside budget.latency_ratio; expected one of the two",
    ),
    (
        {"budget": {"macs_ratio": None, "file_mib": 0.5, "limits": {"file_mib": 3.0}}},
        "budget.limits.file_mib: got 3 beside budget.file_mib; expected one of the two",
    ),
    ({"budget": {"limits": {"latency_ms": 0.0}}}, "budget.limits.latency_ms: got 0.0; expected more than 0"),
    ({"budget": {"limits": {"latency": 1.0}}}, "budget.limits.latency: unknown key; did you mean 'latency_ms'?"),
    ({"budget": {"round_to": "fast"}}, "budget.round_to: got 'fast'; expected 'auto' or a whole number"),
    ({"budget": {"macs_ratio": None, "latency_ratio": 1.5}}, "budget.latency_ratio: got 1.5; expected at most 1"),
    # the target
    ({"target": {"engine": "tensorflow"}}, "target.engine: got 'tensorflow'; expected 'onnxruntime-cpu', "),
    (
        {"budget": {"speed": True}, "search": {"method": "vpns", "score_init": "scaled"}},
        "budget.speed: got true with search.score_init = 'scaled', which weighs nothing against time; expected 'taylor' there",
    ),
    (
        {"budget": {"macs_ratio": None, "latency_ms": 3.0, "speed": True}},
        "budget.speed: got true beside budget.latency_ms, which weighs importance against time in any case; leave it out",
    ),
    ({"target": {"batch": 0}}, "target.batch: got 0; expected at least 1"),
    # methods
    ({"search": {"method": "vpn"}}, "search.method: got 'vpn'; expected 'vpns', 'hydra', 'random', "),
    (
        {"search": {"method": "magnitude", "score_lr": 0.01}},
        "search.score_lr: got 0.01 for search.method = 'magnitude', which does not read it; leave it out, or take one of vpns, "
        "hydra, bip",
    ),
    (
        {"search": {"method": "vpns", "per_cost": True}},
        "search.per_cost: got true for search.method = 'vpns', which does not read it; leave it out, or take one of magnitude, ",
    ),
    (
        {"search": {"method": "lth", "rounds": 7, "epochs": 5}},
        "search.rounds: got 7 with search.epochs = 5; expected at most as many: each round trains",
    ),
    *(
        (
            {"search": {"method": "iterative", "rounds": rounds, "epochs": 2}},
            f"search.rounds: got {rounds} for search.method = 'iterative' with search.epochs = 2; expected 2 to 3: weights train "
            "between rounds, for one epoch or more",
        )
        for rounds in (1, 4)
    ),
    (
        {"model": {"head": "ilm", "weights": "resnet18.pth"}, "search": {"method": "iterative"}},
        "model.head: got 'ilm' for search.method = 'iterative', which maps the classes once; expected 'flm', or a meth",
    ),
    # tokens
    (
        {"condense": {"keep": 0.3}},
        "condense.keep: got 0.3 without tokens that the search learns and tuning goes on with; expected 1, or prompt.tokens with",
    ),
    (
        {"condense": {"keep": 0.3}, "prompt": {"tokens": {"kind": "vpt-deep", "stages": "tune"}}},
        "condense.keep: got 0.3 without tokens that the search learns and tuning goes on with; expected 1, or prompt.tokens with",
    ),
    (
        {"prompt": {"tokens": {"kind": "vpt-deep", "position": "after-mlp"}}},
        "prompt.tokens.position: got 'after-mlp' for kind 'vpt-deep', which does not read it; leave it out",
    ),
    (
        {"prompt": {"tokens": {"kind": "vpt-deep"}}, "search": {"method": "vpns", "unprompted_step": True}},
        "search.unprompted_step: got true with tokens; expected false: they cannot be left out of a step",
    ),
    (
        {"prompt": {"tokens": {"kind": "cvpt"}}, "budget": {"allow_approximate": True}},
        "budget.allow_approximate: got true with tokens; expected false: tokens have the full width of what such groups cut",
    ),
    (
        {
            "prompt": {"tokens": {"kind": "ffn-memory"}},
            "search": {"granularity": "2:4"},
            "budget": {"macs_ratio": None, "weight_ratio": 0.5},
        },
        "search.granularity: got '2:4' with tokens of kind 'ffn-memory'; expected 'channel': in the file they are weights of",
    ),
    (
        {"prompt": {"tokens": {"kind": "cvpt", "init": "prototype"}}},
        "prompt.tokens.init: got 'prototype' for kind 'cvpt', whose tokens are none of the sequence; expected 'uniform', or ",
    ),
    (
        {"prompt": {"tokens": {"kind": "ffn-memory", "width": 8}}},
        "prompt.tokens.width: got 8 for kind 'ffn-memory', which has no projection; leave it out",
    ),
    (
        {"prompt": {"tokens": {"kind": "vpt-deep", "width": 8, "init": "prototype"}}},
        "prompt.tokens.width: got 8 with init = 'prototype', whose rows are as wide as a block; leave one out",
    ),
    (
        {"prompt": {"tokens": {"kind": "vpt-deep", "prototype": "max"}}},
        "prompt.tokens.prototype: got 'max' with prompt.tokens.init = 'uniform', which does not read it; leave it out, or set",
    ),
    (
        {"budget": {"speed": True}, "search": {"method": "taylor"}},
        "budget.speed: got true with search.per_cost = false, which weighs nothing against time; expected true there",
    ),
    # single weights
    (
        {
            "search": {"method": "vpns", "granularity": "2:4", "score_init": "taylor"},
            "budget": {"macs_ratio": None, "weight_ratio": 0.5},
        },
        "search.score_init: goes with channels, got search.granularity = '2:4'; leave it out",
    ),
    (
        {"search": {"method": "vpns", "warmup": 1}, "prompt": {"pixels": {"kind": "none"}}},
        "search.warmup: got 1 without a prompt in the search; expected 0: nothing would learn",
    ),
    (
        {"search": {"method": "vpns", "warmup": 5}},
        "search.warmup: got 5 with search.epochs = 5; expected fewer: scores learn in the rest",
    ),
    (
        {"search": {"data": {"name": "imagefolder"}}},
        "search.data.root: missing; expected the folder or .zip that holds the images",
    ),
    (
        {"search": {"granularity": "weight"}},
        "budget.macs_ratio: got 0.5 with search.granularity = 'weight'; expected 'weight_ratio'",
    ),
    (
        {"budget": {"macs_ratio": None, "weight_ratio": 0.1}},
        "budget.weight_ratio: got 0.1 with search.granularity = 'channel'; expected another budget, or search.granularity = "
        "'weight'",
    ),
    (
        {
            "search": {"granularity": "weight", "method": "slim"},
            "budget": {"macs_ratio": None, "weight_ratio": 0.1},
        },
        "search.method: got 'slim' with search.granularity = 'weight'; expected a method that scores single weights",
    ),
    (
        {
            "search": {"granularity": "2:4"},
            "budget": {"macs_ratio": None, "weight_ratio": 0.5, "limits": {"file_mib": 1.0}},
        },
        "budget.limits.file_mib: goes with channels, got search.granularity = '2:4'; leave it out",
    ),
    (
        {"target": {"form": "uint8"}, "export": {"forms": ["float"]}},
        "target.form: got 'uint8', which is not exported; expected one of export.forms ('float')",
    ),
    (
        {"target": {"engine": "openvino-cpu"}, "budget": {"macs_ratio": None, "memory_mib": 90.0}},
        "budget.memory_mib: got a budget for target.engine 'openvino-cpu'; expected 'onnxruntime-cpu': the memory of other "
        "engines is not measured",
    ),
    (
        {"target": {"precision": "bf16"}},
        "target.precision: got 'bf16' for 'onnxruntime-cpu'; expected 'fp32': it runs what the file holds",
    ),
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
        "compare.arms: 'dense+prompt' needs a prompt, but prompt.pixels.kind and prompt.tokens.kind are 'none'; ",
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
        "only 'torchvision:...' and 'timm:...' networks have weights by name: rename the file",
    ),
    ({"model": {"args": {"width": 2}}}, "model.args: got values for 'cifar_resnet8'; only a factory "),
    ({"fit": {"what": "none"}}, "fit.what: got 'none' without model.weights; expected 'all', or give weights"),
    # bench's inputs: 375 x 500 x 3 bytes an image in uint8, 3 x 224 x 224 x 4 in float
    (
        {"bench": {"batches": [1, 10**9]}},
        "bench.batches: got 1000000000; with input.image_size = 224 the 'float' form's input would be "
        "602,112,000,000,000 bytes, expected at most 4,294,967,296 (4 GiB): a batch of at most 7133, or a smaller "
        "input.image_size",
    ),
    (
        {"bench": {"batches": [10**9]}, "export": {"forms": ["uint8"]}},
        "bench.batches: got 1000000000; with bench.image_size = [375, 500] the 'uint8' form's input would be "
        "562,500,000,000,000 bytes, expected at most 4,294,967,296 (4 GiB): a batch of at most 7635, or a smaller "
        "bench.image_size",
    ),
    (
        {"bench": {"image_size": [16384, 16384]}},  # 805,306,368 bytes an image: five fit, the default of 8 do not
        "bench.batches: got 8; with bench.image_size = [16384, 16384] the 'uint8' form's input would be 6,442,450,944 ",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ONE_PROBLEM, ids=[message.split(";")[0] for _, message in ONE_PROBLEM])
def test_one_wrong_thing_gives_one_line(changes, message):
    (found,) = problems(changes)
    assert found.startswith(message)


def test_a_wrong_budget_does_not_hide_a_second_one():
    one, two = problems({"budget": {"macs_ratio": 1.5, "params_ratio": 0.5}})
    assert one.startswith("budget.macs_ratio: got 1.5") and two.startswith("budget: got macs_ratio and params_ratio;")


def test_the_largest_input_that_bench_may_make_is_fine():
    assert parse({"bench": {"batches": [7133]}}).bench.batches == (7133,)
    assert parse({"bench": {"batches": [5], "image_size": [16384, 16384]}}).bench.batches == (5,)
    uint8 = {"bench": {"batches": [7135]}, "export": {"forms": ["uint8"]}}  # too many for the form that is not made
    assert parse(uint8).export.forms == ("uint8",)


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


def test_the_message_counts_and_names_the_file():
    with pytest.raises(RecipeError, match=r"^r\.toml: 2 problems\n  tune\.epochs: .*\n  tune\.batch_size: "):
        parse({"tune": {"epochs": 0, "batch_size": 0}})
    with pytest.raises(RecipeError, match=r"^r\.toml: 1 problem\n"):
        parse({"seed": -1})
