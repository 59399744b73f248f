"""A recipe: one TOML file that says everything a run depends on. Strict: every problem is found, and all are told at once.

The models below are the only definition of the keys; ``docs/recipe.md`` is generated from them.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from vpdeploy.errors import RecipeError

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Threads = Annotated[int, Field(ge=1, le=1024)]
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".th", ".safetensors")
ARMS = ("dense", "dense+prompt", "pruned", "pruned-prompt")
Arm = Literal["dense", "dense+prompt", "pruned", "pruned-prompt"]
BUDGETS = ("channel_ratio", "macs_ratio", "params_ratio")
# What follows from several keys: those keys, dotted, and what is to be told.
Problem = tuple[tuple[str, ...], str]
Values = TypeVar("Values", bound=tuple[Any, ...])


def _each_once(values: Values) -> Values:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise PydanticCustomError("twice", "each value once: remove the second {value}", {"value": repr(twice[0])})
    return values


def _at_most_one(values: Values) -> Values:
    if max(values) > 1:
        raise PydanticCustomError("scale", "at most 1 for each colour, as pixels are in [0, 1]: divide by 255")
    return values


def _not_negative(values: Values) -> Values:
    if min(values) < 0:
        raise PydanticCustomError("scale", "at least 0 for each colour, as pixels are in [0, 1]")
    return values


def _numbered_gpu(name: str) -> str:
    if not re.fullmatch(r"cuda:\d+", name):
        raise PydanticCustomError("gpu", "'cuda:N' with the number of a GPU, such as 'cuda:1'")
    return name


Colours = Annotated[tuple[float, float, float], AfterValidator(_at_most_one), AfterValidator(_not_negative)]
Scales = Annotated[tuple[Positive, Positive, Positive], AfterValidator(_at_most_one)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelTable(Table):
    """Which network, and from which weights."""

    name: str = Field(
        description='built-in ("cifar_resnet20", 32, 44, 56, 110), "torchvision:resnet18", "path/to/file.py:factory" or "package.module:factory"',
        min_length=1,
    )
    weights: str | None = Field(
        default=None,
        description="a file (.pt .pth .th .safetensors), a torchvision weight name, or absent: then [fit] trains from scratch",
        min_length=1,
    )
    head: Literal["auto", "keep", "replace", "flm", "ilm"] = Field(
        default="auto",
        description="auto: keep when class counts agree, else replace; flm, ilm: keep the source classifier and map its classes by frequency (once; again every search epoch)",
    )
    classifier: str | None = Field(
        default=None,
        description="names the classifier when it is not the last linear layer or 1x1 convolution",
        min_length=1,
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the factory")


class DataTable(Table):
    """Which images."""

    name: str = Field(
        description='"digits" (embedded), "imagefolder", or a torchvision data set: cifar10, cifar100, flowers102, oxford_pets, dtd, food101, stanford_cars, svhn, gtsrb, eurosat',
        min_length=1,
    )
    root: str | None = Field(
        default=None,
        description="folder or .zip: train/CLASS/* and test/CLASS/* (with train/ and val/ alone, val is the test split), or bare CLASS/* with test_fraction",
        min_length=1,
    )
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="split off train, stratified and seeded; reported, selects nothing by itself"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="test split for data that brings none"
    )
    limit_train: Annotated[int, Field(ge=0)] = Field(
        default=0, description="0 = all; otherwise a stratified, seeded subset of the training images"
    )
    limit_test: Annotated[int, Field(ge=0)] = Field(
        default=0, description="0 = all; otherwise a stratified, seeded subset of the test images, for short trials"
    )
    on_bad_image: Literal["fail", "skip"] = Field(default="fail", description="skip: counted and named in the report")
    max_pixels: Count = Field(default=50_000_000, description="larger images are bad images")
    augment: Literal["crop-flip", "crop", "flip", "none"] = Field(
        default="crop-flip",
        description="crop: shift by image_size / 8 with zero fill; flip: left and right; before canvas and prompt",
    )
    download: bool = Field(default=False, description="let torchvision download its data set into root")


class InputTable(Table):
    """From the caller's image to what the backbone sees."""

    image_size: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=224, description="side of the resized image, pixels"
    )
    canvas_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="side of the zero-padded canvas; absent: image_size"
    )
    resize: Literal["stretch", "shorter-side-crop"] = Field(
        default="stretch", description="how an image becomes square"
    )
    mean: Colours = Field(default=(0.485, 0.456, 0.406), description="per colour, in [0, 1]", strict=False)
    std: Scales = Field(default=(0.229, 0.224, 0.225), description="per colour, at most 1", strict=False)

    @property
    def canvas(self) -> int:
        return self.canvas_size or self.image_size


