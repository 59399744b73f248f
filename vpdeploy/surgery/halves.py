"""What a probe masks: parts of every group that no wrong indexing leaves as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from vpdeploy.values import ChannelGroup, ChannelMask

Half = Callable[[Sequence[ChannelGroup]], ChannelMask]


def _random_part(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """A share of each group that is its own, a quarter to three quarters, in any places: what is left of a large network must
    not be as large again.
    """
    generator = torch.Generator().manual_seed(0)
    keep: dict[str, tuple[bool, ...]] = {}
    for number, group in enumerate(groups):
        order = torch.randperm(group.width, generator=generator).tolist()
        share = (
            0.25 + (0.5 + number * (5**0.5 - 1) / 2) % 1 / 2
        )  # multiples of the golden ratio: neighbours lie far apart
        gone = set(order[: 1 + int(share * (group.width - 1))])
        keep[group.root] = tuple(channel not in gone for channel in range(group.width))
    return ChannelMask(keep)


def _last_part(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """Keep the last channels, in a number that shares no factor with the width: as many in all groups that are wide enough,
    fewer than half in the others, every second one the most that this can be, the rest the least but one.
    """
    few = next(k for k in (5, 7, 11, 13, 17, 19, 23) if k == 23 or all(group.width % k for group in groups))
    kept: dict[str, int] = {}
    for number, group in enumerate(groups):
        fitting = [k for k in range(1, max(1, (group.width - 1) // 2) + 1) if math.gcd(k, group.width) == 1]
        kept[group.root] = few if few in fitting else fitting[-1 if number % 2 == 0 else min(1, len(fitting) - 1)]
    return ChannelMask({g.root: tuple(c >= g.width - kept[g.root] for c in range(g.width)) for g in groups})


def one_left(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """What tells apart code that takes shares of an axis: its groups must not need to lose as many as each other."""
    return ChannelMask({g.root: tuple(c == g.width - 1 for c in range(g.width)) for g in groups})


# A random half of a few channels may be its own mirror image, or take as much from each part of a grouped convolution,
# and such a group would pass (8 channels and a flip did). No flip or roll leaves the last part as it is, and no grouping
# can share it out evenly: it fails there whatever the weights, even where the channel that would differ is dead behind a ReLU.
# Groups lose different shares in the one: code that splits an axis in two works as long as both of its groups lose the same
# number. In the other most keep as many, and few: code that adds only what is equally wide, or does something else where an
# axis is long, does so there.
# In narrow groups different shares are equal numbers: where a slice was taken, ``one_left`` sees to it.
HALVES: tuple[Half, ...] = (_random_part, _last_part)
