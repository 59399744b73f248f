"""Does a network do the same at other widths? Its operations are compared, dense and pruned."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.models.copies import Convert
from vpdeploy.models.watch import Watch, cheapest_first
from vpdeploy.surgery.trace import modules_followed, plain_attention, twin_of

COPIES = (
    "clone",
    "_unsafe_view",
    "_reshape_alias",
    "_to_copy",
)  # whether one is made may depend on the memory's layout


def first_change(dense: nn.Module, pruned: nn.Module, example: Tensor) -> str | None:
    """Where ``pruned`` begins to do something else than ``dense``, in words; None when it does not. example: [n, c, h, w].

    On meta tensors, without arithmetic; on the CPU where these do not serve.
    """
    tried = (_both(dense, pruned, convert, x) for convert, x in cheapest_first(example[:1]))
    steps = next((both for both in tried if both is not None), None)
    if steps is None:
        return None
    for before, after in zip_longest(*steps):
        if before != after:
            return f"the dense network does {_told(before)} where the pruned one does {_told(after)}"
    return None


def _told(step: tuple[str, str] | None) -> str:
    if step is None:
        return "nothing more"
    return f"{step[0]} in {step[1] or 'its own forward'}"


Steps = list[tuple[str, str]]  # operation, module


def _both(dense: nn.Module, pruned: nn.Module, convert: Convert, x: Tensor) -> tuple[Steps, Steps] | None:
    try:
        return _steps(twin_of(dense, convert), x), _steps(twin_of(pruned, convert), x)
    except Exception:  # whoever runs the pruned one says how it fails
        return None


def _steps(twin: nn.Module, x: Tensor) -> Steps:
    with modules_followed(twin) as where:
        watch = _Watch(where)
        with torch.no_grad(), plain_attention(), watch:
            twin(x)
    return watch.seen


class _Watch(Watch):
    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self.seen: Steps = []
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _moves(func):
            self.seen.append((func._overloadpacket.__name__.strip("_"), self._where[-1] if self._where else ""))
        return func(*args, **(kwargs or {}))


def _moves(func: Any) -> bool:
    """Whether ``func`` only views or copies."""
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    return views or func._overloadpacket.__name__ in COPIES
