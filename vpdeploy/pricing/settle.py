"""Masks that meet what only measuring can tell: the limit of a sum is moved until what is measured is as requested."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vpdeploy.errors import BudgetError
from vpdeploy.measure.settings import setting_of
from vpdeploy.pricing.candidates import MIB, Candidates
from vpdeploy.pricing.network import Network
from vpdeploy.pricing.reach import what_stops
from vpdeploy.pricing.target import Target, opened, shape_of_image
from vpdeploy.scoring.select import MEASURED, Bound, Selector, is_ratio, select, shown, unreachable
from vpdeploy.surgery.cost import Array, quantity_of
from vpdeploy.values import ChannelGroups, Price, Selection
from vpdeploy.workbench import Workbench

AIM = 0.985  # of a budget in time: what is measured once more should still be within
MEMORY_RUNS = 8  # of which the largest counts: processes of one file differ by whole buffers
TRIES, MEMORY_TRIES = 8, 32
GLANCED = 0.15  # by which a glance at one network may be off
NEAR = 0.03  # and no further below is looked for
SURE = 0.001  # of a budget in memory, below it: processes that take the same buffers differ by 0.05 %


def settle(
    selector: Selector, scores: Mapping[str, Array], work: Workbench, groups: ChannelGroups, *, arm: str
) -> Selection:
    """The mask of ``scores`` that meets the budget as measured, and what was measured of it; without a measured budget the mask
    that the formula gives. Where a file has a budget, and its graph cannot be cut, it is exported to see.

    scores: root -> [g].

    Raises: BudgetError when none does.
    """
    measured, file = work.recipe.budget.measured, next((b for b in selector.bounds if b.kind == "file_mib"), None)
    if not selector.roots or not (measured or file):
        return select(selector, scores)
    with opened(work, groups, arm=arm) as candidates:
        candidates.check(selector.least_widths)
        target = Target(candidates, setting_of(work.recipe.target), shape_of_image(work.recipe))

        def within(selector: Selector) -> Selection:
            return Settling(target, selector, scores, work.display.say).done() if measured else select(selector, scores)

        if file is None or candidates.graph is not None:
            return within(selector)
        return fitting(selector, file, within, candidates)


def fitting(
    selector: Selector, file: Bound, within: Callable[[Selector], Selection], candidates: Candidates
) -> Selection:
    """What ``within`` selects, with less where its file is larger than the formula says: that of a graph that cannot be cut comes
    near, and no more.

    Raises: BudgetError when no mask fits.
    """
    larger = file.dense - candidates.whole.stat().st_size / MIB  # by which the largest form is
    while True:
        selection = within(selector)
        widths = _widths_of(selection)
        found = candidates.file(widths).stat().st_size / MIB + larger
        if found <= file.requested:
            break
        if (widths == selector.least_widths).all():
            raise BudgetError(
                f"budget: the smallest file has {shown(found)} MiB, more than file_mib = {file.requested:g}: ask for that or more"
            )
        selector = selector.limited("file_mib", file.cost(widths) * min(file.requested / found, 1 - 1e-9))
    if selection.budget == "file_mib":
        return replace(selection, reached=found)
    return replace(selection, limits={**selection.limits, "file_mib": (file.requested, found)})


def limits_in_practice(selector: Selector, target: Target, priced: Price, network: Network) -> dict[str, float]:
    """What the sums may be so that masks meet the budget as measured, from masks of random scores: a search then learns under a
    limit that is near the one that it will have to meet.

    Raises: BudgetError when the narrowest network, as measured, still costs too much.
    """
    for bound in selector.bounds:
        if bound.kind in MEASURED and (least := _least(bound, selector, target, priced)) > bound.limit:
            made_of = what_stops(bound.kind, selector.least_widths, priced, network)
            raise unreachable(bound, selector, least, made_of=made_of, measured_on=priced.target)
    generator = np.random.default_rng(0)
    scores = {
        root: generator.random(int(width)) for root, width in zip(selector.roots, selector.dense_widths, strict=True)
    }
    settling = Settling(target, selector, scores, lambda line: None)
    with suppress(BudgetError):  # the narrowest network meets it, as was seen above: what is lacking is a quiet machine
        settling.done(tries=TRIES)
    return settling.limits or {kind: bracket.limit for kind, bracket in settling.brackets.items()}


def _least(bound: Bound, selector: Selector, target: Target, priced: Price) -> float:
    """Of the narrowest network, as its mask would be measured; a glance is enough where it is far from the limit."""
    least = priced.least[quantity_of(bound.kind)]
    if bound.kind == "memory_mib":
        return (target.memory(selector.least_widths, runs=MEMORY_RUNS) or least) / (1 - SURE)
    if abs(least - bound.limit) > GLANCED * bound.limit:
        return least
    ms, dense_ms = target.against_dense(selector.least_widths)
    return ms / dense_ms * bound.dense if is_ratio(bound.kind) else ms


@dataclass
class Bracket:
    """Where the limit of one measured quantity has to be: above ``met``, below ``missed``. ``exact``: to the last mask;
    otherwise it is enough to come near. Above ``largest`` nothing is removed: what is measured of the dense network may be more
    than the sum at its widths.
    """

    requested: float
    limit: float
    exact: bool
    largest: float = math.inf
    met: float | None = None
    missed: float | None = None

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.largest)

    @property
    def most(self) -> float:
        """What may be measured."""
        return self.requested * (1 - SURE) if self.exact else self.requested

    def is_near(self, found: float) -> bool:
        return (1 - NEAR) * self.requested <= found <= self.requested

    def move(self, found: float) -> None:
        """The next limit: in proportion, and between what was met and what was not."""
        if found > self.most:
            self.missed = min(self.limit, self.missed or self.limit)
        else:
            self.met = max(self.limit, self.met or 0.0)
        if self.met is not None and self.missed is not None and self.met >= self.missed:  # noise: the newer one counts
            self.met, self.missed = (None, self.limit) if found > self.most else (self.limit, None)
        wanted = self.limit * self.most / found * (1.0 if self.exact else AIM)
        if self.met is None or self.missed is None:
            self.limit = wanted * (1.0 if not self.exact else 1.01 if self.missed is None else 0.99)
        else:
            gap, share = self.missed - self.met, 0.5 if self.exact else 0.2
            self.limit = min(max(wanted, self.met + share * gap), self.missed - share * gap)
        self.limit = min(self.limit, self.largest)


class Settling:
    """The search for the limits under which the mask of some scores meets its budget as measured."""

    def __init__(self, target: Target, selector: Selector, scores: Mapping[str, Array], say: Callable[[str], None]):
        self.target, self.selector, self.scores, self.say = target, selector, scores, say
        self.brackets = {
            bound.kind: Bracket(
                bound.requested,
                bound.limit,
                bound.kind == "memory_mib",
                (1 - 1e-9) * bound.cost(selector.dense_widths),
            )
            for bound in selector.bounds
            if bound.kind in MEASURED
        }
        self.exact = all(bracket.exact for bracket in self.brackets.values())
        self.peaks: dict[tuple[float, ...], float] = {}  # measured once: a mask that met a budget has met it
        self.limits: dict[str, float] = {}  # of the largest mask that met everything

    def done(self, *, tries: int | None = None) -> Selection:
        """The largest mask found that meets everything. Under a budget in memory alone, what is below it by ``SURE`` while the
        next larger one was measured not to.

        Raises: BudgetError when none did.
        """
        best: tuple[Selection, dict[str, float]] | None = None
        least = dict.fromkeys(self.brackets, math.inf)
        measured = 0
        while measured < (tries or (MEMORY_TRIES if self.exact else TRIES)):
            measured += 1
            selection = self._selection()
            found = self._measure(_widths_of(selection))
            self.say(
                f"measured: {', '.join(f'{k} {v:.4g} of {self.brackets[k].requested:g}' for k, v in found.items())}"
            )
            least = {kind: min(figure, found[kind]) for kind, figure in least.items()}
            over = [kind for kind, bracket in self.brackets.items() if found[kind] > bracket.most]
            if not over and (best is None or self._size(selection) >= self._size(best[0])):
                best, self.limits = (selection, found), {kind: b.limit for kind, b in self.brackets.items()}
            near = not self.exact and any(bracket.is_near(found[kind]) for kind, bracket in self.brackets.items())
            if not over and (near or self._is_free(selection)):
                break
            if self.exact and over and (_widths_of(selection) == self.selector.least_widths).all():
                break  # no mask is smaller, and its figure was measured
            for kind in over or self.brackets:
                self.brackets[kind].move(found[kind])
            if self.exact and self._is_adjacent():
                break
        if best is None:
            told = ", ".join(f"{kind} {bracket.requested:g}" for kind, bracket in self.brackets.items())
            seen = ", ".join(f"{least[kind]:.6g} of {bracket.most:.6g}" for kind, bracket in self.brackets.items())
            raise BudgetError(
                f"budget: no mask met {told} in {measured} measurements (the least: {seen}), though those before training said "
                "so; ask for a little more, or stop what else runs on this machine"
            )
        selection, found = best
        limits = {kind: (asked, found.get(kind, reached)) for kind, (asked, reached) in selection.limits.items()}
        return replace(selection, reached=found.get(selection.budget, selection.reached), limits=limits)

    def _size(self, selection: Selection) -> float:
        """As the first of the limits that are sought counts it."""
        bound = next(bound for bound in self.selector.bounds if bound.kind in self.brackets)
        return bound.cost(_widths_of(selection))

    def _is_adjacent(self) -> bool:
        """Whether the mask that exceeded a budget in memory is the next above the one that met it."""
        bracket = self.brackets["memory_mib"]
        if bracket.met is None or bracket.missed is None:
            return False
        above = next_above(self.selector.limited("memory_mib", bracket.met), self.scores, "memory_mib")
        exceeded = select(self.selector.limited("memory_mib", bracket.missed), self.scores)
        return above is None or above.selection.mask == exceeded.mask

    def _selection(self) -> Selection:
        selector = self.selector
        for kind, bracket in self.brackets.items():
            selector = selector.limited(kind, bracket.limit)
        return select(selector, self.scores)

    def _is_free(self, selection: Selection) -> bool:
        """Whether the mask would be the same without any measured limit."""
        selector = self.selector
        for kind in self.brackets:
            selector = selector.limited(kind, math.inf)
        return select(selector, self.scores).mask == selection.mask

    def _measure(self, widths: Array) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.brackets.keys() - {"memory_mib"}:
            ms, dense = self.target.against_dense(widths)
            found = {"latency_ms": ms, "latency_ratio": ms / dense}
        if "memory_mib" in self.brackets:
            if (key := tuple(widths)) not in self.peaks:
                peak = self.target.memory(widths, runs=MEMORY_RUNS, most=self.brackets["memory_mib"].most)
                assert peak is not None, "there was /proc when it was priced"
                self.peaks[key] = peak
            found["memory_mib"] = self.peaks[key]
        return {kind: found[kind] for kind in self.brackets}


class Above(NamedTuple):
    selection: Selection
    limit: float  # the least under which it is selected


def next_above(selector: Selector, scores: Mapping[str, Array], kind: str) -> Above | None:
    """The next larger mask of ``scores`` when the limit on ``kind`` rises and nothing else; None when there is none."""
    bound = next(bound for bound in selector.bounds if bound.kind == kind)

    def at(limit: float) -> tuple[Selection, float]:
        selection = select(selector.limited(kind, limit), scores)
        return selection, bound.cost(_widths_of(selection))

    here, dense = at(bound.limit)[1], bound.cost(selector.dense_widths)
    least = 1e-9 * dense  # below what one entry of a weight adds, above what rounding does
    low, high = here, here + 1e-6 * dense
    while at(high)[1] <= here + least:
        if high > dense:
            return None
        low, high = high, high + 2 * (high - low)
    while high - low > least:
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[1] > here + least else (middle, high)
    return Above(at(high)[0], high)


def _widths_of(selection: Selection) -> Array:
    return np.array([*selection.mask.widths().values()], float)
