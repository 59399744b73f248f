"""What an operation does to labels: one rule for each kind of ATen operation.

An operation without a rule holds every channel that it touches: it is then excluded by name, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vpdeploy.surgery.labels import (
    Field,
    Ints,
    LabelBook,
    Labelled,
    along,
    hold_all,
    merge,
    only,
    permuted,
    reshaped,
    stay,
)


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one operation: ``rest`` times the lengths of ``axes``, each told by its labels.

    ``constant``: made once for all images.
    """

    axes: tuple[Ints, ...]
    rest: float
    constant: bool


@dataclass(frozen=True)
class Role:
    """A product in ``module`` writes ("out") or reads ("in") along these labels of a weight."""

    labels: Ints
    side: Literal["out", "in"]
    module: str


@dataclass
class Call:
    """One operation: its arguments, what is known of each tensor among them, and what came out."""

    book: LabelBook
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    known: dict[int, Labelled] = field(default_factory=dict)
    output: Any = None
    products: list[Product] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.func._overloadpacket.__name__

    @property
    def place(self) -> str:
        return f"{self.name} in {self.module}" if self.module else self.name

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def arg(self, name: str) -> Any:
        """An argument by its name in the operation's schema, given or default; None where there is none of that name."""
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if place < len(self.args) and not argument.kwarg_only:
                    return self.args[place]
                return self.kwargs.get(name, argument.default_value)
        return None

    def at(self, tensor: Tensor) -> Labelled:
        return self.known[id(tensor)]

    @property
    def first(self) -> Labelled:
        return self.at(self.args[0] if isinstance(self.args[0], Tensor) else self.tensors[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output, the first where there are many."""
        return tuple(self.output.shape if isinstance(self.output, Tensor) else self.output[0].shape)


Rule = Callable[[Call], "Labelled | Sequence[Labelled]"]


def follow(call: Call) -> list[tuple[Tensor, Labelled]]:
    """What is known of the outputs of ``call``; joins, products and roles are noted along the way."""
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    constant = all(labelled.constant for labelled in call.known.values())
    labelled: Sequence[Labelled] = []
    if call.name in PRODUCTS or any(known.fields for known in call.known.values()):
        rule = RULES.get(call.name.removesuffix("_")) or (
            _pointwise if torch.Tag.pointwise in call.func.tags else _unknown
        )
        given = rule(call)
        labelled = [given] if isinstance(given, Labelled) else given
    found = []
    for number, tensor in enumerate(outputs):
        fields = labelled[number].fields if number < len(labelled) else ()
        found.append((tensor, Labelled(tuple(tensor.shape), fields, constant)))
    return found


def _unknown(call: Call) -> Labelled:
    for known in call.known.values():
        hold_all(call.book, known, f"its channels pass through {call.place}, for which there is no rule")
    return Labelled(call.shape)


def _made(call: Call) -> Labelled:
    """A new tensor, of whose argument only type and device are asked."""
    return Labelled(call.shape)


def _restrided(call: Call) -> Labelled:
    """Another memory layout of the same elements; anything else is not known."""
    dense = any(call.output.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))
    return call.first if dense and call.shape == call.first.shape else _unknown(call)


def _pointwise(call: Call) -> Labelled:
    why = f"{call.place} combines its channels with values that stay"
    merged = call.at(call.tensors[0])
    for tensor in call.tensors[1:]:
        merged = merge(call.book, merged, call.at(tensor), why)
    return merged if merged.shape == call.shape else _unknown(call)


# --- views ----------------------------------------------------------------------------------------------------------------


def _reshape(call: Call) -> Labelled:
    return reshaped(call.book, call.first, call.shape, f"{call.place} gives {_shape_text(call)}")


def _shape_text(call: Call) -> str:
    return "the shape " + " x ".join(map(str, call.shape))


def _permute(call: Call) -> Labelled:
    return permuted(call.first, call.arg("dims"))


def _transpose(call: Call) -> Labelled:
    order = list(range(len(call.first.shape)))
    a, b = (call.arg("dim0"), call.arg("dim1")) if call.name != "t" else (0, len(order) - 1)
    order[a], order[b] = order[b], order[a]
    return permuted(call.first, order)


def _expand(call: Call) -> Labelled:
    return merge(call.book, call.first, Labelled((1,) * len(call.shape)), "")


def _slice(call: Call) -> Labelled:
    x, axis = call.first, call.arg("dim")
    start, end, step = call.arg("start"), call.arg("end"), call.arg("step")
    return _taken(call, x, axis, np.arange(x.shape[axis])[slice(start, end, step)])


def _select(call: Call) -> Labelled:
    x, axis = call.first, call.arg("dim") % len(call.first.shape)
    return _dropped(call, x, axis, call.arg("index"))


def _unbind(call: Call) -> list[Labelled]:
    x, axis = call.first, call.arg("dim") % len(call.first.shape)
    return [_dropped(call, x, axis, place) for place in range(x.shape[axis])]


def _dropped(call: Call, x: Labelled, axis: int, place: int) -> Labelled:
    """One slice along ``axis``, which is gone afterwards. A single channel of an axis of channels has to stay."""
    f = x.field(axis)
    if f is not None and f.covered == (axis,):
        x = stay(call.book, x, [axis], f"{call.place} takes one of its channels by number")
    return _without_axes(_taken(call, x, axis, np.array([place])), [axis])


def _taken(call: Call, x: Labelled, axis: int, places: Ints) -> Labelled:
    """``x`` with only ``places`` along ``axis``."""
    axis %= len(x.shape)
    shape = (*x.shape[:axis], len(places), *x.shape[axis + 1 :])
    f = x.field(axis)
    if f is None or (len(places) == x.shape[axis] and bool((np.diff(places) == 1).all())):
        return Labelled(shape, x.fields, x.constant)
    if f.covered == (axis,):
        call.book.suspect(f.labels, f"{call.place} takes some of its channels by number")
    part = replace(f, labels=f.labels.take(places, axis=axis))
    return Labelled(shape, tuple(part if g is f else g for g in x.fields), x.constant)


def _without_axes(x: Labelled, axes: Sequence[int]) -> Labelled:
    """``x`` without ``axes``, which no field covers any more."""
    gone = {axis % len(x.shape) for axis in axes}
    left = [axis for axis in range(len(x.shape)) if axis not in gone]
    fields = tuple(
        Field(f.labels.squeeze(tuple(sorted(gone))) if gone else f.labels, tuple(f.nesting[i] for i in left))
        for f in x.fields
    )
    return Labelled(tuple(x.shape[i] for i in left), tuple(f for f in fields if f.covered), x.constant)


def _split(call: Call) -> list[Labelled]:
    """Parts of equal length are cut at shares of the length: each loses the same positions."""
    x, axis = call.first, call.arg("dim") % len(call.first.shape)
    sizes = [part.shape[axis] for part in call.output]
    f = x.field(axis)
    if f is not None and len(sizes) > 1:
        call.book.suspect(f.labels, f"{call.place} splits its channels into {', '.join(map(str, sizes))}")
        if len(set(sizes)) == 1:
            parts = np.split(f.labels, len(sizes), axis=axis)
            for part in parts[1:]:
                call.book.join(part, parts[0])
    starts = np.cumsum([0, *sizes])
    return [_taken(call, x, axis, np.arange(a, a + size)) for a, size in zip(starts, sizes, strict=False)]


# --- joining tensors --------------------------------------------------------------------------------------------------------


def _cat(call: Call) -> Labelled:
    tensors = call.arg("tensors")
    if call.name == "stack":
        axis = call.arg("dim") % len(call.shape)
        parts = [_with_axis(call, call.at(tensor), axis) for tensor in tensors]
    else:
        axis = call.arg("dim") % len(call.shape)
        parts = [call.at(tensor) for tensor in tensors if tensor.shape != (0,)]
    why = f"{call.place} joins its channels with values that stay"
    # All axes but the one of the concatenation agree; fields that cover it are collapsed to it alone.
    parts = [only(call.book, part, axis) for part in parts]
    rest = [_sized(stripped, axis, 1) for part in parts if (stripped := _bare(part, axis)) is not None]
    merged = rest[0]
    for other in rest[1:]:
        merged = merge(call.book, merged, other, why)
    fields = tuple(merged.fields)
    if any(part.field(axis) is not None for part in parts):
        labels = np.concatenate([_labels_or_held(call, part, axis, why) for part in parts])
        fields += (along(labels, axis, len(call.shape)),)
    return Labelled(call.shape, fields)


def _with_axis(call: Call, x: Labelled, axis: int) -> Labelled:
    return reshaped(call.book, x, (*x.shape[:axis], 1, *x.shape[axis:]), call.place)


def _bare(x: Labelled, axis: int) -> Labelled:
    """``x`` without the field over ``axis``."""
    return replace(x, fields=tuple(f for f in x.fields if axis not in f.covered))


def _sized(x: Labelled, axis: int, size: int) -> Labelled:
    return replace(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))


def _labels_or_held(call: Call, x: Labelled, axis: int, why: str) -> Ints:
    f = x.field(axis)
    if f is not None:
        return f.labels.ravel()
    labels = call.book.fresh(x.shape[axis])
    call.book.hold(labels, why)
    return labels


def _pad(call: Call) -> Labelled:
    x, pads = call.first, list(call.arg("pad"))
    fields = []
    for f in x.fields:
        labels = f.labels
        for back, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            axis = len(x.shape) - 1 - back
            if labels.shape[axis] == 1 or (before, after) == (0, 0):
                continue
            if f.covered != (axis,) or min(before, after) < 0:
                return _unknown(call)
            why = f"{call.place} pads its channels with zeros"
            ends = [call.book.fresh(count) for count in (before, after)]
            for end in ends:
                call.book.hold(end, why)
            call.book.suspect(labels, why)
            labels = along(np.concatenate([ends[0], labels.ravel(), ends[1]]), axis, len(x.shape)).labels
        fields.append(replace(f, labels=labels))
    return Labelled(call.shape, tuple(fields))


def _repeat(call: Call) -> Labelled:
    x = merge(call.book, call.first, Labelled((1,) * len(call.shape)), "")
    repeats = call.arg("repeats")
    fields = tuple(
        replace(
            f, labels=np.tile(f.labels, [n if size > 1 else 1 for n, size in zip(repeats, f.labels.shape, strict=True)])
        )
        for f in x.fields
    )
    return Labelled(call.shape, fields)


# --- by position ------------------------------------------------------------------------------------------------------------


def _index(call: Call) -> Labelled:
    """x[..., index, ...] with one tensor of positions."""
    x, indices = call.first, call.arg("indices")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    for index in indices:
        if index is not None:
            hold_all(call.book, call.at(index), f"its values are positions, in {call.place}")
    if len(axes) != 1 or indices[axes[0]].dtype in (torch.bool, torch.uint8):
        return _unknown(call)
    return _indexed(call, x, axes[0], len(indices[axes[0]].shape))


def _index_select(call: Call) -> Labelled:
    hold_all(call.book, call.at(call.arg("index")), f"its values are positions, in {call.place}")
    return _indexed(call, call.first, call.arg("dim") % len(call.first.shape), 1)


def _embedding(call: Call) -> Labelled:
    hold_all(call.book, call.at(call.arg("indices")), f"its values are positions, in {call.place}")
    return _indexed(call, call.first, 0, len(call.arg("indices").shape))


def _indexed(call: Call, x: Labelled, axis: int, ndim: int) -> Labelled:
    """``axis`` of ``x`` replaced by the ``ndim`` axes of what it was indexed with."""
    x = stay(call.book, x, [axis], f"{call.place} takes its channels by number")
    without = _without_axes(_sized(x, axis, 1), [axis])
    shape = (*x.shape[:axis], *(1,) * ndim, *x.shape[axis + 1 :])
    return Labelled(call.shape, reshaped(call.book, without, shape, call.place).fields)


def _ordered(call: Call) -> Labelled:
    """Moves positions along ``dims`` among themselves."""
    dims = call.arg("dims") or range(len(call.first.shape))
    return stay(call.book, call.first, dims, f"{call.place} moves its channels by number")


def _one_axis(call: Call) -> list[Labelled]:
    """Softmax, cumulative sums and sorts along ``dim``: every value there depends on all others."""
    x = stay(call.book, call.first, [call.arg("dim")], f"{call.place} runs over its channels")
    return [x, x]


def _reduce(call: Call) -> list[Labelled]:
    x, dims = call.first, call.arg("dim")
    dims = list(range(len(x.shape))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    x = stay(call.book, x, dims, f"{call.place} takes one number over its channels")
    for axis in dims:
        x = _sized(x, axis % len(x.shape), 1)
    x = x if call.arg("keepdim") else _without_axes(x, dims)
    return [x, x]


def _spatial(count: int) -> Rule:
    """Pooling and resizing mix the last ``count`` axes; the others pass."""

    def rule(call: Call) -> list[Labelled]:
        ndim = len(call.first.shape)
        x = stay(call.book, call.first, range(ndim - count, ndim), f"{call.place} mixes positions")
        return [x, x]

    return rule


# --- channels rearranged ------------------------------------------------------------------------------------------------------


def _pixel_shuffle(call: Call) -> Labelled:
    """[c * r * r, h, w] -> [c, h * r, w * r]: the r * r channels of each output go together."""
    r, axis = call.arg("upscale_factor"), len(call.first.shape) - 3
    x = only(call.book, stay(call.book, call.first, [-1, -2], f"{call.place} mixes positions"), axis)
    f = x.field(axis)
    if f is None:
        return Labelled(call.shape, x.fields)
    parts = f.labels.reshape(-1, r * r)
    call.book.join(parts, parts[:, :1])
    part = along(parts[:, 0], axis, len(x.shape))
    return Labelled(call.shape, tuple(part if g is f else g for g in x.fields))


def _pixel_unshuffle(call: Call) -> Labelled:
    """[c, h, w] -> [c * r * r, h / r, w / r]."""
    r, axis = call.arg("downscale_factor"), len(call.first.shape) - 3
    x = only(call.book, stay(call.book, call.first, [-1, -2], f"{call.place} mixes positions"), axis)
    fields = tuple(
        replace(f, labels=np.repeat(f.labels, r * r, axis=axis)) if axis in f.covered else f for f in x.fields
    )
    return Labelled(call.shape, fields)


def _channel_shuffle(call: Call) -> Labelled:
    x, groups = only(call.book, call.first, 1), call.arg("groups")
    f = x.field(1)
    if f is None:
        return x
    labels = f.labels.reshape(groups, -1)
    call.book.join(labels, labels[:1])
    call.book.suspect(labels, f"{call.place} shuffles its channels")
    part = along(labels.T.ravel(), 1, len(x.shape))
    return replace(x, fields=tuple(part if g is f else g for g in x.fields))


def _glu(call: Call) -> Labelled:
    """The first half times the sigmoid of the second."""
    x, axis = call.first, call.arg("dim") % len(call.first.shape)
    half, parts = x.shape[axis] // 2, []
    for start in (0, half):
        parts.append(_taken(call, x, axis, np.arange(start, start + half)))
    return merge(call.book, parts[0], parts[1], f"{call.place} combines its channels with values that stay")


def _unfold(call: Call) -> Labelled:
    """Patches: [n, c, h, w] -> [n, c * k, positions]."""
    x = only(call.book, stay(call.book, call.first, [-1, -2], f"{call.place} mixes positions"), 1)
    f = x.field(1)
    if f is None:
        return Labelled(call.shape)
    return Labelled(call.shape, (along(np.repeat(f.labels.ravel(), call.shape[1] // x.shape[1]), 1, 3),))


# --- norms ------------------------------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> list[Labelled]:
    x = call.first
    for tensor in call.tensors[1:]:
        x = merge(call.book, x, _on_axis(call.at(tensor), 1, len(x.shape)), f"{call.place} has channels that stay")
    return [x]


def _on_axis(vector: Labelled, axis: int, ndim: int) -> Labelled:
    """[c] -> [1, c, 1, 1], for an input of ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = vector.shape[0]
    fields = tuple(along(f.labels.ravel(), axis, ndim) for f in vector.fields)
    return Labelled(tuple(shape), fields, vector.constant)


def _layer_norm(call: Call) -> list[Labelled]:
    x, count = call.first, len(call.arg("normalized_shape"))
    last = set(range(len(x.shape) - count, len(x.shape)))
    for f in x.fields:
        if set(f.covered) <= last:
            call.book.normalise(f.labels, _normalised(call))
        else:  # heads, each normalised within itself
            x = stay(call.book, x, last & set(f.covered), call.place)
    for tensor in call.tensors[1:]:
        x = merge(call.book, x, call.at(tensor), f"{call.place} has channels that stay")
    return [x]


def _normalised(call: Call) -> str:
    return f"{call.module or call.name} takes statistics over its channels ({call.name.removeprefix('native_')})"


def _group_norm(call: Call) -> list[Labelled]:
    x, groups = call.first, call.arg("group")
    f = x.field(1)
    if f is not None and groups < x.shape[1]:
        x = only(call.book, x, 1)
        f = x.field(1)
        assert f is not None
        call.book.normalise(f.labels, _normalised(call))
        parts = f.labels.reshape(groups, -1)  # each group loses as many
        call.book.join(parts, parts[:1])
    for name in ("weight", "bias"):
        if (tensor := call.arg(name)) is not None:
            x = merge(call.book, x, _on_axis(call.at(tensor), 1, len(x.shape)), f"{call.place} has channels that stay")
    return [x]


# --- products ---------------------------------------------------------------------------------------------------------------


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


def _reads(call: Call, x: Labelled, weight: Labelled) -> str:
    if x.constant:
        return f"{call.place} does not depend on the image"
    return f"{call.place} reads values that stay, such as the network's input"


def _matrices(call: Call) -> Labelled:
    """[b, n, k] x [b, k, m] -> [b, n, m], b absent for mm and addmm."""
    bias, x, y = (None, *call.tensors) if len(call.tensors) == 2 else call.tensors
    a, b, ndim = call.at(x), call.at(y), len(call.shape)
    why = _reads(call, b if a.constant and not b.constant else a, b)
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
    left = _sized(_bare(a, ndim - 1), ndim - 1, 1)
    right = _sized(_bare(b, ndim - 2), ndim - 2, 1)
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
        if f is not None and f.covered == (axis,):
            labels.append(f.labels.ravel())
            total /= tensor.shape[axis]
    constant = all(known.constant for known in call.known.values())
    call.products.append(Product(tuple(labels), total, constant))


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
        x, weight = _contracted(call, x, channel, weight, reads, _reads(call, x, weight))
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
    others = _sized(_bare(x, channel), channel, 1)
    out_fields = () if labels is None or len(labels) < 2 else (along(labels, channel, len(call.shape)),)
    result = Labelled(call.shape, others.fields + out_fields)
    if call.arg("bias") is not None:
        bias = _on_axis(call.at(call.arg("bias")), channel, len(call.shape))
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


PRODUCTS = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["hardswish", "log_sigmoid_forward", "rrelu_with_noise", "copy", "fill", "zero", "_to_copy", "detach", "alias",
         "lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "native_dropout",
         "_prelu_kernel", "bernoulli", "hardtanh"],
        _pointwise,
    ),
    **dict.fromkeys(
        ["view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "reshape"], _reshape
    ),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"], _made), "as_strided": _restrided,
    "permute": _permute, **dict.fromkeys(["transpose", "t"], _transpose), "expand": _expand, "slice": _slice,
    "select": _select, "unbind": _unbind, **dict.fromkeys(["split", "split_with_sizes", "unsafe_split"], _split),
    **dict.fromkeys(["cat", "stack"], _cat), "constant_pad_nd": _pad, "repeat": _repeat,
    "index": _index, "index_select": _index_select, "embedding": _embedding,
    **dict.fromkeys(["roll", "flip"], _ordered),
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort", "topk"], _one_axis),
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "var_mean", "var", "std", "linalg_vector_norm", "argmax", "prod", "logsumexp", "any", "all", "max", "min"],
        _reduce,
    ),
    **dict.fromkeys(
        ["max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
         "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
         "reflection_pad2d", "replication_pad2d", "fractional_max_pool2d"],
        _spatial(2),
    ),
    **dict.fromkeys(["avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "reflection_pad1d"], _spatial(1)),
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(["channel_shuffle", "native_channel_shuffle"], _channel_shuffle),
    "glu": _glu, "im2col": _unfold,
    **dict.fromkeys(
        ["native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
         "_batch_norm_with_update"],
        _batch_norm,
    ),
    **dict.fromkeys(["native_layer_norm", "_fused_rms_norm"], _layer_norm), "native_group_norm": _group_norm,
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm"], _matrices), "convolution": _convolution,
}  # fmt: skip
