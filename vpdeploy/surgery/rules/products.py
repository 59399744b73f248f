"""Convolutions and matrix products: where channels are written and read, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vpdeploy.surgery.labels import Ints, Labelled, along, merge, only, stay
from vpdeploy.surgery.rules.axes import bare, on_axis, sized
from vpdeploy.surgery.rules.call import Call, Product, Role, Rule


def _contracted(call: Call, a: Labelled, i: int, b: Labelled, j: int, why: str) -> tuple[Labelled, Labelled]:
    """Axis i of ``a`` is summed against axis j of ``b``: the same channels. Where either never changes, the other stays.

    Axes split from one (heads and what is in them) keep their outer part: within heads all goes together.
    """
    f, g = a.field(i), b.field(j)
    if f is None or g is None or (len(f.covered) > 1 and len(g.covered) > 1):
        return stay(call.book, a, [i], why), stay(call.book, b, [j], why)
    a, b = only(call.book, a, i), only(call.book, b, j)
    f, g = a.field(i), b.field(j)
    assert f is not None and g is not None
    call.book.join(f.labels.ravel(), g.labels.ravel())
    return a, b


def _reads(call: Call, x: Labelled, weight: Labelled, axis: int) -> str:
    """Why what ``weight`` reads along ``axis`` stays, if it does."""
    if x.constant:
        return f"{call.place} does not depend on the image"
    if weight.constant and weight.shape[axis] > 1 and weight.field(axis) is None:
        return f"{call.place} reads by a weight that is made of other tensors at every forward"
    return f"{call.place} reads values that stay, such as the network's input"


def _matrices(call: Call) -> Labelled:
    """[b, n, k] x [b, k, m] -> [b, n, m], b absent for mm and addmm."""
    bias, x, y = (None, *call.tensors) if len(call.tensors) == 2 else call.tensors
    a, b, ndim = call.at(x), call.at(y), len(call.shape)
    first = a.constant and not b.constant  # the weight stands there
    why = _reads(call, b, a, ndim - 1) if first else _reads(call, a, b, ndim - 2)
    held = a.constant and b.constant
    if held:
        a, b = stay(call.book, a, [ndim - 1], why), stay(call.book, b, [ndim - 2], why)
    else:
        a, b = _contracted(call, a, ndim - 1, b, ndim - 2, why)
        for weight, side in ((a, -1), (b, -2)):
            if weight.constant:  # the other depends on the image
                _note_roles(call, weight, reads=ndim + side, writes=(ndim - 1) if side == -2 else ndim - 2)
    lengths = [(a, 0), (b, 0)] if ndim == 3 else []
    _note_product(
        call, [(a, ndim - 2), (a, ndim - 1), (b, ndim - 1), *lengths[:1]], total=math.prod(call.shape) * x.shape[-1]
    )
    left = sized(bare(a, ndim - 1), ndim - 1, 1)
    right = sized(bare(b, ndim - 2), ndim - 2, 1)
    merged = merge(call.book, left, right, f"{call.place} combines its channels with values that stay")
    if bias is not None:
        merged = merge(call.book, merged, call.at(bias), f"{call.place} has channels that stay")
    return Labelled(call.shape, merged.fields)


def _note_roles(call: Call, weight: Labelled, *, reads: int, writes: int) -> None:
    for axis, side in ((reads, "in"), (writes, "out")):
        f = weight.field(axis)
        if f is not None:
            call.roles.append(Role(f.labels.ravel(), side, call.module))  # type: ignore[arg-type]


def _note_product(call: Call, axes: Sequence[tuple[Labelled, int]], *, total: float) -> None:
    """``total`` multiply-accumulates over ``axes``, each as a tensor and its axis."""
    labels = []
    for tensor, axis in axes:
        f = tensor.field(axis)
        if f is None:
            continue
        nesting = f.nesting
        if axis == min(f.covered, key=lambda i: nesting[i]):  # heads stand for what is in them
            labels.append(np.moveaxis(f.labels, axis, 0).reshape(f.labels.shape[axis], -1)[:, 0])
            total /= tensor.shape[axis]
    constant = all(known.constant for known in call.known.values())
    call.products.append(Product(tuple(labels), total, constant, call.module))


def _convolution(call: Call) -> Labelled:
    x, weight = call.at(call.arg("input")), call.at(call.arg("weight"))
    transposed, groups = call.arg("transposed"), call.arg("groups")
    spatial = len(weight.shape) - 2
    channel = len(x.shape) - spatial - 1
    x = stay(call.book, x, range(channel + 1, len(x.shape)), f"{call.place} mixes positions")
    reads, writes = (0, 1) if transposed else (1, 0)
    places = (x.shape if transposed else call.shape)[channel + 1 :]
    batch = math.prod(x.shape[:channel])
    total = math.prod(weight.shape) * math.prod(places) * batch
    whole = False
    if groups == 1:
        x, weight = _contracted(call, x, channel, weight, reads, _reads(call, x, weight, reads))
        written = weight.field(writes)
        out = None if written is None else only(call.book, weight, writes).field(writes)
        labels = None if out is None else out.labels.ravel()
    else:
        whole = groups > weight.shape[reads] // (groups if transposed else 1)
        labels, weight = (_whole_groups if whole else _positions)(call, x, channel, weight, groups, transposed)
        x = only(call.book, x, channel)
    if not whole:
        _note_roles(call, weight, reads=reads, writes=writes)
    counted = [(weight, 0)] if whole else [(weight, 0), (weight, 1)]
    _note_product(call, counted, total=total)
    others = sized(bare(x, channel), channel, 1)
    out_fields = () if labels is None or len(labels) < 2 else (along(labels, channel, len(call.shape)),)
    result = Labelled(call.shape, others.fields + out_fields)
    if call.arg("bias") is not None:
        bias = on_axis(call.at(call.arg("bias")), channel, len(call.shape))
        result = merge(call.book, result, bias, f"{call.place} has channels that stay")
    return result


def _channels(call: Call, x: Labelled, axis: int) -> Ints | None:
    f = only(call.book, x, axis).field(axis)
    return None if f is None else f.labels.ravel()


def _whole_groups(
    call: Call, x: Labelled, channel: int, weight: Labelled, groups: int, transposed: bool
) -> tuple[Ints | None, Labelled]:
    """Each group of the convolution is one channel: its inputs go with its outputs (depthwise convolutions; ResNeXt)."""
    rows = _channels(call, weight, 0)
    given = _channels(call, x, channel)
    if rows is None or given is None:
        why = f"{call.place} ties its channels to values that stay"
        stay(call.book, weight, [0], why)
        stay(call.book, x, [channel], why)
        return None, weight
    stay(call.book, weight, [1], f"{call.place} keeps its groups as they are inside")
    rows, given = rows.reshape(groups, -1), given.reshape(groups, -1)
    for labels in (rows, given):
        call.book.join(labels, labels[:, :1])
    call.book.join(rows[:, 0], given[:, 0])
    out = rows[:, :1].repeat(
        math.prod(call.arg("weight").shape[:2]) // weight.shape[0] if transposed else rows.shape[1], axis=1
    )
    return out.ravel(), replace(weight, fields=(along(rows.ravel(), 0, len(weight.shape)),))


def _positions(
    call: Call, x: Labelled, channel: int, weight: Labelled, groups: int, transposed: bool
) -> tuple[Ints | None, Labelled]:
    """Every group of the convolution loses the same positions, of its inputs and of its outputs."""
    why = f"{call.place} ties its channels to values that stay"
    given, reads, writes = _channels(call, x, channel), *((0, 1) if transposed else (1, 0))
    read, written = _channels(call, weight, reads), _channels(call, weight, writes)
    if given is None or read is None:
        stay(call.book, x, [channel], why)
        weight = stay(call.book, weight, [reads], why)
    else:
        parts = [labels.reshape(-1, len(given) // groups) for labels in (given, read)]
        for labels in parts:
            call.book.join(labels, labels[:1])
        call.book.join(parts[0][0], parts[1][0])
    if written is None:
        return None, weight
    parts = written.reshape(-1, written.size if transposed else written.size // groups)
    call.book.join(parts, parts[:1])
    return np.tile(written, groups) if transposed else written, weight


RULES: dict[str, Rule] = {
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm"], _matrices), "convolution": _convolution,
}  # fmt: skip
