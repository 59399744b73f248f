"""Small networks around one piece of code that surgery gets wrong easily, and what is expected of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from strategies import SIDE, Head, conv_norm, image, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask

AGREEMENT = 1e-12  # masked against removed, of the largest logit: 1e-16 to 1e-14 was seen on networks this small
CONTROL = 1e-6  # what a mask must change, or agreement says nothing
OUTPUTS = r"its channels are the network's outputs"


class Piece(nn.Module):
    """``function(self, x)`` as a forward, with ``layers`` as attributes: a few lines of somebody's network."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Around(nn.Module):
    """stem (3 -> width) -> ``piece`` -> last (out -> 6) -> head: stem.0 can be pruned where the piece lets it, last.0 always."""

    def __init__(self, piece: nn.Module, *, width: int = 8, out: int | None = None):
        super().__init__()
        self.stem, self.piece, self.last = conv_norm(3, width), piece, conv_norm(out or width, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.last(self.piece(F.silu(self.stem(x))))))


@dataclass(frozen=True)
class Case:
    """``prunable``: "root width" of every group that must be prunable, no more and no fewer; ``refused``: root -> a pattern
    of its reason, for all others but those that end in the logits.
    """

    make: Callable[[], nn.Module]
    prunable: str
    refused: Mapping[str, str] = field(default_factory=dict)


def around(
    make: Callable[[], nn.Module], prunable: str, refused: Mapping[str, str] | None = None, *, width: int = 8,
    out: int | None = None,
) -> Case:  # fmt: skip
    return Case(lambda: Around(make(), width=width, out=out), prunable, refused or {})


def piece(
    function: Callable[..., Tensor], prunable: str, *, width: int = 8, out: int | None = None,
    refused: Mapping[str, str] | None = None, **layers: Callable[[], nn.Module | nn.Parameter | Tensor]
) -> Case:  # fmt: skip
    """A case around ``function``; ``layers`` are made anew for every network."""

    def make() -> nn.Module:
        return Around(Piece(function, **{name: layer() for name, layer in layers.items()}), width=width, out=out)

    return Case(make, prunable, refused or {})


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int | str) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def network_of(case: Case, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(case.make(), seed=seed)


def groups_of(network: nn.Module, *, allow_approximate: bool = False) -> ChannelGroups:
    example = example_input(SIDE)
    found = find_groups(network, example)
    return probe(network, found, example=example, allow_approximate=allow_approximate)


def described(groups: Sequence[ChannelGroup]) -> str:
    return ", ".join(f"{group.root} {group.width}" for group in groups)


def random_mask(groups: Sequence[ChannelGroup], *, seed: int) -> ChannelMask:
    """Some of every group, at least one, never all."""
    rng = np.random.default_rng(seed)
    rows = {g.root: rng.permutation(g.width) < rng.integers(1, g.width) for g in groups}
    return ChannelMask({root: tuple(bool(k) for k in row) for root, row in rows.items()})


def check_law(network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Each of ``groups`` alone and all together, under random masks: masked == removed, and masking changes the logits."""
    x = image(7)
    with torch.no_grad():
        full = network(x)
        for number, chosen in enumerate([*([group] for group in groups), groups, groups, groups, groups]):
            mask = random_mask(chosen, seed=number)
            masked = Gated(copy.deepcopy(network), chosen)(x, mask_row(chosen, mask, dtype=torch.float64))
            removed = cut(network, plan(network, chosen, mask))(x)
            assert masked.shape == removed.shape == full.shape
            scale = float(masked.abs().max())
            assert float((masked - removed).abs().max()) <= AGREEMENT * scale, described(chosen)
            assert float((masked - full).abs().max()) > CONTROL * scale, described(chosen)


def check(case: Case) -> None:
    """All that ``case`` says, and the law for what is prunable."""
    network = network_of(case)
    groups = groups_of(network)
    assert described(groups.prunable) == case.prunable, described(groups.prunable)
    refused = {g.root: g.reason for g in groups.groups if g.status == "excluded" and not re.search(OUTPUTS, g.reason)}
    assert refused.keys() == case.refused.keys(), refused
    for root, pattern in case.refused.items():
        assert re.search(pattern, refused[root]), f"{root}: {refused[root]}"
    check_law(network, groups.prunable)
