"""What is wrong with a recipe that no single key can know, one line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpdeploy.recipe.tables import (
    BUDGETS,
    CHECKPOINT_SUFFIXES,
    METHOD_KEYS,
    ModelTable,
    PromptTable,
    Recipe,
    data_tables,
)

TRAIN_WEIGHTS = ("slim", "group_sl", "bip", "omp", "lth", "iterative")
# What follows from several keys: those keys, dotted, and what is to be told.
Problem = tuple[tuple[str, ...], str]
BENCH_BYTES = 4 * 2**30  # of one input: on top come the network's own tensors, for each arm


def cross_field(recipe: Recipe, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What no single key can know: (the keys that it follows from, problem). ``raw``: the recipe as it was written."""
    pixels, canvas, size = recipe.prompt.pixels, recipe.input.canvas, recipe.input.image_size
    table = raw.get("budget")
    written = table if isinstance(table, Mapping) else {}
    given = [
        name for name in BUDGETS if written.get(name) is not None
    ]  # one too many is told whether it is right or wrong
    if len(given) != 1:
        got = " and ".join(given) or "none"
        advice = "remove the others" if given else "add it, such as macs_ratio = 0.5"
        keys = () if given else ("budget",)
        if {"latency_ratio", "latency_ms"} <= set(given):
            advice = "two latency budgets cannot both be met exactly: keep one, or put latency_ms into [budget.limits]"
        yield keys, f"budget: got {got}; expected exactly one of {', '.join(BUDGETS)}: {advice}"
    yield from _target_problems(recipe, written)
    sides = ("input.image_size", "input.canvas_size")
    if canvas < size:
        yield (
            sides,
            f"input.canvas_size: got {canvas}, smaller than input.image_size {size}; expected at least that: "
            "raise it, or leave it out",
        )
    limit = (canvas - 1) // 2 if pixels.kind == "pad" else canvas
    if pixels.kind != "none" and pixels.size > limit:
        yield (
            ("prompt.pixels.kind", "prompt.pixels.size", *sides),
            f"prompt.pixels.size: got {pixels.size}; a {pixels.kind!r} prompt on a canvas of {canvas} takes at most "
            f"{limit}: make it smaller, or set input.canvas_size",
        )
    for problem in () if recipe.compare.arms is None else _arm_problems(recipe.compare.arms, recipe.prompt):
        keys = (f"prompt.{table}.{key}" for table in ("pixels", "tokens") for key in ("kind", "stages"))
        yield ("compare.arms", *keys), f"compare.arms: {problem}"
    for prefix, data in data_tables(recipe):
        if data.name == "imagefolder" and not data.root:
            keys = (f"{prefix}.name", f"{prefix}.root")
            yield keys, f"{prefix}.root: missing; expected the folder or .zip that holds the images"
    weights = ("model.weights",)
    if (problem := weights_of_no_file(recipe.model)) is not None:
        yield (*weights, "model.name"), problem
    if recipe.model.head in ("flm", "ilm") and not recipe.model.weights:
        yield (
            ("model.head", *weights),
            f"model.head: got {recipe.model.head!r} without model.weights; a label map needs a trained source "
            "classifier: give weights",
        )
    if recipe.model.args and ":" not in recipe.model.name:
        yield (
            ("model.args", "model.name"),
            f'model.args: got values for {recipe.model.name!r}; only a factory ("file.py:factory"), torchvision or '
            "timm network takes args: remove them",
        )
    if recipe.fit.what == "none" and not recipe.model.weights:
        yield ("fit.what", *weights), "fit.what: got 'none' without model.weights; expected 'all', or give weights"
    yield from _search_problems(recipe)
    if len(given) == 1:
        yield from _granularity_problems(recipe)
        yield from _token_problems(recipe)
    yield from _bench_problem(recipe)


def _target_problems(recipe: Recipe, written: Mapping[str, Any]) -> Iterator[Problem]:
    budget, target = recipe.budget, recipe.target
    quantities = {
        name.replace("latency_ratio", "latency_ms"): name for name in BUDGETS if written.get(name) is not None
    }
    for name, amount in budget.limits.given.items():
        if name in quantities:
            beside = f"budget.{quantities[name]}"
            yield (
                (beside, f"budget.limits.{name}"),
                f"budget.limits.{name}: got {amount:g} beside {beside}; expected one of the two: a limit is for what the budget "
                "does not speak of",
            )
    if target.form is not None and target.form not in recipe.export.forms:
        forms = ", ".join(map(repr, recipe.export.forms))
        yield (
            ("target.form", "export.forms"),
            f"target.form: got {target.form!r}, which is not exported; expected one of export.forms ({forms})",
        )
    search = recipe.search
    if "score_init" in METHOD_KEYS[search.method]:
        key, got, weighs, does = "score_init", search.score_init, "taylor", search.starts_for_cost
    else:
        key, got, weighs, does = "per_cost", search.weighs_cost, True, search.weighs_cost
    if budget.speed and not does:
        yield (
            ("budget.speed", f"search.{key}"),
            f"budget.speed: got true with search.{key} = {_toml(got)}, which weighs nothing against time; expected "
            f"{_toml(weighs)} there",
        )
    if budget.speed and "latency_ms" in quantities:
        yield (
            ("budget.speed", f"budget.{quantities['latency_ms']}"),
            f"budget.speed: got true beside budget.{quantities['latency_ms']}, which weighs importance against time in any case; "
            "leave it out",
        )
    memory = written.get("memory_mib") is not None or budget.limits.memory_mib is not None
    if memory and target.engine != "onnxruntime-cpu":
        yield (
            ("target.engine", "budget.memory_mib", "budget.limits.memory_mib"),
            f"budget.memory_mib: got a budget for target.engine {target.engine!r}; expected 'onnxruntime-cpu': the memory of "
            "other engines is not measured",
        )
    if not target.engine.startswith(("torch", "openvino")) and target.precision != "fp32":
        yield (
            ("target.engine", "target.precision"),
            f"target.precision: got {target.precision!r} for {target.engine!r}; expected 'fp32': it runs what the file holds",
        )


