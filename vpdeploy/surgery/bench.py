"""Where groups are probed: a float64 copy with redrawn weights, at the smallest input that it takes, on which none is dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.models.copies import on_cpu
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.groups import offsets
from vpdeploy.surgery.limit import Limit, LimitError
from vpdeploy.surgery.trace import modules_followed, twin_of
from vpdeploy.values import ChannelGroup

DRAWS = 4  # of random weights, at most, until no group is dead
MORE = 4  # times the side, after as many
ALIVE = 1e-9  # and each group alone by this: one of EfficientNet-B0's forty honestly changes them by 2e-7 only
LARGE = 128  # pixels; from there on one image is probed
HEAVY = 10**8  # parameters; beyond, memory is short before time
PARAMETRIZED = ".parametrizations."
SIDES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224)


@dataclass(frozen=True)
class Bench:
    """What probes share: a redrawn float64 network, a small input, its output, a large input. ``trains``: that the forward in
    training mode runs is seen, too.
    """

    redrawn: nn.Module
    x: Tensor
    full: Tensor
    large: Tensor | None = None
    limit: Limit = field(default_factory=Limit)
    trains: bool = False


def liveliest(
    backbone: nn.Module, candidates: Sequence[ChannelGroup], *, shape: tuple[int, ...], limit: Limit, least: int = 0
) -> tuple[Bench, list[ChannelGroup]]:
    """The draw of weights under which the fewest ``candidates`` are dead, and these, the dead ones excluded. At the smallest
    square from ``least`` pixels on that runs, or at one MORE times as large, or at ``shape`` [c, h, w].

    With three channels behind a ReLU one draw in ten is dead from there on, and nothing could be probed; and where one pixel
    is left, a norm over pixels, or attention that leaves a token to itself out, gives zeros whatever the weights.
    """
    dead: dict[tuple[int, int], int] = {}
    side = least
    for seed in range(DRAWS + 1):
        if seed == DRAWS:
            if side * MORE > min(shape[1:]):
                break
            least = side * MORE
        bench = _bench(backbone, shape, seed=seed, limit=limit, least=least)
        judged, side = _exclude_dead(bench, candidates), bench.x.shape[-1]
        dead[least, seed] = sum(group.status == "excluded" for group in judged)
        if dead[least, seed] == 0:
            return bench, judged
        del bench  # a large network is in memory once in float64, not twice
    least, seed = min(dead, key=lambda draw: dead[draw])
    bench = _bench(backbone, shape, seed=seed, limit=limit, least=least)
    return bench, _exclude_dead(bench, candidates)


def _exclude_dead(bench: Bench, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
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


def _slopes(bench: Bench, groups: Sequence[ChannelGroup]) -> Tensor:
    """How fast a mixture of the logits changes along each gate, relative: [channels]; 0 where that cannot be told."""
    entries = sum(parameter.numel() for parameter in bench.redrawn.parameters())
    # A large input takes half the time in float32, where what is dead has no slope either, but another copy.
    dtype = torch.float32 if bench.x.shape[-1] >= LARGE and entries <= HEAVY else torch.float64
    gates = torch.ones(sum(group.width for group in groups), dtype=dtype, requires_grad=True)
    mixture = torch.randn(bench.full.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    try:
        with torch.enable_grad():
            # The same tensors where they serve, not yet another copy.
            gated = Gated(twin_of(bench.redrawn, *([on_cpu(dtype)] if dtype != torch.float64 else [])), groups)
            (slopes,) = torch.autograd.grad((gated(bench.x.to(dtype), gates) * mixture).sum(), [gates])
    except Exception:  # a group that cannot be gated, no gradient, tensors changed in place: forwards decide
        return torch.zeros_like(gates)
    return slopes.abs().nan_to_num(0.0, posinf=0.0) / bench.full.abs().max()


def _bench(backbone: nn.Module, shape: tuple[int, ...], *, seed: int, limit: Limit, least: int) -> Bench:
    """At the smallest square from ``least`` pixels on that gives numbers, or at ``shape`` [c, h, w]."""
    redrawn = redraw(twin_of(backbone, on_cpu(torch.float64)), seed=seed)
    channels, *sides = shape
    failure: Exception | None = None
    for size in [*((s, s) for s in SIDES if least <= s < min(sides)), sides]:
        x = noise(2 if max(size) < LARGE else 1, (channels, *size))
        try:
            with torch.no_grad(), modules_followed(redrawn, limit):
                full = redrawn(x)
        except LimitError:
            raise
        except Exception as e:  # too small for this network: try the next size
            failure = e
            continue
        if size is not sides and isinstance(full, Tensor) and not bool(full.isfinite().all()):
            continue  # the deviation of one pixel is not a number
        return Bench(redrawn.requires_grad_(False), x, full, limit=limit)
    raise SurgeryError(
        f"network {type(backbone).__name__}: its forward fails in float64 at every size up to "
        f"{' x '.join(map(str, sides))}: {failure}"
    ) from failure


def noise(batch: int, shape: Sequence[int]) -> Tensor:
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def redraw(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every parameter and norm statistic of ``network`` a random value, in place, and return it; parametrizations as they
    are.

    A buffer without negative values keeps none: under any name but running_mean it may be a variance, whose root is taken.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.named_parameters():
        if PARAMETRIZED in name:
            continue  # what computes a weight of it may take few values: an orthogonal one would become zero
        if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        scale = fan_in**-0.5 * (2**0.5 if tensor.ndim > 1 else 0.5)
        # In place, since one layer may hold most of a network; of variance scale**2, and drawn faster than normal ones.
        tensor.data.uniform_(-scale * 3**0.5, scale * 3**0.5, generator=generator)
        if tensor.ndim <= 1:
            tensor.data += 0.5  # scales stay away from 0, shifts from symmetry
    for name, tensor in network.named_buffers():
        if tensor.is_floating_point() and PARAMETRIZED not in name:
            drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            unsigned = bool((tensor >= 0).all() and (tensor > 0).any()) and not name.endswith("running_mean")
            positive = unsigned or name.endswith("running_var")
            tensor.data = drawn + 0.5 if positive else drawn - 0.5
    return network


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|; infinite when shapes differ or anything is not finite."""
    if a.shape != b.shape or not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return float("inf")
    return float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
