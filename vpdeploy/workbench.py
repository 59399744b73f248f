"""A run, opened: its settled recipe, its data and network, and what its stages left on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import nn

from vpdeploy import run_folder
from vpdeploy.data.contents import fingerprint_of_contents, remember
from vpdeploy.data.prepared import prepare
from vpdeploy.data.sources import DataSource, open_source
from vpdeploy.errors import DataError, RunFolderError
from vpdeploy.measure.environment import environment, machine
from vpdeploy.models.build import Built, build, check_forward, with_separate_heads
from vpdeploy.models.tokens.fold import check_tokens
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES, Recipe
from vpdeploy.recipe.writing import dump_recipe, flatten, with_values
from vpdeploy.run_folder import Journal
from vpdeploy.stages import (
    Ledger,
    Stage,
    arm_file,
    environment_file,
    is_done,
    is_redone,
    read_recipe,
    skipped_file,
    source_file,
    training_stages,
)
from vpdeploy.surgery.cut import cut
from vpdeploy.training.compute import choose_compute
from vpdeploy.training.network import Compute, TrainingData
from vpdeploy.values import Dense, PrunePlan, Tuned


@dataclass(frozen=True)
class Workbench:
    """What every stage of a run needs. ``training_data`` and ``compute`` are made when first asked for."""

    run: Path
    recipe: Recipe
    source: DataSource
    search_source: DataSource | None  # of search.data
    built: Built
    ledger: Ledger
    display: Display
    training_data: Callable[[], TrainingData]
    compute: Callable[[], Compute]

    def is_done(self, stage: Stage) -> bool:
        """Whether ``stage`` was finished with these values, and nothing of what it left has been removed since."""
        return is_done(self.ledger, stage, self.recipe, run=self.run)

    def require(self, stages: Iterable[Stage], *, command: str) -> None:
        """Raises: RunFolderError when one of ``stages`` is not done, so that what lies there is of another network, or when
        an exported file has changed since.
        """
        missing = [stage.name for stage in stages if not self.is_done(stage)]
        if missing:
            raise RunFolderError(
                f"{self.run}: not done yet, or changed since: {', '.join(missing)}; run `{command}` first"
            )

    @contextmanager
    def doing(self, stage: Stage) -> Iterator[None]:
        """Note that ``stage`` has begun and, when the block ends well, that its result is on disk."""
        self.ledger.begin(stage, self.recipe)
        self.display.say(f"{stage.name} ...")
        yield
        self.ledger.finish(stage, self.recipe)
        _drop_state(self.run, stage.name)

    def journal(self, stage: Stage) -> Journal:
        key = self.ledger.key(stage, self.recipe)
        journal = Journal(stage.name, key, _state_file(self.run, stage.name), self.run / "history.jsonl")
        if not journal.has_begun:
            run_folder.drop_history(journal.history_file, stage.name)
        return journal


def open_workbench(recipe: Recipe, run: Path, *, redo: str | None, display: Display) -> Workbench:
    """Settle ``recipe`` (every "auto" decided, as before where the run has begun) and open its data and network.

    Raises: RunFolderError when the folder holds another recipe's run; DataError, ModelError for what does not fit.
    """
    source = open_source(recipe.data, seed=recipe.seed)
    afresh = redo is not None and is_redone(Stage("fit"), redo)
    begun = read_recipe(run) if _has_trained(run) and not afresh else None
    recipe = recipe if begun is None else _as_before(recipe, begun)
    search_source = _search_source(recipe, run=run, redo=redo)
    caches = {"data": (source, run / "inputs.json")}
    if search_source is not None:
        caches["search.data.name"] = (search_source, run / "inputs.search.json")
    contents = {key: fingerprint_of_contents(data, cache=kept, display=display) for key, (data, kept) in caches.items()}
    ledger = Ledger(run / "stages.json", {**contents, **_named_files(recipe)}, machine())
    ledger.refuse_retraining(recipe, run=run, redo=redo)
    for key, (data, kept) in caches.items():
        remember(data, contents[key], cache=kept)
    fresh = afresh or not is_done(ledger, Stage("fit"), recipe, run=run)
    built = build(
        recipe.model,
        classes=len(source.classes),
        seed=recipe.seed,
        with_weights=fresh,
        source_classes=None if fresh else run_folder.read_network(source_file(run))[2]["source_classes"],
    )
    if fresh:
        outputs = built.source_classes if built.head in ("flm", "ilm") else len(source.classes)
        check_forward(built.backbone, canvas_size=recipe.input.canvas, classes=outputs)
    built = with_separate_heads(built, canvas_size=recipe.input.canvas)
    if recipe.prompt.tokens.kind != "none":
        check_tokens(built.backbone, recipe.prompt.tokens, canvas_size=recipe.input.canvas)
    recipe = _settle(recipe, built)
    if redo is not None:  # only now that nothing is wrong: what is forgotten has to be trained again
        for name in ledger.forget(redo, recipe):
            _drop_state(run, name)
    ledger.follow(recipe)
    run_folder.write_bytes(run / "recipe.toml", dump_recipe(recipe).encode())
    return Workbench(
        run=run,
        recipe=recipe,
        source=source,
        search_source=search_source,
        built=built,
        ledger=ledger,
        display=display,
        training_data=cache(lambda: prepared(source, recipe, run=run, splits="training", display=display)),
        compute=cache(lambda: choose_compute(built.backbone, recipe=recipe)),
    )


def _state_file(run: Path, stage: str) -> Path:
    return run / "state" / f"{stage.replace(':', '.')}.pt"


def _drop_state(run: Path, stage: str) -> None:
    """Of all the stage's parts."""
    own = _state_file(run, stage)
    for path in (own, *own.parent.glob(f"{own.stem}.[0-9]*{own.suffix}")):
        path.unlink(missing_ok=True)


