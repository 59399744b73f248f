"""Scores to mask under a budget: exact, maximal, on allowed widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from vpdeploy.errors import BudgetError, SurgeryError
from vpdeploy.surgery.cost import Array, CostModel
from vpdeploy.values import ChannelGroup, ChannelMask, Selection

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Selector:
    """All that selection needs and scores do not change, laid out once so that every search step is quick.

    The channels of all groups stand in one row, group after group. Ranked by score inside their group they fall into
    blocks: the first holds what must stay, each further one leads to the next allowed width.
    """

    roots: tuple[str, ...]
    group_of: Ints  # [channels] the group of each place in the row
    starts: Ints  # [groups] first place of each group
    block_starts: Ints  # [blocks] first place of each block, in rank order
    block_group: Ints  # [blocks]
    block_width: Ints  # [blocks]
    must: Bools  # [blocks] the first block of each group
    kind: str
    requested: float
    limit: float
    cost: CostModel

    def evaluate(self, widths: Array) -> float:
        """What the budget counts, at these widths."""
        if self.kind == "channel_ratio":
            return self.cost.channels(widths)
        return self.cost.macs(widths) if self.kind == "macs_ratio" else self.cost.params(widths)


LEAST_CHANNELS = 4  # of a layer: a squeeze of 2 or 3 channels says nothing, and saves nothing


def allowed_widths(width: int, *, unit: int = 1, round_to: int, max_removal: float) -> list[int]:
    """The kept widths that a group may have, ascending; the last is the full width.

    A layer keeps ``unit`` outputs for each channel of the group: multiples of ``round_to`` of these; in groups narrower than
    4 such steps multiples of the largest power of two up to a quarter of their width, so that narrow groups keep a choice.
    Never fewer than LEAST_CHANNELS outputs, and never less than ``max_removal`` leaves.
    """
    step = round_to // math.gcd(round_to, unit)
    if width < 4 * step:
        step = 2 ** max(0, int(math.log2(max(1, width // 4))))
    least = max(math.ceil(LEAST_CHANNELS / unit), math.ceil(width * (1 - max_removal) - 1e-9))
    return [w for w in range(step, width, step) if w >= least] + [width]


def build_selector(
    groups: Sequence[ChannelGroup], cost: CostModel, *, budget: str, ratio: float, round_to: int, max_removal: float
) -> Selector:
    """Prepare selection among ``groups`` (the columns of ``cost``) for what may remain, ``ratio`` of the dense ``budget``.

    Raises: BudgetError naming the best reachable ratio when the narrowest allowed widths still cost too much, and without
    any group to prune.
    """
    if not groups and ratio < 1:
        raise BudgetError(
            f"budget.{budget}: got {ratio:g}; the best reachable is 1, as nothing can be removed: no channel group is exact; "
            "`vpdeploy inspect` gives the reasons"
        )
    widths = np.array([group.width for group in groups], np.int64)
    starts = np.concatenate([[0], np.cumsum(widths)])[:-1].astype(np.int64)
    blocks: list[tuple[int, int, int, bool]] = []  # place, group, width, must stay
    for number, group in enumerate(groups):
        edge = 0
        for kept in allowed_widths(group.width, unit=group.unit, round_to=round_to, max_removal=max_removal):
            blocks.append((int(starts[number]) + edge, number, kept - edge, edge == 0))
            edge = kept
    place, owner, size, must = (
        (np.array(column) for column in zip(*blocks, strict=True)) if blocks else [np.array([], int)] * 4
    )
    selector = Selector(
        roots=tuple(group.root for group in groups),
        group_of=np.repeat(np.arange(len(groups)), widths),
        starts=starts,
        block_starts=place,
        block_group=owner,
        block_width=size,
        must=must.astype(bool),
        kind=budget,
        requested=ratio,
        limit=0.0,
        cost=cost,
    )
    dense = selector.evaluate(cost.dense_widths)
    least = selector.evaluate(_widths(selector, selector.must))
    if least > ratio * dense * (1 + 1e-12):
        raise BudgetError(
            f"budget.{budget}: got {ratio:g}; the best reachable is {math.ceil(least / dense * 1e4) / 1e4:g} "
            f"(with round_to = {round_to}, max_removal = {max_removal:g} and {len(groups)} groups that can be pruned); "
            "ask for that or more, lower budget.round_to, or raise budget.max_removal"
        )
    return replace(selector, limit=ratio * dense * (1 + 1e-12))


def prices(selector: Selector) -> Array:
    """What the last channel of each group adds to what the budget counts: [groups], above 0."""
    dense = selector.cost.dense_widths
    without = dense - np.eye(len(dense))
    return np.array([selector.evaluate(dense) - selector.evaluate(widths) for widths in without])


def _widths(selector: Selector, taken: Bools) -> Array:
    return np.bincount(
        selector.block_group[taken], weights=selector.block_width[taken], minlength=len(selector.roots)
    ).astype(float)


def select_row(selector: Selector, scores: Array) -> Bools:
    """Which places of the row stay. scores: [channels], higher is kept first -> [channels].

    Blocks are taken in the order of their mean score. The longest run that fits is found by bisection; then every later
    block that still fits is taken. Costs only grow with widths, so a block that did not fit never will: the result is
    maximal. Ties keep the earlier channel.
    """
    order = np.lexsort((np.arange(len(scores)), -scores, selector.group_of))  # by group, then rank
    means = np.add.reduceat(scores[order], selector.block_starts) / selector.block_width
    for first, last in pairwise([*np.flatnonzero(selector.must), len(means)]):
        np.minimum.accumulate(means[first:last], out=means[first:last])  # rounding must not reorder equal blocks
    queue = np.flatnonzero(~selector.must)
    queue = queue[np.argsort(-means[queue], kind="stable")]  # blocks of one group stay in rank order
    taken = selector.must.copy()
    low, high = 0, len(queue)
    while low < high:
        middle = (low + high + 1) // 2
        taken[queue] = np.arange(len(queue)) < middle
        if selector.evaluate(_widths(selector, taken)) <= selector.limit:
            low = middle
        else:
            high = middle - 1
    taken[queue] = np.arange(len(queue)) < low
    widths = _widths(selector, taken)
    full: set[int] = set()  # groups whose next block did not fit
    for block in queue[low:].tolist():
        group = int(selector.block_group[block])
        if group in full:
            continue
        widths[group] += selector.block_width[block]
        if selector.evaluate(widths) > selector.limit:
            widths[group] -= selector.block_width[block]
            full.add(group)
    rank = np.arange(len(scores)) - selector.starts[selector.group_of]
    stays = np.empty(len(scores), bool)
    stays[order] = rank < widths[selector.group_of]
    return stays


def select(selector: Selector, scores: Mapping[str, Array]) -> Selection:
    """The mask for ``scores`` (root -> [g]) and how near it came to the budget."""
    row = (
        np.concatenate([np.asarray(scores[root], float) for root in selector.roots]) if selector.roots else np.zeros(0)
    )
    stays = select_row(selector, row) if selector.roots else np.zeros(0, bool)
    parts = np.split(stays, selector.starts[1:]) if selector.roots else []
    mask = ChannelMask({root: tuple(bool(k) for k in part) for root, part in zip(selector.roots, parts, strict=True)})
    widths = np.array([sum(mask.keep[root]) for root in selector.roots], float)
    dense = selector.evaluate(selector.cost.dense_widths)
    reached = selector.evaluate(widths) / dense if dense else 1.0
    if stays.all() and selector.requested < 1:
        raise SurgeryError(f"nothing was removed, though budget.{selector.kind} is {selector.requested:g}")
    return Selection(mask, selector.kind, selector.requested, reached)