def _search_problems(recipe: Recipe) -> Iterator[Problem]:
    """Keys that the method does not read, and rounds that have no epoch."""
    table = recipe.search
    for key, info in type(table).model_fields.items():
        value = getattr(table, key)
        if (
            key in ("method", "found", "data", "granularity")
            or key in METHOD_KEYS[table.method]
            or value == info.default
        ):
            continue
        users = ", ".join(method for method, keys in METHOD_KEYS.items() if key in keys)
        yield (
            ("search.method", f"search.{key}"),
            f"search.{key}: got {_toml(value)} for search.method = {table.method!r}, which does not read it; leave it out, or "
            f"take one of {users}",
        )
    if table.warmup and not recipe.prompt.learned_in("search"):
        yield (
            (
                "search.warmup",
                "prompt.pixels.kind",
                "prompt.pixels.stages",
                "prompt.tokens.kind",
                "prompt.tokens.stages",
            ),
            f"search.warmup: got {table.warmup} without a prompt in the search; expected 0: nothing would learn",
        )
    if table.warmup > table.epochs - (table.method == "vpns"):
        yield (
            ("search.warmup", "search.epochs"),
            f"search.warmup: got {table.warmup} with search.epochs = {table.epochs}; expected "
            + ("fewer: scores learn in the rest" if table.method == "vpns" else "at most as many"),
        )
    if recipe.model.head == "ilm" and table.method in TRAIN_WEIGHTS:
        yield (
            ("model.head", "search.method"),
            f"model.head: got 'ilm' for search.method = {table.method!r}, which maps the classes once; expected 'flm', or a "
            "method that leaves weights alone",
        )
    if table.method == "lth" and table.turns > table.epochs:
        yield (
            ("search.rounds", "search.epochs"),
            f"search.rounds: got {table.rounds} with search.epochs = {table.epochs}; expected at most as many: each round trains",
        )
    if table.method == "iterative" and not 2 <= table.turns <= table.epochs + 1:
        yield (
            ("search.rounds", "search.epochs", "search.method"),
            f"search.rounds: got {table.rounds} for search.method = 'iterative' with search.epochs = {table.epochs}; expected "
            f"2 to {table.epochs + 1}: weights train between rounds, for one epoch or more",
        )


def _token_problems(recipe: Recipe) -> Iterator[Problem]:
    """Tokens where they have no place, and what is given for tokens that are not there."""
    tokens, condense, search = recipe.prompt.tokens, recipe.condense, recipe.search
    kind = ("prompt.tokens.kind", "prompt.tokens.stages")
    if condense.keep < 1 and not (
        tokens.learned_in("search") and tokens.learned_in("tune") and search.method != "hydra"
    ):
        yield (
            ("condense.keep", "search.method", *kind),
            f"condense.keep: got {condense.keep:g} without tokens that the search learns and tuning goes on with; expected 1, or "
            "prompt.tokens with stages = 'both' and a method that learns a prompt",
        )
    if tokens.kind == "none":
        return
    if tokens.width is not None and not tokens.kind.startswith("vpt"):
        yield (
            (*kind, "prompt.tokens.width"),
            f"prompt.tokens.width: got {tokens.width} for kind {tokens.kind!r}, which has no projection; leave it out",
        )
    if tokens.width is not None and tokens.init == "prototype":
        yield (
            ("prompt.tokens.init", "prompt.tokens.width"),
            f"prompt.tokens.width: got {tokens.width} with init = 'prototype', whose rows are as wide as a block; leave one out",
        )
    if tokens.init == "prototype" and not tokens.kind.startswith("vpt"):
        yield (
            (*kind, "prompt.tokens.init"),
            f"prompt.tokens.init: got 'prototype' for kind {tokens.kind!r}, whose tokens are none of the sequence; expected "
            "'uniform', or one of vpt-deep, vpt-shallow",
        )
    if tokens.init == "uniform" and tokens.prototype != "rows":
        yield (
            ("prompt.tokens.init", "prompt.tokens.prototype"),
            f"prompt.tokens.prototype: got {tokens.prototype!r} with prompt.tokens.init = 'uniform', which does not read it; "
            'leave it out, or set init = "prototype"',
        )
    if tokens.kind != "cvpt" and tokens.position != "after-attention":
        yield (
            (*kind, "prompt.tokens.position"),
            f"prompt.tokens.position: got {tokens.position!r} for kind {tokens.kind!r}, which does not read it; leave it out",
        )
    if search.unprompted_step and tokens.learned_in("search"):
        yield (
            ("search.unprompted_step", *kind),
            "search.unprompted_step: got true with tokens; expected false: they cannot be left out of a step",
        )
    if recipe.budget.allow_approximate:
        yield (
            ("budget.allow_approximate", *kind),
            "budget.allow_approximate: got true with tokens; expected false: tokens have the full width of what such groups cut",
        )
    if search.granularity != "channel" and tokens.kind == "ffn-memory":
        yield (
            ("search.granularity", *kind),
            f"search.granularity: got {search.granularity!r} with tokens of kind 'ffn-memory'; expected 'channel': in the file "
            "they are weights of the layers that are masked",
        )


