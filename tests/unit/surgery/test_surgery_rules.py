"""Every rule of the table against the operation itself: change one channel of what goes in, and look what changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tolerances import SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from vpdeploy.surgery import trace as tracing
from vpdeploy.surgery.labels import Components, Ints, Labelled, along
from vpdeploy.surgery.rules.call import Call
from vpdeploy.surgery.rules.table import RULES, follow
from vpdeploy.surgery.trace import _Watch, plain_attention

aten = torch.ops.aten
Given = tuple[tuple[int, ...], tuple[int, ...]]  # a shape, and the axes that hold channels
MAP: Given = ((2, 6, 4, 4), (1,))


@dataclass(frozen=True)
class Case:
    """``function`` of tensors as ``given``; ``free``: how many channels can go afterwards, of all that went in."""

    function: Callable[..., object]
    free: int
    given: tuple[Given, ...] = (MAP,)


@dataclass(frozen=True)
class Watched:
    """What one operation did: the labels of what went in, [size] by axis, and what is known of what came out."""

    outputs: list[Tensor]
    known: list[Labelled]
    labels: list[dict[int, Ints]]
    components: Components
    names: list[str]

    def free(self) -> set[int]:
        """Components that can go. Of an axis of length 1 nothing can."""
        rows = [row for axes in self.labels for row in axes.values() if len(row) > 1]
        mine = {int(component) for row in rows for component in self.components.of[row]}
        return mine - self.components.rigid.keys() - self.components.normalised.keys()


def made(given: Sequence[Given], *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, _ in given]


def run(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(case.function(*tensors)) if isinstance(leaf, Tensor)]


def watched(case: Case, monkeypatch: pytest.MonkeyPatch) -> Watched:
    names: list[str] = []

    def recording(call: Call) -> list[tuple[Tensor, Labelled]]:
        names.append(call.name.removesuffix("_"))
        return follow(call)

    monkeypatch.setattr(tracing, "follow", recording)
    watch = _Watch(nn.Module(), [])
    tensors, labels = made(case.given), []
    for tensor, (shape, axes) in zip(tensors, case.given, strict=True):
        labels.append({axis: watch.book.fresh(shape[axis]) for axis in axes})
        watch.learn(tensor, Labelled(shape, tuple(along(labels[-1][axis], axis, len(shape)) for axis in axes)))
    with plain_attention(), watch:
        outputs = run(case, tensors)
    for output in outputs:
        watch.book.pay(watch.known(output).debts)
    return Watched(outputs, [watch.known(tensor) for tensor in outputs], labels, watch.book.components(), names)


def where(known: Labelled, component: int, components: Components) -> Tensor:
    """The positions of a tensor that carry ``component``."""
    found = np.zeros(known.shape, bool)
    for field in known.fields:
        found |= np.broadcast_to(components.of[field.labels] == component, known.shape)
    return torch.from_numpy(found)


def changed(a: Tensor, b: Tensor) -> Tensor:
    return (a != b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a != b


M: Given = ((2, 3, 6), (2,))  # tokens
LINE: Given = ((2, 6, 8), (1,))
VECTOR: Given = ((6,), (0,))
BOTH: Given = ((2, 6, 4, 4), (1, 2))


def norm_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, mean and variance that were labelled with nothing."""
    return x.new_ones(6), x.new_zeros(6), x.new_zeros(6), x.new_ones(6)


REDUCTIONS = (
    "mean",
    "sum",
    "amax",
    "amin",
    "var_mean",
    "var",
    "std",
    "argmax",
    "prod",
    "logsumexp",
    "any",
    "all",
    "max",
    "min",
)
NORMED = (MAP, *[VECTOR] * 4)


def reductions(name: str) -> list[Case]:
    function = getattr(torch, name)
    return [
        Case(lambda x: function(x, 2), 6),
        Case(lambda x: function(x, -1, keepdim=True), 6),
        Case(lambda x: function(x, 1), 0),
    ]


def batch_norm(function: Callable[..., object], *, training: bool) -> Callable[..., object]:
    """``training``: the operation takes a flag for it."""
    flag = (False,) if training else ()
    return lambda x, w, b, m, v: function(x, w, b, m, v.abs(), *flag, 0.1, 1e-5)[0]  # type: ignore[index]


