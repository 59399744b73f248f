"""The same elements under other shapes, and parts of them."""

from __future__ import annotations

import numpy as np

from vpdeploy.surgery.labels import Labelled, merge, permuted, reshaped, stay
from vpdeploy.surgery.rules.axes import taken, without_axes
from vpdeploy.surgery.rules.call import Call, Rule


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


BY_NUMBER = "channels by number"  # in a reason: a slice was taken, whose length may follow what is left


def _slice(call: Call) -> Labelled:
    x, axis = call.first, call.arg("dim") % len(call.first.shape)
    start, end, step = call.arg("start"), call.arg("end"), call.arg("step")
    places = np.arange(x.shape[axis])[slice(start, end, step)]
    f = x.field(axis)
    if f is not None and f.covered == (axis,) and len(places) < x.shape[axis]:
        why = f"{call.place} takes {len(places)} of its {x.shape[axis]} {BY_NUMBER}"
        call.book.suspect(f.labels, why, first=True)
    return taken(call, x, axis, places)


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
    return without_axes(taken(call, x, axis, np.array([place])), [axis])


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
    return [taken(call, x, axis, np.arange(a, a + size)) for a, size in zip(starts, sizes, strict=False)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(["view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "reshape"], _reshape),
    "permute": _permute, "transpose": _transpose, "t": _transpose, "expand": _expand, "slice": _slice, "select": _select,
    "unbind": _unbind, **dict.fromkeys(["split", "split_with_sizes", "unsafe_split"], _split),
}  # fmt: skip
