"""What a network does around some of its modules: operations, not numbers. That an equal computes the same is tested alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vpdeploy.models.copies import copied
from vpdeploy.models.watch import Watch, cheapest_first, unfused_attention


def operations(network: nn.Module, inside: Iterable[str], example: Tensor) -> list[str] | None:
    """What a forward of ``network`` in eval mode does, in order: calls of the modules ``inside`` as one operation each, all
    others with their numbers and the shapes that came out. None when the forward fails. example: [n, c, h, w].

    Without arithmetic where meta tensors do; a forward in float32 on the CPU otherwise.
    """
    for convert, x in cheapest_first(example):
        watch = _Watch()
        try:
            twin = copied(network, convert).eval()
            for name in inside:
                module = twin.get_submodule(name)
                module.register_forward_pre_hook(watch.enter, with_kwargs=True)
                module.register_forward_hook(watch.leave)
            with torch.no_grad(), unfused_attention(), watch:
                twin(x)
        except Exception:
            continue
        return watch.seen
    return None


class _Watch(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._depth = 0

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._depth:
            self.seen.append(f"call {_told((args, kwargs))}")
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.seen.append(f"gives {_told(output)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._depth:
            self.seen.append(f"{func} {_told((args, kwargs))} {_told(output)}")
        return output


def _told(values: Any) -> list[str]:
    """Shapes of tensors, other values as they are."""
    return [str(list(leaf.shape)) if isinstance(leaf, Tensor) else str(leaf) for leaf in tree_leaves(values)]
