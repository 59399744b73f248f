"""Law 1 on random networks of pieces that surgery gets wrong easily, and an analysis that ends."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from hard_networks import Piece, check_law, groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Head, conv_norm, randomised, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

SECONDS = 2.0  # of processor time: a network of six small pieces takes a tenth of that
Made = tuple[nn.Module, int]  # a piece and the width that it gives


def function(code: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    return Piece(code, **layers)


def conv(width: int, out: int, **options: int) -> nn.Module:
    return nn.Conv2d(width, out, 3, padding=1, **options)


def parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2, 1)


def in_place(piece: Piece, x: Tensor) -> Tensor:
    y = piece.a(x)
    y[:, 1:] *= 2
    return y


# width, a second width -> the piece and what it gives. All widths are multiples of 4.
PIECES: dict[str, Callable[[int, int], Made]] = {
    "conv": lambda w, v: (nn.Sequential(*conv_norm(w, v), nn.SiLU()), v),
    "grouped": lambda w, v: (conv(w, v, groups=2), v),
    "grouped in four": lambda w, v: (conv(w, v, groups=4), v),
    "depthwise": lambda w, v: (conv(w, w, groups=w), w),
    "depthwise, two for each": lambda w, v: (conv(w, 2 * w, groups=w), 2 * w),
    "transposed": lambda w, v: (nn.ConvTranspose2d(w, v, 3, padding=1, groups=2), v),
    "shuffle": lambda w, v: (function(lambda m, x: shuffled(x, 2)), w),
    "shuffle in four": lambda w, v: (nn.ChannelShuffle(4), w),
    "fixed shuffle": lambda w, v: (
        function(lambda m, x: x.view(len(x), 2, w // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)), w
    ),
    "split and cat": lambda w, v: (
        function(lambda m, x: torch.cat([parts(x)[0], m.a(parts(x)[1])], 1), a=conv(w // 2, w // 2)), w
    ),
    "split and swap": lambda w, v: (function(lambda m, x: torch.cat(parts(x)[::-1], 1)), w),
    "halves by length": lambda w, v: (
        function(lambda m, x: m.a(x.tensor_split(2, 1)[0]) + m.b(x.tensor_split(2, 1)[1]), a=conv(w // 2, v), b=conv(w // 2, v)),
        v,
    ),
    "a fixed part": lambda w, v: (function(lambda m, x: x[:, :4] + m.a(x), a=conv(w, 4)), 4),
    "pad shortcut": lambda w, v: (
        function(lambda m, x: m.a(x) + F.pad(x, (0, 0, 0, 0, 2, 2)), a=conv(w, w + 4)), w + 4
    ),
    "dense": lambda w, v: (function(lambda m, x: torch.cat([x, F.silu(m.a(x))], 1), a=conv(w, v)), w + v),
    "residual": lambda w, v: (
        function(lambda m, x: x + m.b(F.silu(m.a(x))), a=conv(w, v), b=nn.Sequential(*conv_norm(v, w))), w
    ),
    "gate": lambda w, v: (
        function(lambda m, x: x * torch.sigmoid(m.b(F.silu(m.a(x.mean((2, 3), keepdim=True))))),
                 a=nn.Conv2d(w, v, 1), b=nn.Conv2d(v, w, 1)),
        w,
    ),
    "batch norm": lambda w, v: (nn.BatchNorm2d(w), w),
    "instance norm": lambda w, v: (nn.InstanceNorm2d(w, affine=True), w),
    "group norm": lambda w, v: (nn.GroupNorm(2, w), w),
    "last axis": lambda w, v: (
        function(lambda m, x: m.b(F.gelu(m.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2),
                 a=nn.Linear(w, v), b=nn.Linear(v, w)),
        w,
    ),
    "layer norm": lambda w, v: (function(lambda m, x: m.n(x.movedim(1, -1)).movedim(-1, 1), n=nn.LayerNorm(w)), w),
    "pool": lambda w, v: (function(lambda m, x: F.avg_pool2d(x, 3, 1, 1)), w),
    "flip": lambda w, v: (function(lambda m, x: x.flip(1)), w),
    "roll": lambda w, v: (function(lambda m, x: x.roll(1, 1)), w),
    "roll of the map": lambda w, v: (function(lambda m, x: x.roll(1, 2)), w),
    "glu": lambda w, v: (function(lambda m, x: F.glu(m.a(x), 1), a=conv(w, 2 * v)), v),
    "pixels": lambda w, v: (function(lambda m, x: F.avg_pool2d(F.pixel_shuffle(m.a(x), 2), 2), a=conv(w, 4 * v)), v),
    "softmax": lambda w, v: (function(lambda m, x: x.softmax(1) + x), w),
    "in place": lambda w, v: (function(in_place, a=conv(w, v)), v),
}  # fmt: skip


@st.composite
def composed(draw: st.DrawFn) -> nn.Module:
    names = draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=3, max_size=6))
    width, layers = 8, [*conv_norm(3, 8), nn.SiLU()]
    for name in names:
        layer, width = PIECES[name](width, draw(st.sampled_from([4, 8, 12])))
        layers.append(layer)
    network = nn.Sequential(*layers, *conv_norm(width, 6), nn.SiLU(), Head(6))
    network.pieces = names  # what a failing example is made of
    return randomised(network, seed=draw(st.integers(0, 2**16)))


@settings(max_examples=60)
@given(composed())
def test_random_pieces_are_pruned_right_or_refused_with_a_reason_in_time(network):
    began = time.process_time()
    groups = groups_of(network)
    assert time.process_time() - began < SECONDS, network.pieces
    assert all(group.reason for group in groups.groups if group.status == "excluded")
    assert groups.prunable, network.pieces  # the last convolution at least
    check_law(network, groups.prunable)