def _granularity_problems(recipe: Recipe) -> Iterator[Problem]:
    """What goes with channels alone, and what with single weights."""
    search, budget = recipe.search, recipe.budget
    if not any(getattr(budget, name) is not None for name in BUDGETS):
        return  # what is there is wrong, and told
    of_weights = search.granularity != "channel"
    if of_weights != (budget.kind == "weight_ratio"):
        expected = "'weight_ratio'" if of_weights else "another budget, or search.granularity = 'weight'"
        yield (
            ("search.granularity", f"budget.{budget.kind}"),
            f"budget.{budget.kind}: got {budget.requested:g} with search.granularity = {search.granularity!r}; expected "
            f"{expected}",
        )
    if not of_weights:
        return
    if search.method in ("slim", "group_sl"):
        yield (
            ("search.granularity", "search.method"),
            f"search.method: got {search.method!r} with search.granularity = {search.granularity!r}; expected a method that "
            "scores single weights: its scores are of channels",
        )
    fields = {"search.per_cost": search.per_cost, "budget.speed": budget.speed}
    fields |= {f"budget.limits.{name}": True for name in budget.limits.given}
    fields["search.score_init"] = search.starts_for_cost
    for key, given in fields.items():
        if given:
            yield (
                ("search.granularity", key),
                f"{key}: goes with channels, got search.granularity = {search.granularity!r}; leave it out",
            )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _bench_problem(recipe: Recipe) -> Iterator[Problem]:
    """Whether the largest input that ``bench`` would make fits in memory: it is made last, after all training."""
    side, (height, width) = recipe.input.image_size, recipe.bench.image_size
    image_bytes = {"uint8": height * width * 3, "float": 3 * side * side * 4}
    form = max(recipe.export.forms, key=image_bytes.__getitem__)
    key, size = ("bench.image_size", [height, width]) if form == "uint8" else ("input.image_size", side)
    batch = max(recipe.bench.batches)
    if batch * image_bytes[form] > BENCH_BYTES:
        yield (
            ("bench.batches", "export.forms", key),
            f"bench.batches: got {batch}; with {key} = {size} the {form!r} form's input would be "
            f"{batch * image_bytes[form]:,} bytes, expected at most {BENCH_BYTES:,} (4 GiB): a batch of at most "
            f"{BENCH_BYTES // image_bytes[form]}, or a smaller {key}",
        )


def weights_of_no_file(model: ModelTable) -> str | None:
    """What is wrong with weights that are neither a checkpoint nor published by name; None when nothing is."""
    by_name = model.name.startswith(("torchvision:", "timm:"))
    if model.weights is None or model.weights.endswith(CHECKPOINT_SUFFIXES) or by_name:
        return None
    return (
        f"model.weights: got {model.weights!r} for {model.name!r}; expected a file that ends in "
        f"{', '.join(CHECKPOINT_SUFFIXES)}; only 'torchvision:...' and 'timm:...' networks have weights by name: rename the "
        "file"
    )


def _arm_problems(arms: Sequence[str], prompt: PromptTable) -> Iterator[str]:
    for needed in ("dense", "pruned"):
        if needed not in arms:
            yield f"{needed!r} is missing; every report compares dense with pruned: add it"
    if not (prompt.learned_in("search") or prompt.learned_in("tune")):
        for arm in dict.fromkeys(arms):
            if "prompt" in arm:
                yield (
                    f"{arm!r} needs a prompt, but prompt.pixels.kind and prompt.tokens.kind are 'none'; remove the arm or choose "
                    "a kind"
                )
    elif "dense+prompt" in arms and not prompt.learned_in("tune"):
        kinds = {"pixels": prompt.pixels.kind, "tokens": prompt.tokens.kind}
        stages = " and ".join(f"prompt.{name}.stages" for name, kind in kinds.items() if kind != "none")
        yield f"'dense+prompt' is tuned with the prompt, but {stages} is 'search'; remove the arm or use 'both'"
