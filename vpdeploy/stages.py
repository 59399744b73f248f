"""What every stage reads, and so when it has to be done again.

A stage's key is the hash of the recipe values and input files that it and the stages before it read. A stage whose key is
in the run folder's ledger is done. A changed key redoes cheap stages at once; for stages that train it is an error, unless
--redo names the stage.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpdeploy.errors import RecipeError, RunFolderError
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import flatten
from vpdeploy.run_folder import read_bytes, sha256_of, write_json

ORDER = ("groups", "price", "fit", "search", "condense", "cut", "tune", "export", "bench")

_NETWORK = ("model", "input")
_FIT = ("seed", "data", "fit", "compute", *_NETWORK)
_SEARCH = (*_FIT, "prompt", "search", "budget", "target")
_CONDENSED = (*_SEARCH, "condense")
_PRICE = (*_NETWORK, "budget", "target")
_PRICED = (
    *(
        "prompt.pixels.kind",
        "prompt.pixels.stages",
        "prompt.tokens.kind",
        "prompt.tokens.stages",
        "prompt.tokens.count",
    ),
    *("prompt.tokens.position", "condense.keep", "condense.scope", "export.forms", "export.opset", "bench.image_size"),
)
_CONTENTS, _MACHINE = "contents of ", "machine: "  # of keys that no recipe holds
# Keys that change what is done, never what comes out of a training stage.
_NOT_READ = (
    *("data.limit_test", "data.download", "search.data.limit_test", "search.data.download"),
    *("compute.workers", "compare.arms"),
)
# Keys that say where something lies, with the inputs that say what it is.
_PLACES = {
    "data.root": "data",
    "search.data.root": "search.data.name",
    "model.weights": "model.weights",
    "search.found": "search.found",
}
FIT_ELSEWHERE = "search"  # in place of an arm: the dense network of search.data


@dataclass(frozen=True)
class Stage:
    """One stage of one arm. ``kind`` is in ORDER; ``arm`` is empty for stages that all arms share, and FIT_ELSEWHERE for the
    second ``fit`` of a recipe with search.data.
    """

    kind: str
    arm: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.arm}" if self.arm else self.kind


def values_read(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Every recipe value that decides what ``stage`` gives, its predecessors' values included."""
    tables: tuple[str, ...]
    pruned, prompted = stage.arm.startswith("pruned"), stage.arm in ("pruned", "dense+prompt")
    base = _SEARCH if pruned else (*_FIT, "prompt") if prompted else _FIT
    if stage.kind == "groups":
        tables = _NETWORK
    elif stage.kind == "price":
        tables = _PRICE
    elif stage.kind == "fit":
        tables = _FIT
    elif stage.kind == "search":
        tables = base
    elif stage.kind in ("condense", "cut"):
        tables = _CONDENSED
    elif stage.kind == "tune":
        tables = (*(_CONDENSED if pruned else base), "tune")
    elif stage.kind == "export":
        tables = (*_CONDENSED, "tune", "export")
    else:
        tables = (*_CONDENSED, "tune", "export", "bench")
    read = {k: v for k, v in flatten(recipe).items() if k.partition(".")[0] in tables and k not in _NOT_READ}
    if stage.kind == "groups":
        read["budget.allow_approximate"] = recipe.budget.allow_approximate
    if stage.kind == "price":  # what is exported, and what a candidate is shown
        read |= {key: value for key, value in flatten(recipe).items() if key in _PRICED}
        if recipe.condense.scope == "global":  # any block may keep all its tokens
            del read["condense.keep"]
    elif not recipe.budget.reads_target:  # it is measured there, and decides nothing
        read = {key: value for key, value in read.items() if not key.startswith("target.")}
    if stage.arm == FIT_ELSEWHERE:
        read = {k: v for k, v in read.items() if not k.startswith("data.")}
        read |= {k: v for k, v in flatten(recipe).items() if k.startswith("search.data.") and k not in _NOT_READ}
    if stage.arm == "pruned-prompt":
        read = {k: v for k, v in read.items() if not k.startswith(("prompt.", "condense."))}
    if stage.kind in ("export", "bench"):
        read["compare.arms"] = list(recipe.arms)
    if stage.kind == "bench":
        read["data.limit_test"] = recipe.data.limit_test
    return read


