"""Is removal exact? Every group is probed before it may be pruned; no list of layer types decides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.bench import ALIVE, Bench, liveliest, noise, relative_difference
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.halves import HALVES, one_left
from vpdeploy.surgery.limit import Limit, LimitError
from vpdeploy.surgery.norms import norms_without_statistics
from vpdeploy.surgery.paths import first_change
from vpdeploy.surgery.plan import plan
from vpdeploy.surgery.rules.views import BY_NUMBER
from vpdeploy.surgery.runnable import runnable
from vpdeploy.surgery.trace import Trace, drawing, in_module, look, modules_followed, told, twin_of
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask

EXACT = 1e-10  # relative, float64: agreement is 1e-16 to 1e-13, the smallest true disagreement seen 3e-8
CONTROL = 1e-3  # gating all groups must change the logits by this much, relative, or the probe saw nothing
CHOSEN = "proved of what the forward does with random images"
APPROXIMATE = "removal is approximate: budget.allow_approximate = true takes it, and tells the difference"


def probe(
    backbone: nn.Module,
    groups: ChannelGroups,
    *,
    example: Tensor,
    allow_approximate: bool = False,
    limit: Limit | None = None,
) -> ChannelGroups:
    """Decide for every group whether removal equals masking. example: [n, c, h, w], of which the shape counts; ``backbone``
    is unchanged.

    On a float64 copy in eval mode with every parameter and statistic redrawn (a last BatchNorm scale of 0 would pass
    anything), at the smallest input that the network takes: half of every group is gated, the same half removed; the
    logits must agree to EXACT, and gating must change them by CONTROL. All groups in one pair of forwards for each of
    HALVES, for the last of them also at the example's size where the network takes another path there; bisected on
    disagreement. A group that alone disagrees is excluded with the difference; ``difference`` of the others is that of all
    together.

    Each group gated alone must change the logits too, or it is excluded as not probed: the others would hide it. By
    ALIVE only: behind a squeeze or deep in a residual stream one group of many honestly changes them by less than CONTROL.

    Groups over which a norm takes statistics are approximate. With ``allow_approximate`` they are taken if removal is exact
    but for the statistics, with the ``difference`` that these make; otherwise they are excluded.

    Raises: SurgeryError when no input up to the example's size runs; LimitError past ``limit``.
    """
    candidates = [group for group in groups.groups if group.status == "exact"]
    normalised = [group for group in groups.groups if group.status == "approximate"]
    shape = tuple(example.shape[1:])
    bench, judged, seen = _bench_and_trace(backbone, [*candidates, *normalised], shape=shape, limit=limit or Limit())
    alive = {group.root: group for group in judged}
    if seen.path != groups.path:  # one image: forwards in float64 are slow at this size
        bench = replace(bench, large=noise(1, shape))
    held = len(groups.groups) - len(candidates)  # the classifier is; beside others the rest may honestly change little
    control = CONTROL if held <= 1 else ALIVE
    verdicts = _agreed(bench, [alive[group.root] for group in candidates], control=control)
    if allow_approximate:
        taken = [group for group in verdicts.values() if group.status == "exact"]
        verdicts |= _approximate(bench, [alive[group.root] for group in normalised], beside=taken)
    else:
        verdicts |= {g.root: replace(g, status="excluded", reason=f"{g.reason}; {APPROXIMATE}") for g in normalised}
    for group in candidates:  # what its reason said until now: whose code is the likely cause
        if group.reason and verdicts[group.root].status == "excluded":
            verdicts[group.root] = replace(
                verdicts[group.root], reason=f"{verdicts[group.root].reason}; likely cause: {group.reason}"
            )
    for root, group in verdicts.items():
        if seen.choices and group.status == "exact":
            verdicts[root] = replace(
                group, reason=f"{CHOSEN}: {seen.choices[0] or 'its forward'} reads a value of the image"
            )
    return replace(groups, groups=tuple(verdicts.get(group.root, group) for group in groups.groups))


def _agreed(bench: Bench, candidates: Sequence[ChannelGroup], *, control: float) -> dict[str, ChannelGroup]:
    """The verdict on each of ``candidates``: alone where they disagree, and on all that is left together.

    ``control``: how much gating all of them must change.
    """
    small = replace(bench, large=None)
    masks = [half(candidates) for half in HALVES]  # of all: a group meets the same fate alone and beside others
    probes = [*((small, mask) for mask in masks[:-1]), (replace(bench, trains=True), masks[-1])]
    verdicts = {group.root: group for group in candidates}
    doubted = False  # whether what agreed all together has lost some since

    def standing(roots: Iterable[str]) -> list[ChannelGroup]:
        return [verdicts[root] for root in roots if verdicts[root].status != "excluded"]

    def decide(place: Bench, roots: Sequence[str], mask: ChannelMask, of_all: float) -> None:
        nonlocal doubted
        if not (groups := standing(roots)):
            return
        together = _verdict(place, groups, mask, control=_control(groups, candidates, of_all))
        if together.status == "exact":
            verdicts.update((group.root, _under(together, group)) for group in groups)
            return
        doubted = True
        verdicts.update((group.root, group) for group in runnable(place.redrawn, groups, mask, place.x, place.limit))
        verdicts.update((group.root, group) for group in _bisected(place, standing(roots), mask))

    roots = list(verdicts)
    for place, mask in probes:
        decide(place, roots, mask, control)
    for some in _apart([group.root for group in candidates if BY_NUMBER in group.reason]):
        decide(small, some, one_left(candidates), ALIVE)
    while doubted and (accepted := standing(roots)):
        doubted = False
        for place, mask in probes:
            for group in _not_beside_others(place, accepted, mask, _control(accepted, candidates, control)):
                verdicts[group.root], doubted = group, True
    return verdicts


def _not_beside_others(
    bench: Bench, groups: Sequence[ChannelGroup], mask: ChannelMask, control: float
) -> list[ChannelGroup]:
    """Those of ``groups``, each exact alone, that are not beside the ones before them, excluded with the reason."""
    apart: list[ChannelGroup] = []

    def grown(taken: list[ChannelGroup], more: Sequence[ChannelGroup], control: float) -> list[ChannelGroup]:
        """``taken``, which agree, and those of ``more`` that agree with them."""
        both = [*taken, *more]
        verdict = _verdict(bench, both, mask, control=control)
        if verdict.status == "exact":
            return both
        if len(more) == 1 or (verdict.difference is not None and verdict.difference <= EXACT):  # they change too little
            reason = f"together with others {verdict.reason}"
            apart.extend(replace(group, status="excluded", reason=reason) for group in more)
            return taken
        middle = len(more) // 2
        return grown(grown(taken, more[:middle], ALIVE), more[middle:], ALIVE)

    grown([], groups, control)
    return apart


def _apart(roots: Sequence[str]) -> Iterator[list[str]]:
    """Sets of ``roots``: of any two of them each is in one without the other."""
    for bit in range(max(1, (len(roots) - 1).bit_length())):
        for value in (0, 1):
            yield [root for number, root in enumerate(roots) if number >> bit & 1 == value]


def _approximate(
    bench: Bench, candidates: Sequence[ChannelGroup], *, beside: Sequence[ChannelGroup]
) -> dict[str, ChannelGroup]:
    """Groups whose removal is exact once norms take no statistics, each alone and all with ``beside``."""
    verdicts = {group.root: group for group in candidates}
    with norms_without_statistics():
        calm = replace(bench, full=_forward(bench.redrawn, bench.x), large=None)
        standing = [replace(group, status="exact") for group in candidates if group.status != "excluded"]
        exact = list(_agreed(calm, standing, control=ALIVE).values())
        taken = [g for g in exact if g.status == "exact"]
        both = [*beside, *taken]
        if taken and beside and _verdict(calm, both, HALVES[0](both), control=ALIVE).status != "exact":
            exact = [replace(g, status="excluded", reason="not exact together with the other groups") for g in exact]
    for group in exact:
        if group.status == "exact":
            whole = _verdict(bench, [replace(group, difference=None)], HALVES[0]([group]), control=ALIVE)
            why = verdicts[group.root].reason
            if whole.difference is None:  # the norm itself does not take the new width
                group = replace(whole, reason=f"{why}; {whole.reason}")
            else:
                group = replace(group, status="approximate", reason=why, difference=whole.difference)
        verdicts[group.root] = group
    return verdicts


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


def _bench_and_trace(
    backbone: nn.Module, candidates: Sequence[ChannelGroup], *, shape: tuple[int, ...], limit: Limit
) -> tuple[Bench, list[ChannelGroup], Trace]:
    """``liveliest``, and what the forward does at its size: the same as at ``shape``, or something else."""
    least = 0
    while True:
        bench, judged = liveliest(backbone, candidates, shape=shape, limit=limit, least=least)
        side = bench.x.shape[-1]
        try:
            return bench, judged, look(backbone, bench.x.float())
        except SurgeryError:  # one token runs by broadcasting alone
            if bench.x.shape[1:] == shape:
                raise
            least = side + 1


def _control(groups: Sequence[ChannelGroup], candidates: Sequence[ChannelGroup], of_all: float) -> float:
    """How much gating ``groups`` must change: what is left of the candidates may change little."""
    return of_all if len(groups) == len(candidates) else ALIVE


def _bisected(bench: Bench, groups: Sequence[ChannelGroup], mask: ChannelMask) -> Iterator[ChannelGroup]:
    """``groups``, which do not agree all together, each under the verdict on the largest part of them that it was found in."""
    middle = len(groups) // 2
    for part in filter(None, (groups[:middle], groups[middle:])):
        verdict = _verdict(bench, part, mask, control=ALIVE)
        if verdict.status == "exact" or len(part) == 1:
            yield from (_under(verdict, group) for group in part)
        else:
            yield from _bisected(bench, part, mask)


def _under(verdict: ChannelGroup, group: ChannelGroup) -> ChannelGroup:
    return replace(group, status=verdict.status, reason=verdict.reason, difference=verdict.difference)


def _verdict(bench: Bench, groups: Sequence[ChannelGroup], mask: ChannelMask, *, control: float) -> ChannelGroup:
    """One verdict for all ``groups`` together, on the first of them. ``control``: how much gating them must change."""
    narrow = next((group for group in groups if group.width < 2), None)
    if narrow is not None:
        return replace(groups[0], status="excluded", reason="it is one channel wide")
    row = mask_row(groups, mask, dtype=torch.float64)
    inside: list[str] = []
    try:
        gated = Gated(twin_of(bench.redrawn), groups)
        small = cut(bench.redrawn, plan(bench.redrawn, groups, mask))
        with torch.no_grad(), modules_followed(small, bench.limit) as inside:
            masked = gated(bench.x, row)
            difference, where = relative_difference(masked, small(bench.x)), ""
            if difference <= EXACT and bench.large is not None:
                difference = max(difference, relative_difference(gated(bench.large, row), small(bench.large)))
                where = f" at {bench.large.shape[-1]} pixels"
    except LimitError:
        raise
    except Exception as e:  # torch-pruning, or a forward that does not take the new widths
        return replace(
            groups[0], status="excluded", reason=f"removing its channels fails{in_module(inside)}: {told(e)}"
        )
    if difference == float("inf"):  # no difference to tell, and none that JSON could hold
        reason = "not probed: the logits with random weights are not finite, or change their shape"
        return replace(groups[0], status="excluded", reason=reason)
    if not difference <= EXACT:
        again = relative_difference(bench.full, _forward(bench.redrawn, bench.x))
        if again > EXACT:
            reason = f"not probed: two forwards of the network on the same input differ by {again:.2g}, in eval mode"
            return replace(groups[0], status="excluded", reason=reason)
        reason = f"masked and removed differ by {difference:.2g} of the largest logit{where}"
        if (change := first_change(bench.redrawn, small, bench.x if bench.large is None else bench.large)) is not None:
            reason += f": the forward depends on widths; {change}"
        return replace(groups[0], status="excluded", reason=reason, difference=difference)
    change = relative_difference(bench.full, masked)
    if not change >= control:
        reason = f"not probed: masking it changes the logits by only {change:.2g}"
        return replace(groups[0], status="excluded", reason=reason, difference=difference)
    if bench.trains and (failure := _fails_in_training(small, bench)) is not None:
        return replace(groups[0], status="excluded", reason=f"removing its channels fails in training mode{failure}")
    return replace(groups[0], status="exact", reason="", difference=difference)


def _fails_in_training(small: nn.Module, bench: Bench) -> str | None:
    """Where and how the forward of ``small`` in training mode fails, if that of the whole network does not: it could not be
    tuned.
    """
    failure = _training_failure(small, bench)
    return None if failure is None or _training_failure(twin_of(bench.redrawn), bench) is not None else failure


def _training_failure(network: nn.Module, bench: Bench) -> str | None:
    x = bench.x if len(bench.x) > 1 else bench.x.repeat(2, 1, 1, 1)  # norms need two images
    inside: list[str] = []
    try:
        with torch.no_grad(), drawing(0), modules_followed(network, bench.limit) as inside:
            network.train()(x)
    except LimitError:
        raise
    except Exception as e:
        return f"{in_module(inside)}: {told(e)}"
    return None