class PixelsTable(Table):
    """The learned pixels."""

    kind: Literal["pad", "fix", "random", "none"] = Field(
        default="pad",
        description="pad: a frame of width size; fix: top-left square; random: a square moved every forward",
    )
    size: Count = Field(default=16, description="width of the frame, or side of the square, pixels")
    stages: Literal["both", "search", "tune"] = Field(
        default="both", description="where the prompt is learned; search: then none is exported"
    )


class PromptTable(Table):
    """The visual prompt."""

    pixels: PixelsTable = Field(default_factory=PixelsTable)


class FitTable(Table):
    """Stage 0: one dense network from which every arm starts."""

    what: Literal["auto", "none", "head", "all"] = Field(
        default="auto", description="auto: all without weights, head after a replaced head, none otherwise"
    )
    epochs: Count = Field(default=5, description="passes over the training split")
    weight_lr: Positive = Field(default=0.02, description="peak learning rate")
    batch_size: Count = Field(default=128, description="images per step")
    weight_decay: NonNegative = Field(default=5e-4, description="not on norms and biases")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the cross entropy")


class SearchTable(Table):
    """Stage 1: scores and prompt, on frozen weights."""

    method: Literal["vpns"] = Field(default="vpns", description="with prompt.pixels.kind none it is the HYDRA baseline")
    epochs: Count = Field(default=5, description="passes over the training split")
    batch_size: Count = Field(default=128, description="images per step")
    score_lr: Positive = Field(default=0.05, description="Adam, cosine decay")
    prompt_lr: Positive = Field(default=1e-3, description="Adam, cosine decay; in [0, 1] pixel units")
    score_init: Literal["scaled", "taylor", "random"] = Field(
        default="scaled",
        description="scaled: from the group's own weight norms; taylor: from what the loss of the dense network says of each channel, for its cost; random: uniform in [0, 1)",
    )
    unprompted_step: bool = Field(
        default=False,
        description="a second step per batch without the prompt, for the scores alone (as the authors' code does)",
    )


class BudgetTable(Table):
    """What may remain: exactly one of the three ratios."""

    channel_ratio: Fraction | None = Field(
        default=None, description="of the channels of prunable groups, each group counted once"
    )
    macs_ratio: Fraction | None = Field(default=None, description="of the backbone's multiply-accumulates")
    params_ratio: Fraction | None = Field(default=None, description="of the backbone's parameters")
    round_to: Count = Field(default=8, description="kept widths are multiples of this, or the full width")
    max_removal: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9, description="largest share that any one group may lose"
    )

    @property
    def kind(self) -> str:
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def ratio(self) -> float:
        return getattr(self, self.kind)


class TuneTable(Table):
    """Stage 2: weights and prompt of the network that ships. The same for every arm."""

    epochs: Count = Field(default=20, description="passes over the training split")
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd has momentum 0.9")
    weight_lr: Positive = Field(default=0.02, description="cosine decay")
    prompt_lr: Positive = Field(default=0.02, description="cosine decay; in [0, 1] pixel units")
    weight_decay: NonNegative = Field(default=5e-4, description="not on prompt, norms and biases")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="of the cross entropy")
    batch_size: Count = Field(default=128, description="images per step")


