"""Does the forward run without a group? Asked of meta tensors, without arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vpdeploy.models.copies import on_meta
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.limit import Limit, LimitError
from vpdeploy.surgery.plan import plan
from vpdeploy.surgery.trace import in_module, modules_followed, told, twin_of
from vpdeploy.values import ChannelGroup, ChannelMask


@dataclass(frozen=True)
class _Failure:
    reason: str
    module: str  # innermost being called


def runnable(
    network: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask, x: Tensor, limit: Limit
) -> list[ChannelGroup]:
    """``groups`` with those excluded without which the forward of ``network`` on the shape of ``x`` does not run.

    Nothing where meta tensors cannot tell: the probe judges what they leave.

    Raises: LimitError past ``limit``.
    """
    empty = twin_of(network, on_meta)
    x = torch.empty_like(x, device="meta")

    def failure(some: Sequence[ChannelGroup]) -> _Failure | None:
        inside: list[str] = []
        try:
            small = cut(empty, plan(empty, some, mask)) if some else empty
            with torch.no_grad(), modules_followed(small, limit) as inside:
                small(x)
        except LimitError:
            raise
        except Exception as e:
            reason = f"removing its channels fails{in_module(inside)}: {told(e)}"
            return _Failure(reason, inside[-1] if inside else "")
        return None

    def judged(some: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        """By bisection: a few of many, anywhere, in few forwards."""
        failed = failure(some)
        if failed is None or len(some) == 1:
            return [group if failed is None else _excluded(group, failed) for group in some]
        middle = len(some) // 2
        return [*judged(some[:middle]), *judged(some[middle:])]

    wide = [group for group in groups if group.width > 1]  # of the others the probe says what they are
    if not wide or failure([]) is not None:
        return []
    # One bad group in each of many blocks is what there is most of, and bisection then takes two forwards for each group.
    # A failure stops the forward, and whose channels were missing is near: a few parts of a forward for each bad one.
    left, out = wide, []
    while (failed := failure(left)) is not None:
        bad: dict[str, ChannelGroup] = {}
        for place in (failed.module, failed.module.rpartition(".")[0]):  # a leaf may not be of the group that it misses
            for group in left:
                if not bad and place and _is_cut_in(group, place) and (alone := failure([group])) is not None:
                    bad[group.root] = _excluded(group, alone)
        if not bad:
            return [*out, *judged(left)]
        out += bad.values()
        left = [group for group in left if group.root not in bad]
    return [*out, *left]


def _is_cut_in(group: ChannelGroup, module: str) -> bool:
    return any(member.tensor.startswith(f"{module}.") for member in group.members)


def _excluded(group: ChannelGroup, failed: _Failure) -> ChannelGroup:
    return replace(group, status="excluded", reason=failed.reason)
