"""Operations that mix or move values along axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vpdeploy.surgery.labels import Labelled, along, merge, only, stay
from vpdeploy.surgery.rules.axes import sized, taken, without_axes
from vpdeploy.surgery.rules.call import Call, Rule


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
        x = sized(x, axis % len(x.shape), 1)
    x = x if call.arg("keepdim") else without_axes(x, dims)
    return [x, x]


def _spatial(count: int) -> Rule:
    """Pooling and resizing mix the last ``count`` axes; the others pass."""

    def rule(call: Call) -> list[Labelled]:
        ndim = len(call.first.shape)
        x = stay(call.book, call.first, range(ndim - count, ndim), f"{call.place} mixes positions")
        return [x, x]

    return rule


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
        parts.append(taken(call, x, axis, np.arange(start, start + half)))
    return merge(call.book, parts[0], parts[1], f"{call.place} combines its channels with values that stay")


def _unfold(call: Call) -> Labelled:
    """Patches: [n, c, h, w] -> [n, c * k, positions]."""
    x = only(call.book, stay(call.book, call.first, [-1, -2], f"{call.place} mixes positions"), 1)
    f = x.field(1)
    if f is None:
        return Labelled(call.shape)
    return Labelled(call.shape, (along(np.repeat(f.labels.ravel(), call.shape[1] // x.shape[1]), 1, 3),))


def _weight_norm(call: Call) -> list[Labelled]:
    """Directions and lengths of a weight to the weight: each slice along ``dim`` by its own length."""
    x, dim = call.at(call.arg("v")), call.arg("dim")
    others = [axis for axis in range(len(x.shape)) if axis != dim]
    x = stay(call.book, x, others, f"{call.place} takes one number over its channels")
    lengths = call.at(call.arg("g"))
    return [merge(call.book, x, lengths, f"{call.place} has channels that stay"), lengths]


RULES: dict[str, Rule] = {
    "_weight_norm_interface": _weight_norm, "roll": _ordered, "flip": _ordered,
    **dict.fromkeys(["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort", "topk"], _one_axis),
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "var_mean", "var", "std", "linalg_vector_norm", "argmax", "prod", "logsumexp", "any",
         "all", "max", "min"],
        _reduce,
    ),
    **dict.fromkeys(
        ["max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
         "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
         "reflection_pad2d", "replication_pad2d", "fractional_max_pool2d"],
        _spatial(2),
    ),
    **dict.fromkeys(["avg_pool1d", "adaptive_avg_pool1d", "max_pool1d", "reflection_pad1d"], _spatial(1)),
    "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle, "glu": _glu, "im2col": _unfold,
    "channel_shuffle": _channel_shuffle, "native_channel_shuffle": _channel_shuffle,
}  # fmt: skip
