"""Parts of tensors: labels with an axis less, shorter, or moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vpdeploy.surgery.labels import Field, Ints, Labelled, along
from vpdeploy.surgery.rules.call import Call


def taken(call: Call, x: Labelled, axis: int, places: Ints) -> Labelled:
    """``x`` with only ``places`` along ``axis``."""
    axis %= len(x.shape)
    shape = (*x.shape[:axis], len(places), *x.shape[axis + 1 :])
    f = x.field(axis)
    if f is None or (len(places) == x.shape[axis] and bool((np.diff(places) == 1).all())):
        return Labelled(shape, x.fields, x.constant)
    part = replace(f, labels=f.labels.take(places, axis=axis))
    return Labelled(shape, tuple(part if g is f else g for g in x.fields), x.constant)


def without_axes(x: Labelled, axes: Sequence[int]) -> Labelled:
    """``x`` without ``axes``, which no field covers any more."""
    gone = {axis % len(x.shape) for axis in axes}
    left = [axis for axis in range(len(x.shape)) if axis not in gone]
    fields = tuple(
        Field(f.labels.squeeze(tuple(sorted(gone))) if gone else f.labels, tuple(f.nesting[i] for i in left))
        for f in x.fields
    )
    return Labelled(tuple(x.shape[i] for i in left), tuple(f for f in fields if f.covered), x.constant)


def bare(x: Labelled, axis: int) -> Labelled:
    """``x`` without the field over ``axis``."""
    return replace(x, fields=tuple(f for f in x.fields if axis not in f.covered))


def sized(x: Labelled, axis: int, size: int) -> Labelled:
    return replace(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :]))


def on_axis(vector: Labelled, axis: int, ndim: int) -> Labelled:
    """[c] -> [1, c, 1, 1], for an input of ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = vector.shape[0]
    fields = tuple(along(f.labels.ravel(), axis, ndim) for f in vector.fields)
    return Labelled(tuple(shape), fields, vector.constant)
