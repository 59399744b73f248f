"""Labels of channels: which slices of tensors live and die together.

Every position of every axis of every parameter gets a label. A tensor that a forward makes carries the labels of what it
was made from, as fields: arrays that broadcast to its shape. An axis along which an array is longer than 1 is covered; a
slice along it exists exactly as long as its label does. Axes that no field covers (batch, height, width, the network's
input) never change. What a forward does to tensors joins labels; labels that are joined are one channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Field:
    """``labels`` broadcasts to a tensor's shape. ``nesting`` ranks the axes as they lay when they were last split apart,
    the outermost first: axes that are merged in another order were shuffled.
    """

    labels: Ints
    nesting: tuple[int, ...]

    @property
    def covered(self) -> tuple[int, ...]:
        return tuple(axis for axis, size in enumerate(self.labels.shape) if size > 1)


@dataclass(frozen=True)
class Labelled:
    """What is known of one tensor. No axis is covered by two fields. ``constant``: it does not depend on the image.

    ``debts``: what has to be held if the tensor comes to anything, as bits (``LabelBook.deferred``).
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    constant: bool = False
    debts: int = 0

    def field(self, axis: int) -> Field | None:
        return next((field for field in self.fields if field.labels.shape[axis] > 1), None)


def along(labels: Ints, axis: int, ndim: int) -> Field:
    """A field that covers one axis. labels: [size of the axis]."""
    shape = [1] * ndim
    shape[axis] = len(labels)
    return Field(labels.reshape(shape), tuple(range(ndim)))


@dataclass(frozen=True)
class Components:
    """What became of the labels. ``of``: label -> component; the reasons are by component, the first that was given."""

    of: Ints
    rigid: dict[int, str]
    normalised: dict[int, str]
    suspect: dict[int, str]


MOST_SUSPECTS = 3  # more than these are no help to a reader


