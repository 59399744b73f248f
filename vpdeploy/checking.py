"""What a recipe needs of this machine: names that are known here, files that exist. torch is imported only where
torchvision or timm must be asked for a name, or torch for a GPU.

The layers that open these things check again, for whoever calls them without a command line.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from vpdeploy.data.archives import list_zip
from vpdeploy.data.folders import no_such_root
from vpdeploy.data.sources import KNOWN, unknown_set
from vpdeploy.data.torchvision_sets import SETS, no_root, where_to_get
from vpdeploy.errors import DataError, ModelError, VpdeployError
from vpdeploy.measure.engines import check_engine
from vpdeploy.measure.settings import setting_of, settings_of
from vpdeploy.models.names import CIFAR_RESNETS, PUBLISHERS, no_such_file, no_such_module, unknown_network
from vpdeploy.models.published import published_input
from vpdeploy.recipe.problems import Problem
from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES, DataTable, ModelTable, Recipe, data_tables

DYNAMIC = {"globals", "exec", "setattr", "vars", "locals"}  # by which a file may define what its text does not show


def outside_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a recipe names that is not here. Paths are absolute. Nothing is built, listed or decoded; a zip's table of
    contents is read.
    """
    for text in _network(recipe.model.name):
        yield ("model.name",), text
    for text in _weights(recipe.model):
        yield ("model.weights", "model.name"), text
    for prefix, table in data_tables(recipe):
        within = prefix.removesuffix("data")  # what is told of a table starts with "data."
        if table.name not in KNOWN:
            yield (f"{prefix}.name",), f"{within}{unknown_set(table.name)}"
        for text in _root(table):
            yield (f"{prefix}.root", f"{prefix}.name"), f"{within}{text}"
    for text in _device(recipe.compute.device):
        yield ("compute.device",), text
    yield from _engines(recipe)


def own_input(model: ModelTable) -> Mapping[str, Any]:
    """The [input] keys that ``model`` was published with; none for code that nobody published.

    Raises: ModelError for a name or weights that its library does not know.
    """
    found = published_input(model)
    return {} if found is None else asdict(found)


def _network(name: str) -> Iterator[str]:
    source, _, factory = name.rpartition(":")
    if name in CIFAR_RESNETS:
        return
    if name.startswith(tuple(PUBLISHERS)):
        try:
            _publisher(name).check_name(name.partition(":")[2])
        except ModelError as e:
            yield str(e)
    elif not source or not factory:
        yield unknown_network(name, torchvision=_torchvision_names(name))
    elif source.endswith(".py"):
        if not Path(source).is_file():
            yield no_such_file(name, Path(source)) + (_near(Path(source)) or ": check the path")
        else:
            yield from _factory(name, Path(source), factory)
    elif not _is_importable(source.partition(".")[0]):
        yield no_such_module(name, source.partition(".")[0])


def _factory(name: str, path: Path, factory: str) -> Iterator[str]:
    """Whether the file at ``path`` may define ``factory``, by its text. Nothing of it runs."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError, OSError) as e:
        yield f"model.name: got {name!r}, where {path} is no Python that can be read ({e}); expected a module: mend it"
        return
    defined, used = set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found) | ast.ClassDef(name=found):
                defined.add(found)
            case ast.alias(name=found, asname=other):
                defined.add(other or found.partition(".")[0])
            case ast.Name(id=found, ctx=ast.Store()):
                defined.add(found)
            case ast.Name(id=found):
                used.add(found)
    if factory not in defined and not defined & {"*", "__getattr__"} and not used & DYNAMIC:
        public = sorted(found for found in defined if not found.startswith("_"))
        near = difflib.get_close_matches(factory, public, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "check the name"
        yield (
            f"model.name: got {name!r}; {path} defines no {factory!r}; expected a class or function that returns an "
            f"nn.Module: {hint}"
        )


def _device(name: str) -> Iterator[str]:
    """Only a GPU may lack. torch is asked, which takes seconds to import."""
    if not name.startswith("cuda"):
        return
    from vpdeploy.training.compute import find_device

    try:
        find_device(name)
    except VpdeployError as e:
        yield str(e)


def _engines(recipe: Recipe) -> Iterator[Problem]:
    """Engines, devices and precisions that are not here: what measures comes before, or after, hours of training."""
    target = setting_of(recipe.target)
    if not target.engine.startswith(("torch", "openvino")):
        target = replace(target, precision="fp32")  # another one is told as a problem of the recipe itself
    keys = [("target", ("engine", "device", "precision"), [target])]
    keys += [("bench", ("engines", "device", "precision"), settings_of(recipe.bench))]
    for table, names, settings in keys:
        told = set[str]()
        for setting in settings:
            try:
                check_engine(setting)
            except VpdeployError as e:
                if str(e) not in told:
                    told.add(str(e))
                    yield tuple(f"{table}.{name}" for name in names), f"{table}.{e!s}"


def _publisher(name: str) -> ModuleType:
    """The door to the library that ``name`` is of."""
    return import_module(PUBLISHERS[f"{name.partition(':')[0]}:"])


def _torchvision_names(name: str) -> list[str]:
    """Asked only for a wrong name that might be one of them: torch takes seconds to import."""
    if name.startswith("cifar") or ":" in name or name.endswith(".py"):
        return []
    from vpdeploy.models.torchvision_networks import network_names

    return network_names()


def _is_importable(package: str) -> bool:
    """Whether there is such a top-level package, here or in the current folder. Nothing of it runs."""
    try:
        return (importlib.util.find_spec(package) or PathFinder.find_spec(package, [os.getcwd()])) is not None
    except ValueError:  # a module without a spec, such as __main__: it is there
        return True


def _weights(model: ModelTable) -> Iterator[str]:
    if model.weights is None:
        return
    if model.weights.endswith(CHECKPOINT_SUFFIXES):
        path = Path(model.weights)
        if not path.is_file():
            what = f"{path} is a folder" if path.is_dir() else f"no such file {path}"
            yield f"model.weights: {what}; expected a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)})" + (
                _near(path) or ": check the path"
            )
    elif model.name.startswith(tuple(PUBLISHERS)):
        if any(_network(model.name)):
            return  # the name is the problem
        try:
            _publisher(model.name).check_published(model.name.partition(":")[2], model.weights)
        except ModelError as e:
            yield str(e)


def _root(table: DataTable) -> Iterator[str]:
    if table.name in SETS:
        yield from _root_of_set(table)
    elif table.root is None:  # of an image folder: the recipe's own check says so
        return
    elif not Path(table.root).exists():
        needless = f"data.root: {table.root} does not exist; {table.name!r} needs no root: remove it"
        yield needless if table.name == "digits" else no_such_root(Path(table.root)) + _near(Path(table.root))
    elif table.name == "imagefolder" and not Path(table.root).is_dir():
        try:
            list_zip(Path(table.root))
        except DataError as e:
            yield str(e)


def _root_of_set(table: DataTable) -> Iterator[str]:
    spec = SETS[table.name]
    if table.root is None:
        yield no_root(table.name)
    elif table.download:
        if Path(table.root).is_file():
            yield f"data.root: {table.root} is a file; expected the folder into which to download {table.name}"
    elif not any((Path(table.root) / name).exists() for name in spec.files):
        yield f"data.root: {table.root} does not hold {table.name}; {where_to_get(spec)}"


def _near(path: Path) -> str:
    """A hint at a name beside ``path`` that is nearly its own; empty when there is none."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(path.parent)
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}, in that folder?" if near and near[0] != path.name else ""