@dataclass(frozen=True)
class Ledger:
    """Which stages of a run were begun and finished, and with what, in ``path`` (stages.json).

    ``inputs`` identifies the files that the recipe names, e.g. {"data": sha256}; ``machine`` what measurements depend on
    beside them, e.g. {"onnxruntime": "1.31.1"}. What is not given, because the file is gone or nobody looked, is taken to
    be as it was. A file with the same contents in another place is the same file.
    """

    path: Path
    inputs: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)

    def key(self, stage: Stage, recipe: Recipe) -> str:
        """A hash of everything that decides what ``stage`` gives."""
        reads = self._reads(stage, recipe)
        for key, name in _PLACES.items():
            if _CONTENTS + name in reads:
                reads.pop(key, None)
        return hashlib.sha256(json.dumps(reads, sort_keys=True).encode()).hexdigest()

    def is_done(self, stage: Stage, recipe: Recipe) -> bool:
        entry = self._entries().get(stage.name)
        return entry is not None and entry["finished"] and entry["reads"] == self._reads(stage, recipe)

    def has_begun(self, kind: str) -> bool:
        return any(name.partition(":")[0] == kind for name in self._entries())

    def begin(self, stage: Stage, recipe: Recipe) -> None:
        self._write({**self._entries(), stage.name: {"finished": False, "reads": self._reads(stage, recipe)}})

    def finish(self, stage: Stage, recipe: Recipe) -> None:
        self._write({**self._entries(), stage.name: {"finished": True, "reads": self._reads(stage, recipe)}})

    def forget(self, kind: str, recipe: Recipe) -> list[str]:
        """Forget every stage of ``kind`` and all that come after; gives their names. A dense arm that is tuned as ``recipe``
        says stays: search and cut do not reach it.
        """
        entries = self._entries()
        stages = [Stage(*name.split(":", 1)) for name in entries]
        gone = [
            stage.name
            for stage in stages
            if is_redone(stage, kind)
            and not (
                kind in ("price", "search", "condense", "cut")
                and stage.arm.startswith("dense")
                and not self.changes(stage, recipe)
            )
        ]
        self._write({name: entry for name, entry in entries.items() if name not in gone})
        return gone

    def changes(self, stage: Stage, recipe: Recipe) -> list[str]:
        """What differs from when ``stage`` was begun, a phrase each; empty when nothing does, or it never was."""
        entry = self._entries().get(stage.name)
        if entry is None:
            return []
        before, now = entry["reads"], self._reads(stage, recipe)
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return [
            f"the {key} changed" if key.startswith(_CONTENTS) else f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in keys
        ]

    def refuse_retraining(self, recipe: Recipe, *, run: Path, redo: str | None) -> None:
        """Raises: RunFolderError when a training stage was begun with other values: what it learned would be lost. Stages
        from ``redo`` on are meant to be trained again.
        """
        for stage in training_stages(recipe):
            changes = [] if redo is not None and is_redone(stage, redo) else self.changes(stage, recipe)
            if changes:
                shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
                raise RunFolderError(
                    f"{run}: holds another recipe's run: {shown}. Going on would train {stage.name!r} again: choose "
                    f"another folder with -o, or train again from there with --redo {stage.kind}"
                )

    def follow(self, recipe: Recipe) -> None:
        """Note where the files lie now that ``recipe`` names, for stages that read the same ones in another place."""
        entries, values = self._entries(), flatten(recipe)
        for entry in entries.values():
            reads = entry["reads"]
            reads |= {key: values[key] for key in _PLACES if key in values and self._is_same(reads, key)}
        if entries != self._entries():
            self._write(entries)

    def _is_same(self, before: Mapping[str, Any], key: str) -> bool:
        """Whether what lies at ``key`` now was looked at, and is what was read ``before``."""
        now = self.inputs.get(_PLACES[key])
        return key in before and now is not None and before.get(_CONTENTS + _PLACES[key]) == now

    def _reads(self, stage: Stage, recipe: Recipe) -> dict[str, Any]:
        entry = self._entries().get(stage.name, {"reads": {}})
        before = {key: value for key, value in entry["reads"].items() if key.startswith((_CONTENTS, _MACHINE))}
        values = values_read(stage, recipe)
        # A file that a key names is read by the stages that read the key.
        inputs = {_CONTENTS + name: value for name, value in self.inputs.items() if "." not in name or name in values}
        if stage.kind == "bench":
            inputs |= {_MACHINE + name: value for name, value in self.machine.items()}
            manifest = manifest_file(self.path.parent)  # which holds the checksum of every exported file
            if manifest.exists():
                inputs[f"{_CONTENTS}export"] = sha256_of(manifest)
        moved = {key: entry["reads"][key] for key in _PLACES if key in values and self._is_same(entry["reads"], key)}
        reads = {**values, **moved, **before, **inputs}
        return json.loads(json.dumps(reads))  # as it comes back from disk

    def _entries(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        again = "choose another folder with -o, or remove it: the same `vpdeploy run` then does every stage again"
        try:
            entries = json.loads(read_bytes(self.path))
        except ValueError as e:
            raise RunFolderError(f"{self.path}: damaged: {e}; {again}") from e
        if not isinstance(entries, dict) or not all(_is_entry(name, entry) for name, entry in entries.items()):
            raise RunFolderError(f"{self.path}: damaged: no list of stages; {again}")
        return entries

    def _write(self, entries: Mapping[str, Any]) -> None:
        write_json(self.path, entries)


def _is_entry(name: str, entry: Any) -> bool:
    known = name.partition(":")[0] in ORDER and isinstance(entry, dict)
    return known and isinstance(entry.get("finished"), bool) and isinstance(entry.get("reads"), dict)


def comes_after(stage: Stage, kind: str) -> bool:
    """Whether ``stage`` is of ``kind`` or later."""
    return ORDER.index(stage.kind) >= ORDER.index(kind)


def is_redone(stage: Stage, kind: str) -> bool:
    """Whether ``stage`` has to be done again once ``kind`` is. Stage 0 knows of no budget."""
    return comes_after(stage, kind) and not (kind == "price" and stage.kind == "fit")


def training_stages(recipe: Recipe) -> list[Stage]:
    """Every stage that trains, in order."""
    pruned = [arm for arm in recipe.arms if arm.startswith("pruned")]
    elsewhere = [] if recipe.search.data_needed is None else [Stage("fit", FIT_ELSEWHERE)]
    return [
        Stage("fit"),
        *elsewhere,
        *(Stage("search", arm) for arm in pruned),
        *(Stage("tune", arm) for arm in recipe.arms),
    ]


def arm_file(run: Path, name: str, arm: str) -> Path:
    """Where a value of an arm lies: the files of the arm "pruned" carry no arm in their name."""
    stem, dot, suffix = name.partition(".")
    return run / (name if arm == "pruned" else f"{stem}.{arm}{dot}{suffix}")


def source_file(run: Path, arm: str = "") -> Path:
    """The dense network; with FIT_ELSEWHERE that of search.data."""
    return run / f"source{'.' if arm else ''}{arm}.safetensors"


def measurement_file(run: Path, arm: str) -> Path:
    return run / "measured" / f"{arm}.json"


def environment_file(run: Path) -> Path:
    """Where the run was trained, and by what command."""
    return run / "environment.json"


def measuring_machine_file(run: Path) -> Path:
    """Where it was measured."""
    return run / "measured" / "environment.json"


def skipped_file(run: Path, splits: str) -> Path:
    """The bad images that were left out, a line each. ``splits``: "training" (train and val), "search" (those of search.data)
    or "test".
    """
    return run / f"skipped.{splits}.txt"


def onnx_file(run: Path, arm: str, form: str) -> Path:
    """pruned.onnx takes the caller's bytes; pruned.float.onnx what has been resized already."""
    return run / "export" / (f"{arm}.onnx" if form == "uint8" else f"{arm}.{form}.onnx")


def manifest_file(run: Path) -> Path:
    return run / "export" / "manifest.json"


def files_left(stage: Stage, recipe: Recipe, *, run: Path) -> list[Path]:
    """What ``stage`` leaves in the run folder for those after it."""
    arm = stage.arm
    if stage.kind == "export":
        forms = [onnx_file(run, arm, form) for arm in recipe.arms for form in recipe.export.forms]
        parities = [arm_file(run, "parity.json", arm) for arm in recipe.arms]
        return [*forms, *parities, manifest_file(run)]
    if stage.kind == "bench":
        measured = [measurement_file(run, arm) for arm in recipe.arms]
        return [*measured, measuring_machine_file(run), run / "predictions.npz"]
    return {
        "groups": [run / "groups.json"],
        "price": [run / "price.json"],
        "fit": [source_file(run, arm)],
        "search": [arm_file(run, "found.safetensors", arm)],
        "condense": [arm_file(run, "condensed.safetensors", arm)],
        "cut": [
            arm_file(run, "certificate.json", arm),
            arm_file(run, "plan.json", arm),
            *([] if recipe.search.granularity == "channel" else [arm_file(run, "mask.safetensors", arm)]),
        ],
        "tune": [run / f"{arm}.safetensors"],
    }[stage.kind]


def is_done(ledger: Ledger, stage: Stage, recipe: Recipe, *, run: Path) -> bool:
    """Whether the ledger says so, and every file that ``stage`` left is there; of an export also that no byte has changed."""
    there = ledger.is_done(stage, recipe) and all(path.exists() for path in files_left(stage, recipe, run=run))
    if stage.kind != "export" or not there:
        return there
    networks = {onnx_file(run, arm, form).name for arm in recipe.arms for form in recipe.export.forms}
    return _is_whole(manifest_file(run), networks=networks)


def _is_whole(manifest: Path, *, networks: Set[str]) -> bool:
    """Whether ``manifest`` names all ``networks``, and every file has the checksum that it says: what ``verify`` asks."""
    try:
        files = json.loads(read_bytes(manifest))["files"]
        listed = {name: entry["sha256"] for name, entry in files.items()}
        return networks <= listed.keys() and all(
            sha256_of(manifest.parent / name) == checksum for name, checksum in listed.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_recipe(run: Path) -> Recipe:
    """The settled recipe of a run.

    Raises: RunFolderError when ``run`` is no run folder.
    """
    path = run / "recipe.toml"
    if not path.exists():
        got = "a folder without recipe.toml" if run.is_dir() else "a file" if run.exists() else "nothing there"
        raise RunFolderError(f"{run}: got {got}; expected a run folder, as `vpdeploy run RECIPE -o RUN` makes it")
    try:
        raw = tomllib.loads(read_bytes(path).decode())
    except ValueError as e:
        raise RecipeError(str(path), [f"not valid TOML: {e}"]) from e
    return parse_recipe(raw, where=str(path), folder=run.resolve())
