"""Norms: by channel, and over channels."""

from __future__ import annotations

from vpdeploy.surgery.labels import Labelled, merge, only, stay
from vpdeploy.surgery.rules.axes import on_axis
from vpdeploy.surgery.rules.call import Call, Rule


def _batch_norm(call: Call) -> list[Labelled]:
    x = call.first
    if call.arg("training"):  # as weight standardisation, whose batch are the inputs of a filter
        for f in x.fields:
            if 1 not in f.covered:
                call.book.normalise(f.labels, _normalised(call))
    for tensor in call.tensors[1:]:
        x = merge(call.book, x, on_axis(call.at(tensor), 1, len(x.shape)), f"{call.place} has channels that stay")
    return [x]


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
            x = merge(call.book, x, on_axis(call.at(tensor), 1, len(x.shape)), f"{call.place} has channels that stay")
    return [x]


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ["native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
         "_batch_norm_with_update"],
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm, "_fused_rms_norm": _layer_norm, "native_group_norm": _group_norm,
}  # fmt: skip
