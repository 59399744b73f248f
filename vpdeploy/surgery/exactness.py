"""Is removal exact? Every group is probed before it may be pruned; no list of layer types decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import offsets
from vpdeploy.surgery.limit import Limit, LimitError
from vpdeploy.surgery.norms import norms_without_statistics
from vpdeploy.surgery.plan import plan
from vpdeploy.surgery.rules.views import BY_NUMBER
from vpdeploy.surgery.trace import in_module, modules_followed, on_cpu, told, trace, twin_of
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask

EXACT = 1e-10  # relative, float64: agreement is 1e-16 to 1e-13, the smallest true disagreement seen 3e-8
CONTROL = 1e-3  # gating all groups must change the logits by this much, relative, or the probe saw nothing
DRAWS = 4  # of random weights, at most, until no group is dead
ALIVE = 1e-9  # and each group alone by this: one of EfficientNet-B0's forty honestly changes them by 2e-7 only
APPROXIMATE = "removal is approximate: budget.allow_approximate = true takes it, and tells the difference"
LARGE = 128  # pixels; from there on one image is probed
HEAVY = 10**8  # parameters; beyond, memory is short before time
Half = Callable[[Sequence[ChannelGroup]], ChannelMask]
SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224)


@dataclass(frozen=True)
class _Bench:
    """What probes share: a redrawn float64 network, a small input, its output, a large input."""

    redrawn: nn.Module
    x: Tensor
    full: Tensor
    large: Tensor | None = None
    limit: Limit = field(default_factory=Limit)


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
    bench, judged = _liveliest(backbone, [*candidates, *normalised], shape=shape, limit=limit or Limit())
    alive = {group.root: group for group in judged}
    if _path(backbone, bench.x) != groups.path:  # one image: forwards in float64 are slow at this size
        bench = replace(bench, large=_noise(1, shape))
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
    return replace(groups, groups=tuple(verdicts.get(group.root, group) for group in groups.groups))


def _agreed(bench: _Bench, candidates: Sequence[ChannelGroup], *, control: float) -> dict[str, ChannelGroup]:
    """The verdict on each of ``candidates``: alone where they disagree, and on all that is left together.

    ``control``: how much gating all of them must change.
    """
    small = replace(bench, large=None)
    probes = [*((small, half) for half in HALVES[:-1]), (bench, HALVES[-1])]
    verdicts = {group.root: group for group in candidates}
    doubted = False
    for place, half in probes:
        standing = [group for group in verdicts.values() if group.status != "excluded"]
        if standing:
            together = _verdict(place, standing, half, control=_control(standing, candidates, control))
            doubted |= together.status != "exact"
            verdicts |= {group.root: group for group in _judge(place, standing, half, together)}
    for roots in _apart([group.root for group in candidates if BY_NUMBER in group.reason]):
        standing = [verdicts[root] for root in roots if verdicts[root].status != "excluded"]
        if standing:
            together = _verdict(small, standing, _one_left, control=ALIVE)
            doubted |= together.status != "exact"
            verdicts |= {group.root: group for group in _judge(small, standing, _one_left, together)}
    accepted = [group for group in verdicts.values() if group.status != "excluded"]
    if doubted and accepted:
        for place, half in probes:
            together = _verdict(place, accepted, half, control=_control(accepted, candidates, control))
            if together.status != "exact":  # exact alone, not together: nothing can be promised
                reason = f"together with others {together.reason}"
                verdicts |= {g.root: replace(g, status="excluded", reason=reason) for g in accepted}
    return verdicts


def _apart(roots: Sequence[str]) -> Iterator[list[str]]:
    """Sets of ``roots``: of any two of them each is in one without the other."""
    for bit in range(max(1, (len(roots) - 1).bit_length())):
        for value in (0, 1):
            yield [root for number, root in enumerate(roots) if number >> bit & 1 == value]


def _approximate(
    bench: _Bench, candidates: Sequence[ChannelGroup], *, beside: Sequence[ChannelGroup]
) -> dict[str, ChannelGroup]:
    """Groups whose removal is exact once norms take no statistics, each alone and all with ``beside``."""
    verdicts = {group.root: group for group in candidates}
    with norms_without_statistics():
        calm = replace(bench, full=_forward(bench.redrawn, bench.x), large=None)
        standing = [replace(group, status="exact") for group in candidates if group.status != "excluded"]
        exact = list(_agreed(calm, standing, control=ALIVE).values())
        taken = [g for g in exact if g.status == "exact"]
        if taken and beside and _verdict(calm, [*beside, *taken], HALVES[0], control=ALIVE).status != "exact":
            exact = [replace(g, status="excluded", reason="not exact together with the other groups") for g in exact]
    for group in exact:
        if group.status == "exact":
            whole = _verdict(bench, [replace(group, difference=None)], HALVES[0], control=ALIVE)
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


def _path(backbone: nn.Module, x: Tensor) -> str:
    """What the forward does at the size of ``x``: the same as at the size that showed the groups, or something else."""
    return trace(twin_of(backbone, on_cpu(torch.float32)), x.float()).path


def _control(groups: Sequence[ChannelGroup], candidates: Sequence[ChannelGroup], of_all: float) -> float:
    """How much gating ``groups`` must change: what is left of the candidates may change little."""
    return of_all if len(groups) == len(candidates) else ALIVE


def _liveliest(
    backbone: nn.Module, candidates: Sequence[ChannelGroup], *, shape: tuple[int, ...], limit: Limit
) -> tuple[_Bench, list[ChannelGroup]]:
    """The draw of weights under which the fewest ``candidates`` are dead, and these, the dead ones excluded.

    With three channels behind a ReLU one draw in ten is dead from there on, and nothing could be probed.
    """
    dead: dict[int, int] = {}
    for seed in range(DRAWS):
        bench = _bench(backbone, shape, seed=seed, limit=limit)
        judged = _exclude_dead(bench, candidates)
        dead[seed] = sum(group.status == "excluded" for group in judged)
        if dead[seed] == 0:
            return bench, judged
        del bench  # a large network is in memory once in float64, not twice
    bench = _bench(backbone, shape, seed=min(dead, key=lambda seed: dead[seed]), limit=limit)
    return bench, _exclude_dead(bench, candidates)


def _exclude_dead(bench: _Bench, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """``groups``, those excluded whose gates alone change nothing.

    One backward pass gives the logits' slope along every gate. Only a group without any (it is dead, or no gradient
    passes there) costs a forward of its own, with the whole group gated.
    """
    judged = list(groups)
    slopes = _slopes(bench, groups)
    for number, group in enumerate(groups):
        if float(slopes[offsets(groups)[group.root]].max()) >= ALIVE:
            continue
        try:
            with torch.no_grad():
                gated = Gated(twin_of(bench.redrawn), [group])
                change = relative_difference(bench.full, gated(bench.x, bench.x.new_zeros(group.width)))
        except Exception:  # it cannot be gated, and the joint probe says why
            continue
        if change < ALIVE:
            reason = f"not probed: masking it alone changes the logits by only {change:.2g}"
            judged[number] = replace(group, status="excluded", reason=reason)
    return judged


def _slopes(bench: _Bench, groups: Sequence[ChannelGroup]) -> Tensor:
    """How fast a mixture of the logits changes along each gate, relative: [channels]; 0 where that cannot be told."""
    entries = sum(parameter.numel() for parameter in bench.redrawn.parameters())
    # A large input takes half the time in float32, where what is dead has no slope either, but another copy.
    dtype = torch.float32 if bench.x.shape[-1] >= LARGE and entries <= HEAVY else torch.float64
    gates = torch.ones(sum(group.width for group in groups), dtype=dtype, requires_grad=True)
    mixture = torch.randn(bench.full.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    try:
        with torch.enable_grad():
            gated = Gated(twin_of(bench.redrawn, on_cpu(dtype)), groups)
            (slopes,) = torch.autograd.grad((gated(bench.x.to(dtype), gates) * mixture).sum(), [gates])
    except Exception:  # a group that cannot be gated, no gradient, tensors changed in place: forwards decide
        return torch.zeros_like(gates)
    return slopes.abs().nan_to_num(0.0, posinf=0.0) / bench.full.abs().max()


def _judge(bench: _Bench, groups: Sequence[ChannelGroup], half: Half, verdict: ChannelGroup) -> list[ChannelGroup]:
    """``groups`` under ``verdict``, that of all of them together; bisected when they disagree."""
    if verdict.status == "exact" or len(groups) == 1:
        return [
            replace(group, status=verdict.status, reason=verdict.reason, difference=verdict.difference)
            for group in groups
        ]
    middle = len(groups) // 2
    parts = (groups[:middle], groups[middle:])
    return [g for part in parts for g in _judge(bench, part, half, _verdict(bench, part, half, control=ALIVE))]


def _verdict(bench: _Bench, groups: Sequence[ChannelGroup], half: Half, *, control: float) -> ChannelGroup:
    """One verdict for all ``groups`` together, on the first of them. ``control``: how much gating them must change."""
    narrow = next((group for group in groups if group.width < 2), None)
    if narrow is not None:
        return replace(groups[0], status="excluded", reason="it is one channel wide")
    mask = half(groups)
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
        return replace(groups[0], status="excluded", reason=reason, difference=difference)
    change = relative_difference(bench.full, masked)
    if not change >= control:
        reason = f"not probed: masking it changes the logits by only {change:.2g}"
        return replace(groups[0], status="excluded", reason=reason, difference=difference)
    return replace(groups[0], status="exact", reason="", difference=difference)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|; infinite when shapes differ or anything is not finite."""
    if a.shape != b.shape or not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))


