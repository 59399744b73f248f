"""Networks from the user's own code: "path/to/file.py:factory" and "package.module:factory"."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from torch import nn

from vpdeploy.errors import ModelError
from vpdeploy.models.architecture import Architecture
from vpdeploy.models.names import no_such_file, no_such_module

CLASS_PARAMETERS = ("classes", "num_classes")
USUAL_CLASSES = 1000  # of a network that must be told and is told nothing: ImageNet's


def user_architecture(name: str, *, args: Mapping[str, Any]) -> Architecture:
    """The network that the factory ``name`` makes when it is called with ``args``.

    Raises: ModelError when the code cannot be imported, holds no such factory, fails, or makes no nn.Module.
    """
    source, _, attribute = name.rpartition(":")
    folder = Path(source).parent if source.endswith(".py") else Path.cwd()
    with _importable(folder):
        module = _import_file(Path(source), name) if source.endswith(".py") else _import_module(source, name)
    factory = _factory(module, attribute, name=name)
    counted = next((key for key in CLASS_PARAMETERS if key in _parameters(factory)), None)
    takes_classes = counted is not None and counted not in args

    def make(classes: int | None) -> nn.Module:
        arguments = dict(args)
        if counted is not None and takes_classes:
            needed = _parameters(factory)[counted].default is inspect.Parameter.empty
            if classes is not None or needed:
                arguments[counted] = USUAL_CLASSES if classes is None else classes
        # The factory may import beside itself, too.
        with _importable(folder), _blamed(f"{name!r} called with {_shown(arguments)}"):
            network = factory(**arguments)
        if not isinstance(network, nn.Module):
            raise ModelError(
                f"model.name: {name!r} gave a {type(network).__name__}; expected an nn.Module: "
                "name a class or function that returns the network"
            )
        return network

    return Architecture(make, takes_classes)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """``folder`` first on the import path, for as long as the block runs."""
    entry = os.fspath(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever the user's code raises is told as a fault of the user's code, with the place.

    What it prints goes to stderr: stdout holds answers, such as one JSON object.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except ModelError:
        raise
    except (Exception, SystemExit) as e:
        # The first frame is ours; the import system's own frames say nothing to the user.
        frames = [frame for frame in traceback.extract_tb(e.__traceback__)[1:] if not frame.filename.startswith("<")]
        frames = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise ModelError(
            f"model.name: {what} failed: {type(e).__name__}: {e}{place}; expected code that runs without vpdeploy: "
            "mend it, or its arguments (a recipe's model.args)"
        ) from e


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ModelError(no_such_file(name, path))
    identity = f"vpdeploy_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(identity, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[identity] = module  # dataclasses and inspect look a class's module up by name
    try:
        with _blamed(f"importing {str(path)!r}"):
            spec.loader.exec_module(module)
    except ModelError:
        del sys.modules[identity]
        raise
    return module


def _import_module(source: str, name: str) -> ModuleType:
    with _blamed(f"importing {source!r}"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{source}.".startswith(f"{e.name}."):
                raise  # it is there, and something that it imports is not
            raise ModelError(no_such_module(name, e.name)) from e


def _factory(module: ModuleType, attribute: str, *, name: str) -> Callable[..., Any]:
    callables = [key for key, value in vars(module).items() if _makes(value) and not key.startswith("_")]
    factory = getattr(module, attribute, None)  # not vars(): packages may load their parts when asked
    if _makes(factory):
        return factory
    near = difflib.get_close_matches(attribute, callables, n=3, cutoff=0.5) or callables[:10]
    what = "nothing of that name" if factory is None else f"of type {type(factory).__name__}"
    hint = f"it has {', '.join(near)}" if near else "it has none"
    if isinstance(factory, nn.Module):
        hint = "it is a network already: name a function that makes one"
    raise ModelError(
        f"model.name: got {name!r}, where {attribute!r} is {what}; expected a class or function that returns an "
        f"nn.Module; {hint}"
    )


def _makes(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether ``value`` may be a factory. A network can be called, too, but with images."""
    return callable(value) and not isinstance(value, nn.Module)


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (ValueError, TypeError):  # compiled callables may not tell
        return {}


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
