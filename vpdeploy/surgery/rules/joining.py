"""Tensors put together, extended, or taken from by position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vpdeploy.surgery.labels import Ints, Labelled, along, hold_all, merge, only, reshaped, stay
from vpdeploy.surgery.rules.axes import bare, sized, without_axes
from vpdeploy.surgery.rules.call import Call, Rule
from vpdeploy.surgery.rules.elementwise import unknown


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
    rest = [sized(stripped, axis, 1) for part in parts if (stripped := bare(part, axis)) is not None]
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
                return unknown(call)
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


def _index(call: Call) -> Labelled:
    """x[..., index, ...] with one tensor of positions."""
    x, indices = call.first, call.arg("indices")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    for index in indices:
        if index is not None:
            hold_all(call.book, call.at(index), f"its values are positions, in {call.place}")
    if len(axes) != 1 or indices[axes[0]].dtype in (torch.bool, torch.uint8):
        return unknown(call)
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
    without = without_axes(sized(x, axis, 1), [axis])
    shape = (*x.shape[:axis], *(1,) * ndim, *x.shape[axis + 1 :])
    return Labelled(call.shape, reshaped(call.book, without, shape, call.place).fields)


RULES: dict[str, Rule] = {
    "cat": _cat, "stack": _cat, "constant_pad_nd": _pad, "repeat": _repeat, "index": _index, "index_select": _index_select,
    "embedding": _embedding,
}  # fmt: skip
