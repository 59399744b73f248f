"""Scores to mask under a budget: exact, maximal, on allowed widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from vpdeploy.errors import BudgetError, SurgeryError
from vpdeploy.surgery.cost import Array, Cost, CostModel, quantity_of
from vpdeploy.values import ChannelGroup, ChannelMask, Selection

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Bound:
    """One quantity and what it may be at most. ``kind`` and ``requested`` as the recipe says them; ``cost``: of widths [groups],
    never less for wider ones; ``dense``: what ratios are of; ``limit``: in the unit of both.
    """

    kind: str
    cost: Cost
    dense: float
    requested: float
    limit: float

    def reached(self, widths: Array) -> float:
        """As ``requested`` counts it."""
        amount = self.cost(widths)
        return amount if not is_ratio(self.kind) else amount / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class Selector:
    """All that selection needs and scores do not change, laid out once so that every search step is quick.

    The channels of all groups stand in one row, group after group. Ranked by score inside their group they fall into
    blocks: the first holds what must stay, each further one leads to the next allowed width. ``bounds``: the budget, and
    hard limits beside it.
    """

    roots: tuple[str, ...]
    group_of: Ints  # [channels] the group of each place in the row
    starts: Ints  # [groups] first place of each group
    block_starts: Ints  # [blocks] first place of each block, in rank order
    block_group: Ints  # [blocks]
    block_width: Ints  # [blocks]
    must: Bools  # [blocks] the first block of each group
    dense_widths: Array
    bounds: tuple[Bound, ...]
    round_to: int  # of allowed widths, for messages
    max_removal: float
    speed: Cost | None = None  # milliseconds, where importance is weighed against them too

    @property
    def budget(self) -> Bound:
        return self.bounds[0]

    @property
    def least_widths(self) -> Array:
        return _widths(self, self.must)

    def fits(self, widths: Array) -> bool:
        return all(bound.cost(widths) <= bound.limit for bound in self.bounds)

    def limited(self, kind: str, limit: float) -> Selector:
        """The same with another limit on ``kind``."""
        return replace(self, bounds=tuple(replace(b, limit=limit) if b.kind == kind else b for b in self.bounds))


MEASURED = ("latency_ratio", "latency_ms", "memory_mib")  # of these a sum is near what the network has, and no more
LEAST_CHANNELS = 4  # of a layer: a squeeze of 2 or 3 channels says nothing, and saves nothing


STEPS = 4  # of widths, at least, that a group may have


def allowed_widths(width: int, *, unit: int = 1, round_to: int, max_removal: float, steps: int = STEPS) -> list[int]:
    """The kept widths that a group may have, ascending; the last is the full width.

    A layer keeps ``unit`` outputs for each channel of the group: multiples of ``round_to`` of these; in groups narrower than
    ``steps`` such steps, or as wide as one, multiples of the largest power of two up to a quarter of their width, so that
    narrow groups keep a choice. Never fewer than LEAST_CHANNELS outputs, and never less than ``max_removal`` leaves.
    """
    step = round_to // math.gcd(round_to, unit)
    if width < steps * step or width == step:
        step = 2 ** max(0, int(math.log2(max(1, width // 4))))
    least = max(math.ceil(LEAST_CHANNELS / unit), math.ceil(width * (1 - max_removal) - 1e-9))
    return [w for w in range(step, width, step) if w >= least] + [width]


def most_removed(root: str, *, max_removal: float, caps: Mapping[str, float]) -> float:
    """The largest share that the group ``root`` may lose: that of the first pattern in ``caps`` that fits, or ``max_removal``."""
    return next((share for pattern, share in caps.items() if fnmatchcase(root, pattern)), max_removal)


def build_selector(
    groups: Sequence[ChannelGroup],
    cost: CostModel,
    *,
    budget: str,
    requested: float,
    round_to: int,
    max_removal: float,
    caps: Mapping[str, float] = MappingProxyType({}),
    limits: Mapping[str, float] = MappingProxyType({}),
    steps: int = STEPS,
    speed: str | None = None,
    stops: Callable[[str, Array], str] = lambda kind, widths: "",
) -> Selector:
    """Prepare selection among ``groups`` (the columns of ``cost``) for what may remain: ``requested`` of the dense network for a
    ratio, otherwise in the budget's own unit. ``caps``: as ``most_removed`` takes them; ``limits``: hard ones beside it, kind ->
    at most; ``steps``: as ``allowed_widths`` takes them; ``speed``: the quantity that importance is weighed against beside
    the budget's, unless that is the same; ``stops`` tells what a kind is made of where widths can get no narrower.

    Raises: BudgetError naming the best reachable value when the narrowest allowed widths still cost too much (but for MEASURED
    quantities), when the dense network does with less than was requested, for a cap that fits no group, and without any group to
    prune.
    """
    unknown = [pattern for pattern in caps if not any(fnmatchcase(group.root, pattern) for group in groups)]
    if unknown:
        raise BudgetError(
            f"budget.caps: {', '.join(map(repr, unknown))} fits no group that can be pruned; expected names, or patterns with * "
            f"and ?, of {', '.join(group.root for group in groups)}"
        )
    widths = np.array([group.width for group in groups], np.int64)
    starts = np.concatenate([[0], np.cumsum(widths)])[:-1].astype(np.int64)
    allowed = [
        allowed_widths(
            group.width,
            unit=group.unit,
            round_to=round_to,
            max_removal=most_removed(group.root, max_removal=max_removal, caps=caps),
            steps=steps,
        )
        for group in groups
    ]
    edges = [[0, *of_group[:-1]] for of_group in allowed]  # where the blocks of each group begin
    row = lambda of_groups: np.array([value for of_group in of_groups for value in of_group], np.int64)  # noqa: E731
    selector = Selector(
        roots=tuple(group.root for group in groups),
        group_of=np.repeat(np.arange(len(groups)), widths),
        starts=starts,
        block_starts=row(edges) + np.repeat(starts, [len(of_group) for of_group in edges]),
        block_group=np.repeat(np.arange(len(groups)), [len(of_group) for of_group in edges]),
        block_width=row(allowed) - row(edges),
        must=row(edges) == 0,
        dense_widths=cost.dense_widths,
        bounds=tuple(
            Bound(
                kind, cost.of(kind), dense := cost.dense_of(kind), amount, amount * (dense if is_ratio(kind) else 1.0)
            )
            for kind, amount in ((budget, requested), *limits.items())
        ),
        round_to=round_to,
        max_removal=max_removal,
        speed=None if speed in (None, quantity_of(budget)) else cost.of(speed),
    )
    for bound in selector.bounds:
        _check_reachable(bound, selector, stops)
    return replace(selector, bounds=tuple(replace(b, limit=b.limit * (1 + 1e-12)) for b in selector.bounds))


def _check_reachable(bound: Bound, selector: Selector, stops: Callable[[str, Array], str]) -> None:
    """Raises: as ``build_selector``."""
    key, groups = _key(bound, selector), selector.roots
    dense, least = bound.dense, bound.cost(selector.least_widths)
    if bound is selector.budget and not is_ratio(bound.kind) and bound.limit >= dense:
        raise BudgetError(
            f"{key}: got {bound.requested:g}; the dense network has {shown(dense)} already, so that nothing need be "
            f"removed: ask for less, or give a ratio and this as budget.limits.{bound.kind}"
        )
    if not groups and (bound.requested < 1 if is_ratio(bound.kind) else bound.limit < dense):
        raise BudgetError(
            f"{key}: got {bound.requested:g}; the best reachable is {_reachable(bound, dense, dense)}, as nothing can be "
            "removed: no channel group is exact; `vpdeploy inspect` gives the reasons"
        )
    if groups and least > bound.limit * (1 + 1e-12) and bound.kind not in MEASURED:
        raise unreachable(bound, selector, least, made_of=stops(bound.kind, selector.least_widths))


def unreachable(
    bound: Bound, selector: Selector, least: float, *, made_of: str, measured_on: str | None = None
) -> BudgetError:
    """least: of the narrowest network, in the unit of ``bound.dense``; ``made_of``: of what that is made, or ""."""
    free = int((selector.least_widths < selector.dense_widths).sum())
    under = [f"round_to = {selector.round_to}", f"max_removal = {selector.max_removal:g}"]
    under.append(f"at least {LEAST_CHANNELS} outputs of a layer, and {free} groups that can lose some")
    told = f"({f'measured on {measured_on}, ' if measured_on else ''}with {', '.join(under)})"
    more = "ask for that or more"
    if is_ratio(bound.kind) and least > bound.dense:
        more = "no ratio can be met: the narrowest network costs more than the dense one, which ships without a prompt"
    less = f"{'a smaller round_to, or ' if selector.round_to > 1 else ''}a larger max_removal reaches less"
    if not selector.roots:
        less = "nothing can be removed: `vpdeploy inspect` gives the reasons"
    return BudgetError(
        f"{_key(bound, selector)}: got {bound.requested:g}; the best reachable is {_reachable(bound, least, bound.dense)} {told}"
        f"{made_of}; {more}; {less}"
    )


def _key(bound: Bound, selector: Selector) -> str:
    return f"budget.{bound.kind}" if bound is selector.budget else f"budget.limits.{bound.kind}"


def is_ratio(kind: str) -> bool:
    return kind.endswith("_ratio")


def _reachable(bound: Bound, least: float, dense: float) -> str:
    """Rounded up: what is told can be asked for."""
    return shown(least) if not is_ratio(bound.kind) else f"{math.ceil(least / dense * 1e4) / 1e4:g}" if dense else "1"


def shown(value: float) -> str:
    """Four digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.6g}"