class LabelBook:
    """Hands out labels and notes what is said about them."""

    def __init__(self) -> None:
        self.count = 0
        self._joins: list[tuple[Ints, Ints]] = []
        self._said: dict[str, list[tuple[Ints, str]]] = {"rigid": [], "normalised": [], "suspect": []}
        self._deferred: list[tuple[Ints, str]] = []
        self._paid = 0
        self._defers = False

    def fresh(self, count: int) -> Ints:
        self.count += count
        return np.arange(self.count - count, self.count, dtype=np.int64)

    def join(self, a: Ints, b: Ints) -> None:
        """``a`` and ``b``, of shapes that broadcast, are the same channels position by position."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self._joins.append((a.ravel(), b.ravel()))

    def hold(self, labels: Ints, why: str) -> None:
        """These channels can never go."""
        (self._deferred if self._defers else self._said["rigid"]).append((labels.ravel(), why))

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], int]]:
        """What is held here is held once it is paid: a result that nobody uses holds nothing. Tells it as bits."""
        first, self._defers = len(self._deferred), True
        try:
            yield lambda: (1 << len(self._deferred)) - (1 << first)
        finally:
            self._defers = False

    def pay(self, debts: int) -> None:
        """Hold what was deferred under these bits."""
        owed = debts & ~self._paid
        self._paid |= owed
        self._said["rigid"] += [held for bit, held in enumerate(self._deferred) if owed >> bit & 1]

    def normalise(self, labels: Ints, why: str) -> None:
        """Statistics are taken over these channels: without some of them the others change."""
        self._said["normalised"].append((labels.ravel(), why))

    def suspect(self, labels: Ints, why: str, *, first: bool = False) -> None:
        """Code with sizes or positions of its own handles these channels: if removal fails, this is probably why. ``first``:
        told before what else is suspected of them.
        """
        said = self._said["suspect"]
        said.insert(0 if first else len(said), (labels.ravel(), why))

    def components(self) -> Components:
        of = _components(self.count, self._joins)
        first: dict[str, dict[int, str]] = {}
        for kind, said in self._said.items():
            reasons = first.setdefault(kind, {})
            for labels, why in said:
                for component in np.unique(of[labels]).tolist():
                    before = reasons.setdefault(component, why)
                    if kind == "suspect" and why not in before and before.count(", or ") < MOST_SUSPECTS - 1:
                        reasons[component] = f"{before}, or {why}"
        return Components(of, first["rigid"], first["normalised"], first["suspect"])


def _components(count: int, joins: Sequence[tuple[Ints, Ints]]) -> Ints:
    """The smallest label that each label is joined to, directly or through others: [count]."""
    of = np.arange(count, dtype=np.int64)
    if not joins:
        return of
    u, v = (np.concatenate(side) for side in zip(*joins, strict=True))
    while True:
        low, high = np.minimum(of[u], of[v]), np.maximum(of[u], of[v])
        apart = low != high
        if not apart.any():
            return of
        u, v = u[apart], v[apart]
        np.minimum.at(of, high[apart], low[apart])
        while (of[of] != of).any():
            of = of[of]


def collapse(book: LabelBook, field: Field, axes: Iterable[int]) -> Field:
    """All positions along ``axes`` become one: they go together or not at all."""
    labels = field.labels
    for axis in axes:
        first = labels.take([0], axis=axis)
        book.join(labels, first)
        labels = first
    return replace(field, labels=labels)


def stay(book: LabelBook, tensor: Labelled, axes: Iterable[int], why: str) -> Labelled:
    """``axes`` of ``tensor`` keep their length: what covers them alone is held, what covers others too is collapsed."""
    fixed = {axis % len(tensor.shape) for axis in axes}
    fields = []
    for field in tensor.fields:
        here = [axis for axis in field.covered if axis in fixed]
        if here and len(here) == len(field.covered):
            book.hold(field.labels, why)
        else:
            fields.append(collapse(book, field, here) if here else field)
    return replace(tensor, fields=tuple(fields))


def hold_all(book: LabelBook, tensor: Labelled, why: str) -> Labelled:
    """Nothing that ``tensor`` is made of can go."""
    return stay(book, tensor, range(len(tensor.shape)), why)


def merge(book: LabelBook, a: Labelled, b: Labelled, why: str) -> Labelled:
    """``a`` and ``b`` combined position by position, with broadcasting. A covered axis against one that never changes stays."""
    ndim = max(len(a.shape), len(b.shape))
    a, b = _widened(a, ndim), _widened(b, ndim)
    while (changed := _agree(book, a, b, why)) is not None:
        a, b = changed
    for f in a.fields:
        for g in b.fields:
            if f.covered == g.covered:
                book.join(f.labels, g.labels)
    taken = {axis for f in a.fields for axis in f.covered}
    fields = a.fields + tuple(g for g in b.fields if not taken & set(g.covered))
    shape = tuple(max(x, y) if min(x, y) else 0 for x, y in zip(a.shape, b.shape, strict=True))
    return Labelled(shape, fields, a.constant and b.constant)


def _agree(book: LabelBook, a: Labelled, b: Labelled, why: str) -> tuple[Labelled, Labelled] | None:
    """One step towards fields of both that cover the same axes; None when they do."""
    for axis, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)):
        if x > 1 and y > 1 and (a.field(axis) is None) != (b.field(axis) is None):
            return stay(book, a, [axis], why), stay(book, b, [axis], why)
    for f in a.fields:
        for g in b.fields:
            both = set(f.covered) & set(g.covered)
            if both and (set(f.covered) | set(g.covered)) != both:
                outer = {min(one.covered, key=lambda axis: one.nesting[axis]) for one in (f, g) if len(one.covered) > 1}
                if not outer <= both:  # heads against what runs within each: heads are what can go
                    return stay(book, a, both - outer, why), stay(book, b, both - outer, why)
                return _narrowed(book, a, f, both), _narrowed(book, b, g, both)
    return None


def _narrowed(book: LabelBook, tensor: Labelled, field: Field, axes: set[int]) -> Labelled:
    """``field`` of ``tensor`` collapsed to ``axes``."""
    less = collapse(book, field, [axis for axis in field.covered if axis not in axes])
    return replace(tensor, fields=tuple(less if f is field else f for f in tensor.fields))


def only(book: LabelBook, tensor: Labelled, axis: int) -> Labelled:
    """The field over ``axis`` collapsed to that axis alone."""
    field = tensor.field(axis)
    return tensor if field is None else _narrowed(book, tensor, field, {axis})


def _widened(tensor: Labelled, ndim: int) -> Labelled:
    """``tensor`` with axes of length 1 before its own, up to ``ndim``."""
    more = ndim - len(tensor.shape)
    if not more:
        return tensor
    fields = tuple(
        Field(
            f.labels.reshape((1,) * more + f.labels.shape),
            tuple(range(-more, 0)) + f.nesting,
        )
        for f in tensor.fields
    )
    return Labelled((1,) * more + tensor.shape, fields, tensor.constant)


def permuted(tensor: Labelled, order: Sequence[int]) -> Labelled:
    order = [axis % len(tensor.shape) for axis in order]
    fields = tuple(Field(f.labels.transpose(order), tuple(f.nesting[i] for i in order)) for f in tensor.fields)
    return Labelled(tuple(tensor.shape[i] for i in order), fields, tensor.constant)


def reshaped(book: LabelBook, tensor: Labelled, shape: Sequence[int], why: str) -> Labelled:
    """``tensor`` under another shape. Axes that were split apart and are merged in another order were shuffled: of those all
    but the innermost are collapsed, so that each part loses the same positions.
    """
    parts = _parts(tensor.shape, shape)
    for old, _ in parts:
        mixed = [f for f in tensor.fields if any(axis in old for axis in f.covered)]
        if len(mixed) > 1 and len(old) > 1:  # a position of the merged axis would hang on two channels
            tensor = stay(book, tensor, old, f"{why}, where axes of different channels become one")
    fields = [field for f in tensor.fields if (field := _reshaped(book, f, tensor.shape, shape, parts, why)).covered]
    return Labelled(tuple(shape), tuple(fields), tensor.constant)


def _reshaped(
    book: LabelBook,
    field: Field,
    old_shape: Sequence[int],
    shape: Sequence[int],
    parts: list[tuple[range, range]],
    why: str,
) -> Field:
    sizes: list[int] = []
    for old, new in parts:
        inside = [axis for axis in field.covered if axis in old]
        if len(inside) > 1:
            ranked = sorted(inside, key=lambda axis: field.nesting[axis])
            while ranked != [axis for axis in inside if axis in ranked]:
                field = collapse(book, field, ranked[:1])
                ranked = ranked[1:]
        if inside and max(sum(old_shape[i] > 1 for i in old), sum(shape[i] > 1 for i in new)) > 1:
            book.suspect(field.labels, why)
        sizes += [shape[axis] if inside else 1 for axis in new]
    # The parts hold all axes in order.
    full = [old_shape[axis] if any(i in field.covered for i in old) else 1 for old, _ in parts for axis in old]
    labels = np.broadcast_to(field.labels, full).reshape(sizes)
    if bool((labels == labels.flat[0]).all()):
        book.hold(labels, f"{why}, where all its channels hang together")
        return replace(field, labels=labels.ravel()[:1].reshape([1] * len(sizes)), nesting=tuple(range(len(sizes))))
    for axis, size in enumerate(sizes):
        if size > 1 and bool((labels == labels.take([0], axis=axis)).all()):
            labels = labels.take([0], axis=axis)  # it was only repeated along this axis
    keys: dict[int, tuple[int, int]] = {}
    before = -1
    for old, new in parts:
        covered = [axis for axis in old if axis in field.covered]  # what labels run along says how deep it lies
        before = min((field.nesting[axis] for axis in covered or old), default=before)
        keys |= {axis: (before, axis) for axis in new}
    ranks = {axis: rank for rank, axis in enumerate(sorted(keys, key=lambda axis: keys[axis]))}
    return Field(labels, tuple(ranks[axis] for axis in range(len(sizes))))


def _parts(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Runs of old and new axes that hold the same elements, as short as can be; all axes, in order."""
    parts: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, first = i, j
        left, right = 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                left, i = left * old[i], i + 1
        parts.append((range(start, i), range(first, j)))
    return parts