class ComputeTable(Table):
    """Where and how training runs. What auto chose is saved in the run folder and reused on resume."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the backbone in training; auto: whichever a short measurement says is faster"
    )
    channels_last: Literal["auto", "yes", "no"] = Field(
        default="auto", description="memory layout of the backbone in training"
    )
    device: Literal["auto", "cpu", "cuda"] | Annotated[str, AfterValidator(_numbered_gpu)] = Field(
        default="auto", description='"cuda:1": the GPU of that number; auto: the first GPU, or the CPU'
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="threads that decode images; auto: one per core"
    )


class CompareTable(Table):
    """Which models stand in the report."""

    arms: Annotated[tuple[Arm, ...], Field(strict=False), AfterValidator(_each_once)] | None = Field(
        default=None,
        description="dense and pruned always; dense+prompt: tuned with the prompt; pruned-prompt: search and tune without it. Absent: dense, dense+prompt (with a prompt) and pruned",
    )


class ExportTable(Table):
    """What is written for the runtime."""

    forms: Annotated[tuple[Literal["uint8", "float"], ...], AfterValidator(_each_once)] = Field(
        default=("uint8", "float"),
        description="uint8: [n, h, w, 3], everything inside; float: [n, 3, image_size, image_size] in [0, 1]",
        strict=False,
        min_length=1,
    )
    opset: Annotated[int, Field(ge=18, le=25)] = Field(default=18, description="ONNX operator set")


class BenchTable(Table):
    """How the exported files are measured."""

    batches: Annotated[tuple[Count, ...], AfterValidator(_each_once)] = Field(
        default=(1, 8), description="batch sizes", strict=False, min_length=1
    )
    threads: Annotated[tuple[Threads, ...], AfterValidator(_each_once)] = Field(
        default=(1, 2), description="ONNX Runtime's threads", strict=False, min_length=1
    )
    seconds: Positive = Field(default=3.0, description="of measurement for each arm, form, batch and thread count")
    image_size: tuple[Count, Count] = Field(
        default=(375, 500), description="[height, width] of the uint8 form's images", strict=False
    )


class Recipe(Table):
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(default=7, description="every random stream is derived from it")
    model: ModelTable
    data: DataTable
    input: InputTable = Field(default_factory=InputTable)
    prompt: PromptTable = Field(default_factory=PromptTable)
    fit: FitTable = Field(default_factory=FitTable)
    search: SearchTable = Field(default_factory=SearchTable)
    budget: BudgetTable
    tune: TuneTable = Field(default_factory=TuneTable)
    compute: ComputeTable = Field(default_factory=ComputeTable)
    compare: CompareTable = Field(default_factory=CompareTable)
    export: ExportTable = Field(default_factory=ExportTable)
    bench: BenchTable = Field(default_factory=BenchTable)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms compared, "dense" first: what the recipe names, or every arm that its prompt allows."""
        if self.compare.arms is not None:
            return tuple(arm for arm in ARMS if arm in self.compare.arms)
        shipped = self.prompt.pixels.kind != "none" and self.prompt.pixels.stages != "search"
        return ("dense", "dense+prompt", "pruned") if shipped else ("dense", "pruned")


# --- reading --------------------------------------------------------------------------------------------------------


def _nothing_further(recipe: Recipe) -> Iterable[Problem]:
    return ()


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, further: Callable[[Recipe], Iterable[Problem]] = _nothing_further
) -> Recipe:
    """The recipe in ``path`` with ``key=value`` overrides applied; relative paths start at the recipe's folder.

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
    return parse_recipe(raw, where=where, folder=path.resolve().parent, earlier_problems=problems, further=further)


def parse_recipe(
    raw: dict[str, Any],
    *,
    where: str,
    folder: Path,
    earlier_problems: Sequence[str] = (),
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
        by_place: dict[str, list[ErrorDetails]] = {}
        for error in e.errors():
            by_place.setdefault(_place(_whole(error)), []).append(error)
        problems += [_explain(place, errors) for place, errors in by_place.items()]
        wrong = [_key(error["loc"]) for error in e.errors()]
        recipe = _without(raw, wrong)
    dotted = [".".join(key) for key in wrong]
    resolved = _absolute(recipe, folder)
    found = [*_cross_field(recipe), *further(resolved)]
    problems += [text for keys, text in found if not any(_overlap(a, b) for a in keys for b in dotted)]
    if problems:
        raise RecipeError(where, problems)
    return resolved


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
    if parts[0] == "budget" and parts[-1] in BUDGETS:
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
    return Recipe.model_validate(rest)


def _overlap(a: str, b: str) -> bool:
    """Whether two dotted keys are the same, or one lies in the other."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


def _table(path: Sequence[str]) -> type[Table] | None:
    """The table at ``path``, None where a value stands there, or nothing."""
    table: Any = Recipe
    for part in path:
        info = table.model_fields.get(part)
        if info is None or not isinstance(info.annotation, type) or not issubclass(info.annotation, Table):
            return None
        table = info.annotation
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


def _explain(place: str, errors: Sequence[ErrorDetails]) -> str:
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