CASES: dict[str, list[Case]] = {
    # one by one
    "hardswish": [Case(F.hardswish, 6)],
    "hardtanh": [Case(F.relu6, 6)],
    "log_sigmoid_forward": [Case(F.logsigmoid, 6)],
    "rrelu_with_noise": [Case(lambda x: F.rrelu(x, training=False), 6)],
    "_prelu_kernel": [Case(F.prelu, 6, (MAP, VECTOR)), Case(lambda x: F.prelu(x, x.new_ones(1)), 6)],
    "copy": [Case(lambda x, y: x.clone().copy_(y), 6, (MAP, MAP)), Case(lambda x: x.new_zeros(x.shape).copy_(x), 0)],
    "fill": [Case(lambda x: x.clone().fill_(2.0), 6)],
    "zero": [Case(lambda x: x.clone().zero_(), 6)],
    "_to_copy": [Case(lambda x: x.to(torch.float32), 6)],
    "detach": [Case(lambda x: x.detach(), 6)],
    "alias": [Case(aten.alias, 6)],
    "lift_fresh": [Case(aten.lift_fresh, 6)],
    "native_dropout": [Case(lambda x: aten.native_dropout(x, 0.5, True), 6)],
    "bernoulli": [Case(lambda x: torch.bernoulli(x.sigmoid()), 6)],
    **{f"{kind}_like": [Case(getattr(torch, f"{kind}_like"), 6)] for kind in ("zeros", "ones", "rand", "randn")},
    "full_like": [Case(lambda x: torch.full_like(x, 2.0), 6)],
    "empty_like": [Case(lambda x: torch.empty_like(x).zero_(), 6)],
    "new_zeros": [Case(lambda x: x.new_zeros(6, 4), 6)],
    "new_ones": [Case(lambda x: x.new_ones(6, 4), 6)],
    "new_full": [Case(lambda x: x.new_full((6, 4), 2.0), 6)],
    "new_empty": [Case(lambda x: x.new_empty(6, 4).zero_(), 6)],
    "new_empty_strided": [Case(lambda x: x.new_empty_strided((6, 4), (4, 1)).zero_(), 6)],
    "as_strided": [
        Case(lambda x: x.as_strided(x.shape, x.stride()), 6),
        Case(lambda x: x.as_strided((2, 6, 1, 1), (6, 1, 6, 6)), 6, (((2, 6, 1, 1), (1,)),)),
        Case(lambda x: x.as_strided((2, 4, 4), (96, 4, 1)), 0),
        Case(lambda x: x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, x.stride()), 0),
        Case(lambda x: x[2:].as_strided((2, 6, 4, 4), x.stride(), 0), 0, (((4, 6, 4, 4), (1,)),)),
    ],
    "add": [
        Case(torch.add, 6, (MAP, MAP)),
        Case(torch.add, 6, (MAP, ((6, 1, 1), (0,)))),
        Case(torch.add, 10, (((2, 6, 1), (1,)), ((2, 1, 4), (2,)))),
        Case(torch.add, 0, (MAP, ((2, 6, 4, 4), ()))),
        Case(torch.add, 6, (MAP, ((2, 1, 4, 4), (2,)))),
        Case(lambda x: x + 1, 6),
    ],
    "where": [Case(lambda x, y: torch.where(x > 0, x, y), 6, (MAP, MAP))],
    # other shapes
    "view": [
        Case(lambda x: x.view(2, 3, 2, 4, 4), 6),
        Case(lambda x: x.view(2, 6, 16), 6),
        Case(lambda x: x.view(2, 24, 4), 6),
        Case(lambda x: x.view(2, 96), 6),
        Case(lambda x: x.view(12, 16), 6),
        Case(lambda x: x.view(2, 2, 3, 16).transpose(1, 2).reshape(2, 6, 16), 3),
        Case(lambda x: x.view(2, 2, 3, 16).permute(0, 2, 3, 1), 6),
    ],
    "_unsafe_view": [Case(lambda x: aten._unsafe_view(x, (2, 96)), 6)],
    "_reshape_alias": [Case(lambda x: aten._reshape_alias(x, (2, 96), (96, 1)), 6)],
    "unsqueeze": [Case(lambda x: x.unsqueeze(1), 6)],
    "squeeze": [
        Case(torch.squeeze, 6, (((2, 6, 1, 4), (1,)),)),
        Case(lambda x: x.squeeze(2), 6, (((2, 6, 1, 4), (1,)),)),
    ],
    "permute": [Case(lambda x: x.permute(0, 2, 3, 1), 6), Case(lambda x: x.permute(1, 0, -2, 3).flatten(), 6)],
    "transpose": [Case(lambda x: x.transpose(-1, 1), 6)],
    "t": [Case(torch.t, 9, (((6, 3), (0, 1)),))],
    "expand": [Case(lambda x: x.expand(5, 2, 6, 4), 6, (((2, 6, 1), (1,)),))],
    "slice": [
        Case(lambda x: x[:, :, 1:3], 6),
        Case(lambda x: x[:, :, ::2], 6),
        Case(lambda x: x[:, 2:5], 6),
        Case(lambda x: x[:, ::2], 6),
        Case(lambda x: x[:, -2:] + x[:, :2], 4),
        Case(lambda x: x[:, 1:] - x[:, :-1], 1),
    ],
    "select": [Case(lambda x: x[:, :, 1], 6), Case(lambda x: x[:, 1], 0), Case(lambda x: x.view(2, 2, 3, 16)[:, 1], 6)],
    "unbind": [Case(lambda x: x.unbind(2), 6), Case(lambda x: x.view(2, 2, 3, 16).unbind(1), 6)],
    "split": [
        Case(lambda x: x.split(3, 1), 3),
        Case(lambda x: x.chunk(2, 1), 3),
        Case(lambda x: x.split(4, 1), 6),
        Case(lambda x: x.split(2, 2), 6),
    ],
    "split_with_sizes": [Case(lambda x: x.split([2, 4], 1), 6), Case(lambda x: x.split([3, 3], 1), 3)],
    "unsafe_split": [Case(lambda x: torch.unsafe_split(x, 3, 1), 3)],
    # put together
    "cat": [
        Case(lambda x, y: torch.cat([x, y], 1), 12, (MAP, MAP)),
        Case(lambda x, y: torch.cat([x, y], 2), 6, (MAP, MAP)),
        Case(lambda x, y: torch.cat([x, y], 1), 6, (MAP, ((2, 3, 4, 4), ()))),
        Case(lambda x, y: torch.cat([x, y], 2), 0, (MAP, ((2, 6, 3, 4), ()))),
        Case(lambda x: torch.cat([x.new_zeros(0), x, x], 1), 6),
    ],
    "stack": [
        Case(lambda x, y: torch.stack([x, y], 1), 6, (MAP, MAP)),
        Case(lambda x, y: torch.stack([x, y], -1), 6, (MAP, MAP)),
    ],
    "constant_pad_nd": [
        Case(lambda x: F.pad(x, (1, 2, 1, 0)), 6),
        Case(lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)), 6),
        Case(lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), 0),
        Case(lambda x, y: F.pad(x, (0, 0, 0, 0, 1, 1)) + y, 6, (MAP, ((2, 8, 4, 4), (1,)))),
    ],
    "repeat": [Case(lambda x: x.repeat(1, 2, 1, 1), 6), Case(lambda x: x.repeat(3, 1, 1, 2, 1), 6)],
    "index": [
        Case(lambda x: x[:, :, torch.tensor([2, 0])], 6),
        Case(lambda x: x[:, torch.tensor([2, 0])], 0),
        Case(lambda x: x[:, :, torch.tensor([[2, 0], [1, 1]])], 6),
        Case(lambda x: x[:, :, torch.ones(4, dtype=torch.bool)], 0),
    ],
    "index_select": [
        Case(lambda x: x.index_select(2, torch.tensor([3, 1])), 6),
        Case(lambda x: x.index_select(1, torch.tensor([3, 1])), 0),
    ],
    "embedding": [
        Case(lambda x: F.embedding(torch.tensor([[2, 0, 1]]), x), 6, (((4, 6), (1,)),)),
        Case(lambda x: F.embedding(torch.tensor([[2, 0, 1]]), x), 6, (((4, 6), (0, 1)),)),
    ],
    # moved and mixed
    "roll": [Case(lambda x: x.roll((1, 2), (2, 3)), 6), Case(lambda x: x.roll(1, 1), 0), Case(lambda x: x.roll(1), 0)],
    "flip": [Case(lambda x: x.flip(2, 3), 6), Case(lambda x: x.flip(1), 0)],
    "_softmax": [Case(lambda x: x.softmax(2), 6), Case(lambda x: x.softmax(1), 0)],
    "_log_softmax": [Case(lambda x: x.log_softmax(-1), 6), Case(lambda x: x.log_softmax(-3), 0)],
    "_safe_softmax": [Case(lambda x: aten._safe_softmax(x, -1), 6), Case(lambda x: aten._safe_softmax(x, 1), 0)],
    "cumsum": [Case(lambda x: x.cumsum(2), 6), Case(lambda x: x.cumsum(1), 0)],
    "sort": [Case(lambda x: x.sort(2), 6), Case(lambda x: x.sort(1), 0)],
    "topk": [Case(lambda x: x.topk(2), 6), Case(lambda x: x.topk(2, 1), 0)],
    **{name: reductions(name) for name in REDUCTIONS},
    "linalg_vector_norm": [Case(lambda x: x.norm(dim=(2, 3)), 6), Case(lambda x: F.normalize(x, dim=1), 0)],
    # positions
    "max_pool2d_with_indices": [Case(lambda x: F.max_pool2d(x, 2), 6), Case(lambda x: F.max_pool2d(x, 2), 6, (BOTH,))],
    "avg_pool2d": [Case(lambda x: F.avg_pool2d(x, 2), 6)],
    "_adaptive_avg_pool2d": [Case(lambda x: F.adaptive_avg_pool2d(x, 3), 6)],
    "adaptive_max_pool2d": [Case(lambda x: F.adaptive_max_pool2d(x, 2), 6)],
    "fractional_max_pool2d": [Case(lambda x: F.fractional_max_pool2d(x, 2, 2), 6)],
    "upsample_nearest2d": [Case(lambda x: F.interpolate(x, scale_factor=2), 6)],
    "upsample_bilinear2d": [Case(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 6)],
    "upsample_bicubic2d": [Case(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), 6)],
    "_upsample_bilinear2d_aa": [Case(lambda x: F.interpolate(x, size=3, mode="bilinear", antialias=True), 6)],
    "_upsample_bicubic2d_aa": [Case(lambda x: F.interpolate(x, size=3, mode="bicubic", antialias=True), 6)],
    "reflection_pad2d": [Case(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 6)],
    "replication_pad2d": [Case(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 6)],
    "reflection_pad1d": [Case(lambda x: F.pad(x, (1, 1), mode="reflect"), 6, (LINE,))],
    "max_pool1d": [Case(lambda x: aten.max_pool1d(x, 2), 6, (LINE,))],
    "avg_pool1d": [Case(lambda x: aten.avg_pool1d(x, [2]), 6, (LINE,))],
    "adaptive_avg_pool1d": [Case(lambda x: aten.adaptive_avg_pool1d(x, [2]), 6, (LINE,))],
    "pixel_shuffle": [
        Case(lambda x: F.pixel_shuffle(x, 2), 3, (((2, 12, 4, 4), (1,)),)),
        Case(lambda x: F.pixel_shuffle(x, 2), 3, (((2, 12, 4, 4), (1, 2)),)),
    ],
    "pixel_unshuffle": [Case(lambda x: F.pixel_unshuffle(x, 2), 6)],
    "glu": [Case(lambda x: F.glu(x, 1), 3), Case(lambda x: F.glu(x), 6)],
    "im2col": [Case(lambda x: F.unfold(x, 2), 6), Case(lambda x: F.unfold(x, 2, stride=2), 6, (BOTH,))],
    "channel_shuffle": [Case(lambda x: aten.channel_shuffle(x, 2), 3), Case(lambda x: aten.channel_shuffle(x, 3), 2)],
    "native_channel_shuffle": [Case(lambda x: aten.native_channel_shuffle(x, 2), 3)],
    "_weight_norm_interface": [
        Case(lambda v, g: aten._weight_norm_interface(v, g, 0), 6, (((6, 4, 1, 1), (0, 1)), ((6, 1, 1, 1), (0,))))
    ],
    # norms
    "native_batch_norm": [
        Case(batch_norm(aten.native_batch_norm, training=True), 6, NORMED),
        Case(lambda x: aten.native_batch_norm(x, *norm_of(x), False, 0.1, 1e-5)[0], 0),
        Case(lambda x: aten.native_batch_norm(x, None, None, *norm_of(x)[2:], False, 0.1, 1e-5)[0], 0),
    ],
    "_native_batch_norm_legit": [Case(batch_norm(aten._native_batch_norm_legit, training=True), 6, NORMED)],
    "_native_batch_norm_legit_no_training": [
        Case(batch_norm(aten._native_batch_norm_legit_no_training, training=False), 6, NORMED)
    ],
    "_batch_norm_no_update": [Case(batch_norm(aten._batch_norm_no_update, training=False), 6, NORMED)],
    "native_layer_norm": [
        Case(lambda x, w, b: F.layer_norm(x, (6,), w, b), 0, (M, VECTOR, VECTOR)),
        Case(lambda x: F.layer_norm(x, (4,)), 6),  # over the width of a map
        Case(lambda x, w: F.layer_norm(x.view(2, 3, 2, 3), (3,), w), 2, (M, ((3,), (0,)))),  # of each head
    ],
    "_fused_rms_norm": [Case(lambda x, w: F.rms_norm(x, (6,), w), 0, (M, VECTOR))],
    "native_group_norm": [
        Case(lambda x, w, b: F.group_norm(x, 2, w, b), 0, (MAP, VECTOR, VECTOR)),
        Case(lambda x, w, b: F.group_norm(x, 6, w, b), 6, (MAP, VECTOR, VECTOR)),  # each channel by itself
        Case(lambda x: F.group_norm(x, 6, *norm_of(x)[:2]), 0),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_a_channel_that_changes_changes_only_what_carries_its_label(name, monkeypatch):
    for number, case in enumerate(CASES[name]):
        seen = watched(case, monkeypatch)
        free = seen.free()
        assert len(free) == case.free, number
        before = run(case, made(case.given))
        other = made(case.given, seed=1)
        for component in free:
            tensors = made(case.given)
            for tensor, fresh, axes in zip(tensors, other, seen.labels, strict=True):
                for axis, row in axes.items():
                    mine = torch.from_numpy(np.flatnonzero(seen.components.of[row] == component))
                    tensor.index_copy_(axis, mine, fresh.index_select(axis, mine))
            for known, a, b in zip(seen.known, before, run(case, tensors), strict=True):
                assert known.shape == a.shape
                strange = changed(a, b) & ~where(known, component, seen.components)
                assert not bool(strange.any()), (number, component, strange.nonzero()[:3])


# Torch makes them of other operations before the watch sees them, on this device at least.
NOT_REACHED = {
    "flatten", "reshape", "adaptive_avg_pool2d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "_batch_norm_with_update",
    "_fused_rms_norm",
}  # fmt: skip


def test_every_rule_of_the_table_is_tried(monkeypatch):
    tried = {name for name, cases in CASES.items() for case in cases for name in watched(case, monkeypatch).names}
    tried |= {name for case in PRODUCTS for name in watched(case.case, monkeypatch).names}
    assert RULES.keys() - tried == NOT_REACHED
    assert not NOT_REACHED & tried


# --- products: what writes and what reads ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductCase:
    """A sum over channels: without some of them it is what it was with these at zero. ``reads``: which of the tensors are
    set to zero there, as a gate does.
    """

    case: Case
    reads: tuple[int, ...] = (0,)


def by_shapes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution whose number of groups follows from the shapes."""
    return F.conv2d(x, weight, bias, groups=x.shape[1] // weight.shape[1])


def product(function: Callable[..., object], free: int, *given: Given, reads: tuple[int, ...] = (0,)) -> ProductCase:
    return ProductCase(Case(function, free, given), reads)


def conv(outputs: int, inputs: int, kernel: int = 2) -> Given:
    return ((outputs, inputs, kernel, kernel), (0, 1))


PRODUCTS = [
    product(by_shapes, 6 + 5, MAP, conv(5, 6), ((5,), (0,))),
    product(by_shapes, 3 + 2, MAP, conv(4, 3), ((4,), (0,))),  # 2 groups: positions of inputs, and of outputs
    product(by_shapes, 2 + 2 + 1, ((2, 4, 4, 4), (1,)), conv(6, 2), ((6,), (0,))),  # 2 groups of 2: 2, and 3 of outputs
    product(by_shapes, 6, MAP, conv(6, 1)),  # depthwise
    product(by_shapes, 6, MAP, conv(18, 1), ((18,), (0,))),  # each to three
    product(by_shapes, 3, MAP, conv(12, 2), ((12,), (0,))),  # 3 groups of 2, each to four
    product(lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), 6 + 5, MAP, conv(6, 5), ((5,), (0,))),
    product(lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2), 3 + 4, MAP, conv(6, 4), ((8,), (0,))),
    product(lambda x, w, b: F.conv_transpose2d(x, w, b, groups=len(w)), 6, MAP, conv(6, 2), ((12,), (0,))),
    product(lambda x, w: F.conv1d(x, w), 6 + 5, LINE, ((5, 6, 3), (0, 1))),
    product(F.linear, 6 + 5, ((3, 6), (1,)), ((5, 6), (0, 1)), ((5,), (0,))),
    product(F.linear, 6 + 5, ((3, 6), (1,)), ((5, 6), (0, 1))),
    product(F.linear, 6 + 5, M, ((5, 6), (0, 1)), ((5,), (0,))),
    product(torch.bmm, 6 + 5, M, ((2, 6, 5), (1, 2))),
    product(lambda b, x, y: torch.baddbmm(b, x, y), 6 + 5, ((2, 3, 5), (2,)), M, ((2, 6, 5), (1, 2)), reads=(1,)),
    product(lambda q, k: q @ k.transpose(-1, -2), 6, M, M),
    product(torch.mm, 6 + 3 + 5, ((3, 6), (0, 1)), ((6, 5), (0, 1))),
    # attention: [n, t, heads * 2] three times; the heads go, what is in one stays together
    product(
        lambda *qkv: F.scaled_dot_product_attention(
            *(x.unflatten(-1, (-1, 2)).transpose(1, 2) for x in qkv)
        ).transpose(1, 2).flatten(2),
        3, M, M, M, reads=(),
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PRODUCTS)))
def test_a_product_without_a_channel_is_what_it_was_with_that_at_zero(number, monkeypatch):
    case, reads = PRODUCTS[number].case, PRODUCTS[number].reads
    seen = watched(case, monkeypatch)
    free = seen.free()
    assert len(free) == case.free
    for component in free:
        zeroed, left = made(case.given), []
        for place, (tensor, axes) in enumerate(zip(zeroed, seen.labels, strict=True)):
            smaller = tensor.clone()
            for axis, row in axes.items():
                gone = seen.components.of[row] == component
                if place in reads:
                    tensor.index_fill_(axis, torch.from_numpy(np.flatnonzero(gone)), 0.0)
                smaller = smaller.index_select(axis, torch.from_numpy(np.flatnonzero(~gone)))
            left.append(smaller)
        (whole,), (small,) = run(case, zeroed), run(case, left)
        (known,) = seen.known
        for axis in range(whole.ndim):
            field = known.field(axis)
            if field is not None:
                gone = (seen.components.of[field.labels] == component).reshape(field.labels.shape)
                lost = np.flatnonzero(gone.any(axis=tuple(a for a in range(whole.ndim) if a != axis)))
                stays = torch.tensor([i for i in range(whole.shape[axis]) if i not in lost])
                whole = whole.index_select(axis, stays)
        assert small.shape == whole.shape
        assert float((small - whole).abs().max()) <= SAME_IN_FLOAT64 * float(whole.abs().max())