def _random_part(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """A share of each group that is its own, in any places."""
    generator = torch.Generator().manual_seed(0)
    keep: dict[str, tuple[bool, ...]] = {}
    for number, group in enumerate(groups):
        order = torch.randperm(group.width, generator=generator).tolist()
        share = (0.5 + number * (5**0.5 - 1) / 2) % 1  # multiples of the golden ratio: neighbours lie far apart
        gone = set(order[: 1 + int(share * (group.width - 1))])
        keep[group.root] = tuple(channel not in gone for channel in range(group.width))
    return ChannelMask(keep)


def _last_part(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """Keep the last channels, fewer than half, in a number that shares no factor with the width; every second group the most
    that this can be, the others the least but one.
    """
    kept: dict[str, int] = {}
    for number, group in enumerate(groups):
        fitting = [k for k in range(1, max(1, (group.width - 1) // 2) + 1) if math.gcd(k, group.width) == 1]
        kept[group.root] = fitting[-1 if number % 2 == 0 else min(1, len(fitting) - 1)]
    return ChannelMask({g.root: tuple(c >= g.width - kept[g.root] for c in range(g.width)) for g in groups})


def _one_left(groups: Sequence[ChannelGroup]) -> ChannelMask:
    """What tells apart code that takes shares of an axis: its groups must not need to lose as many as each other."""
    return ChannelMask({g.root: tuple(c == g.width - 1 for c in range(g.width)) for g in groups})


# A random half of a few channels may be its own mirror image, or take as much from each part of a grouped convolution,
# and such a group would pass (8 channels and a flip did). No flip or roll leaves the last part as it is, and no grouping
# can share it out evenly: it fails there whatever the weights, even where the channel that would differ is dead behind a ReLU.
# Groups lose different shares: code that splits an axis in two works as long as both of its groups lose the same number.
# In narrow groups different shares are equal numbers: where a slice was taken, ``_one_left`` sees to it.
HALVES: tuple[Half, ...] = (_random_part, _last_part)


def _bench(backbone: nn.Module, shape: tuple[int, ...], *, seed: int, limit: Limit) -> _Bench:
    """At the smallest square that runs, or at ``shape`` [c, h, w]."""
    redrawn = redraw(twin_of(backbone, _anew), seed=seed)
    channels, *sides = shape
    failure: Exception | None = None
    for size in [*((s, s) for s in SIDES if s < min(sides)), sides]:
        x = _noise(2 if max(size) < LARGE else 1, (channels, *size))
        try:
            with torch.no_grad(), modules_followed(redrawn, limit):
                full = redrawn(x)
        except LimitError:
            raise
        except Exception as e:  # too small for this network: try the next size
            failure = e
            continue
        return _Bench(redrawn.requires_grad_(False), x, full, limit=limit)
    raise SurgeryError(
        f"network {type(backbone).__name__}: its forward fails in float64 at every size up to "
        f"{' x '.join(map(str, sides))}: {failure}"
    ) from failure


def _anew(tensor: Tensor) -> Tensor:
    """On the CPU, in float64 if it is floating, and never the tensor itself."""
    return tensor.to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _noise(batch: int, shape: Sequence[int]) -> Tensor:
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def redraw(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every parameter and norm statistic of ``network`` a random value, in place, and return it.

    A buffer without negative values keeps none: under any name but running_mean it may be a variance, whose root is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.parameters():
        fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        scale = fan_in**-0.5 * (2**0.5 if tensor.ndim > 1 else 0.5)
        tensor.data.normal_(generator=generator).mul_(scale)  # in place: one layer may hold most of a network
        if tensor.ndim <= 1:
            tensor.data += 0.5  # scales stay away from 0, shifts from symmetry
    for name, tensor in network.named_buffers():
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            unsigned = bool((tensor >= 0).all() and (tensor > 0).any()) and not name.endswith("running_mean")
            positive = unsigned or name.endswith("running_var")
            tensor.data = drawn + 0.5 if positive else drawn - 0.5
    return network