def _cross_field(recipe: Recipe) -> Iterator[Problem]:
    """What no single key can know: (the keys that it follows from, problem)."""
    pixels, canvas, size = recipe.prompt.pixels, recipe.input.canvas, recipe.input.image_size
    given = [name for name in BUDGETS if getattr(recipe.budget, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        advice = "remove the others" if given else "add it, such as macs_ratio = 0.5"
        keys = tuple(f"budget.{name}" for name in BUDGETS)
        yield keys, f"budget: got {got}; expected exactly one of {', '.join(BUDGETS)}: {advice}"
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
    for problem in () if recipe.compare.arms is None else _arm_problems(recipe.compare.arms, pixels):
        yield ("compare.arms", "prompt.pixels.kind", "prompt.pixels.stages"), f"compare.arms: {problem}"
    if recipe.data.name == "imagefolder" and not recipe.data.root:
        yield ("data.name", "data.root"), "data.root: missing; expected the folder or .zip that holds the images"
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
            f'model.args: got values for {recipe.model.name!r}; only a factory ("file.py:factory") or torchvision '
            "network takes args: remove them",
        )
    if recipe.fit.what == "none" and not recipe.model.weights:
        yield ("fit.what", *weights), "fit.what: got 'none' without model.weights; expected 'all', or give weights"


def weights_of_no_file(model: ModelTable) -> str | None:
    """What is wrong with weights that are neither a checkpoint nor torchvision's; None when nothing is."""
    if model.weights is None or model.weights.endswith(CHECKPOINT_SUFFIXES) or model.name.startswith("torchvision:"):
        return None
    return (
        f"model.weights: got {model.weights!r} for {model.name!r}; expected a file that ends in "
        f"{', '.join(CHECKPOINT_SUFFIXES)}; only 'torchvision:...' networks have weights by name: rename the file"
    )


def _arm_problems(arms: Sequence[str], pixels: PixelsTable) -> Iterator[str]:
    for needed in ("dense", "pruned"):
        if needed not in arms:
            yield f"{needed!r} is missing; every report compares dense with pruned: add it"
    if pixels.kind == "none":
        for arm in dict.fromkeys(arms):
            if "prompt" in arm:
                yield f"{arm!r} needs a prompt, but prompt.pixels.kind is 'none'; remove the arm or choose a kind"
    elif "dense+prompt" in arms and pixels.stages == "search":
        yield (
            "'dense+prompt' is tuned with the prompt, but prompt.pixels.stages is 'search'; remove the arm or use "
            "'both'"
        )


def _absolute(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe with every path absolute, so that it means the same from anywhere."""
    return _with_paths(recipe, lambda path: str((folder / os.path.expanduser(path)).resolve()))


def relative_to(recipe: Recipe, folder: Path) -> Recipe:
    """The same recipe for a file in ``folder``: no path of it says where on a machine that is."""
    return _with_paths(recipe, lambda path: Path(os.path.relpath(path, folder)).as_posix())


def _with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    model, data = recipe.model, recipe.data
    file, colon, factory = model.name.rpartition(":")
    if colon and file.endswith(".py"):
        model = model.model_copy(update={"name": f"{change(file)}:{factory}"})
    if model.weights and model.weights.endswith(CHECKPOINT_SUFFIXES):
        model = model.model_copy(update={"weights": change(model.weights)})
    if data.root:
        data = data.model_copy(update={"root": change(data.root)})
    return recipe.model_copy(update={"model": model, "data": data})


# --- writing and comparing ------------------------------------------------------------------------------------------


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every key in it. ``parse_recipe(tomllib.loads(text))`` gives the same recipe back."""
    return tomli_w.dumps(_without_none(recipe.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, for comparing and hashing parts of a recipe."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and prefix != "model.args":
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            yield prefix, value

    return dict(walk("", recipe.model_dump(mode="json")))


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of the resolved recipe, as it stands in the metadata of every exported file."""
    return hashlib.sha256(json.dumps(flatten(recipe), sort_keys=True).encode()).hexdigest()


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with some dotted keys replaced; the result is checked like any other."""
    raw = recipe.model_dump(mode="json")
    for key, value in values.items():
        *path, last = key.split(".")
        table = raw
        for part in path:
            table = table[part]
        table[last] = value
    return Recipe.model_validate(raw)


def choices(annotation: Any) -> tuple[Any, ...]:
    """The words that a literal key takes (for the generated page)."""
    return get_args(annotation)
