"""What may stand as model.name, and what is told of what may not. torch is not imported: ``check`` reads this."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path

# Built-in networks: name -> depth.
CIFAR_RESNETS = {f"cifar_resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
# Libraries of networks with published weights: how their names begin -> our door to them.
PUBLISHERS = {
    "torchvision:": "vpdeploy.models.torchvision_networks",
    "timm:": "vpdeploy.models.timm_networks",
}


def unknown_network(name: str, *, torchvision: Collection[str]) -> str:
    """What is told of a name that is of no form; ``torchvision`` are the names of its networks."""
    near = difflib.get_close_matches(name, CIFAR_RESNETS, n=3, cutoff=0.6)
    if name in torchvision:
        hint = f"did you mean 'torchvision:{name}'?"
    elif name.endswith(".py"):
        hint = f"did you mean '{name}:factory', with the name of a class or function in that file?"
    elif near:
        hint = f"did you mean {' or '.join(repr(item) for item in near)}?"
    else:
        hint = f"built in: {', '.join(CIFAR_RESNETS)}"
    return (
        f"model.name: got {name!r}; expected a built-in network, 'torchvision:NAME', 'timm:NAME', "
        f"'path/to/file.py:factory' or 'package.module:factory'; {hint}"
    )


def no_such_file(name: str, path: Path) -> str:
    return f"model.name: got {name!r}; no such file {path}; expected path/to/file.py:factory"


def no_such_module(name: str, module: str) -> str:
    return (
        f"model.name: got {name!r}; no module named {module!r} in this environment or the current folder; "
        "expected 'torchvision:NAME', 'timm:NAME', 'path/to/file.py:factory' or 'package.module:factory': "
        "install it, or give the file"
    )