def _search_source(recipe: Recipe, *, run: Path, redo: str | None) -> DataSource | None:
    """The images of search.data; None where there is none, and where they are gone after every search is done."""
    table = recipe.search.data_needed
    if table is None:
        return None
    try:
        return open_source(table, seed=recipe.seed)
    except DataError as e:
        ledger = Ledger(run / "stages.json", {})
        searches = [stage for stage in training_stages(recipe) if stage.kind == "search"]
        if all(
            is_done(ledger, stage, recipe, run=run) and not (redo is not None and is_redone(stage, redo))
            for stage in searches
        ):
            return None
        raise DataError(f"search.{e}" if str(e).startswith("data.") else f"search.data: {e}") from e


def _has_trained(run: Path) -> bool:
    """Whether a training stage was begun there: until then nothing is lost when "auto" is decided again."""
    return (run / "recipe.toml").exists() and Ledger(run / "stages.json", {}).has_begun("fit")


def note_environment(run: Path, command: str) -> None:
    """Write down where and by what words the run was made, for its report."""
    noted = {"schema": run_folder.SCHEMA, "command": command, "environment": environment()}
    run_folder.write_json(environment_file(run), noted)


def _as_before(recipe: Recipe, begun: Recipe) -> Recipe:
    """``recipe`` with every "auto" as it was settled when the run began."""
    now, before = flatten(recipe), flatten(begun)
    return with_values(
        recipe, {key: before[key] for key, value in now.items() if value == "auto" and before[key] != "auto"}
    )