def prices(selector: Selector) -> Array:
    """What importance is weighed against, for the last channel of each group: [groups], at least 0.

    What it adds to the budget: importance per product, or per millisecond (HALP, arXiv:2110.10811). Where speed counts beside
    another budget, the square of the milliseconds for each unit of that, relative to the whole network's, and no more:
    importance per product makes layers of unlike widths, which run slower than equally narrowed ones with the same products
    (docs/results/speed.md). That is counted where every group has about what the budget leaves.
    """
    bound = selector.budget
    if selector.speed is None:
        return _marginal(bound.cost, selector.dense_widths)
    # About where the mask will be: what a layer costs beside its products, it costs there too, of less.
    widths = np.maximum(selector.dense_widths * math.sqrt(min(1.0, bound.limit / bound.dense)), 1.0)
    price, ms = _marginal(bound.cost, widths), _marginal(selector.speed, widths)
    average = selector.speed(widths) / bound.cost(widths)  # a price without a unit: neither tiny nor huge
    return np.divide(ms, average * price, out=np.zeros_like(ms), where=price > 0) ** 2


def _marginal(cost: Cost, widths: Array) -> Array:
    return np.array([cost(widths) - cost(narrower) for narrower in widths - np.eye(len(widths))])


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
        if selector.fits(_widths(selector, taken)):
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
        if not selector.fits(widths):
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
    budget = selector.budget
    asked = is_ratio(budget.kind) and budget.requested < 1 and budget.limit < budget.dense * (1 + 1e-11)
    if stays.all() and asked:
        raise SurgeryError(f"nothing was removed, though budget.{budget.kind} is {budget.requested:g}")
    limits = {bound.kind: (bound.requested, bound.reached(widths)) for bound in selector.bounds[1:]}
    return Selection(mask, budget.kind, budget.requested, budget.reached(widths), limits)