def _settle(recipe: Recipe, built: Built) -> Recipe:
    values: dict[str, object] = {"model.head": built.head}
    if recipe.fit.what == "auto":
        values["fit.what"] = "all" if recipe.model.weights is None else "head" if built.head == "replace" else "none"
    if recipe.tune.distill == "auto":
        learned = values.get("fit.what", recipe.fit.what) != "head" and built.head not in ("flm", "ilm")
        values["tune.distill"] = 0.9 if learned else 0.0
    if recipe.compute.workers == "auto":
        values["compute.workers"] = (
            len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
        )
    if "auto" in (recipe.compute.device, recipe.compute.precision, recipe.compute.channels_last):
        compute = choose_compute(built.backbone, recipe=recipe)
        values |= {
            "compute.device": str(compute.device),
            "compute.precision": "bf16" if compute.bf16 else "fp32",
            "compute.channels_last": "yes" if compute.channels_last else "no",
        }
    return with_values(recipe, values)


def _named_files(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files that a recipe names; none for a file that is gone: whoever still needs it says so."""
    named = {"model.weights": recipe.model.weights or "", "model.name": recipe.model.name.rpartition(":")[0]}
    named["search.found"] = recipe.search.found or ""
    files = {key: Path(name) for key, name in named.items() if name.endswith((*CHECKPOINT_SUFFIXES, ".py"))}
    return {key: run_folder.sha256_of(path) for key, path in files.items() if path.is_file()}


def prepared(source: DataSource, recipe: Recipe, *, run: Path, splits: str, display: Display) -> TrainingData:
    """The training and validation images of ``source``, as recipe.data and recipe.input say; what was left out is noted."""
    table, workers = recipe.data, recipe.compute.workers
    assert isinstance(workers, int), "settled"
    train, val = (
        prepare(refs, recipe.input, max_bad=table.on_bad_image, workers=workers, display=display, label=label)
        for refs, label in ((source.train, "training images"), (source.val, "validation images"))
    )
    run_folder.write_lines(skipped_file(run, splits), (*train.skipped, *val.skipped))
    return TrainingData(train, val, len(source.classes))


# --- what stages leave on disk --------------------------------------------------------------------------------------


def write_dense(work: Workbench, dense: Dense, *, arm: str = "") -> None:
    about = {
        "label_map": dense.label_map,
        "classifier": work.built.classifier,
        "source_classes": work.built.source_classes,
    }
    run_folder.write_network(source_file(work.run, arm), dense.backbone.state_dict(), prompt={}, about=about)


def read_dense(work: Workbench, *, arm: str = "") -> Dense:
    state, _, about = run_folder.read_network(source_file(work.run, arm))
    return Dense(_filled(work.built.backbone, state), run_folder.as_label_map(about["label_map"]))


def write_tuned(run: Path, arm: str, tuned: Tuned) -> None:
    about = {"label_map": tuned.label_map}
    run_folder.write_network(run / f"{arm}.safetensors", tuned.backbone.state_dict(), prompt=tuned.prompt, about=about)


def read_tuned(work: Workbench, arm: str) -> Tuned:
    """An arm from its tensors and, for a pruned one, its plan: no pickled module is ever needed.

    Raises: RunFolderError when the arm has not been tuned yet.
    """
    path = work.run / f"{arm}.safetensors"
    if not path.exists():
        raise RunFolderError(f"{path}: no such file; the arm {arm!r} is not tuned yet: run `vpdeploy prune` first")
    state, prompt, about = run_folder.read_network(path)
    skeleton = work.built.backbone
    if arm.startswith("pruned"):
        skeleton = cut(skeleton, run_folder.read_value(arm_file(work.run, "plan.json", arm), PrunePlan))
    return Tuned(_filled(skeleton, state), prompt, run_folder.as_label_map(about["label_map"]))


def read_mask(work: Workbench, arm: str) -> dict[str, torch.Tensor]:
    """Which weights of a pruned arm are kept, by name; empty where channels were cut."""
    if work.recipe.search.granularity == "channel":
        return {}
    return run_folder.read_tensors(arm_file(work.run, "mask.safetensors", arm))[0]


def _filled(skeleton: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    backbone = copy.deepcopy(skeleton)
    backbone.load_state_dict(state)
    return backbone.eval()
