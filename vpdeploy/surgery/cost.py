"""What given widths cost: MACs and parameters as closed forms, exact and quick enough for every search step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from vpdeploy.surgery.labels import Ints
from vpdeploy.surgery.trace import Trace, look
from vpdeploy.values import ChannelGroup

Array = np.ndarray[Any, np.dtype[np.float64]]
Length = tuple[Array, float]  # of an axis: share of each group's width [g], and what never changes


@dataclass(frozen=True)
class Sum:
    """A sum of t terms, each ``rest`` times two lengths that follow the g group widths: constant + share @ widths.

    ``share``: [2, t, g], ``constant``: [2, t], ``rest``: [t].
    """

    share: Array
    constant: Array
    rest: Array

    def at(self, widths: Array) -> float:
        lengths = self.constant + self.share @ widths  # [2, t]
        return float(lengths[0] * lengths[1] @ self.rest)


Cost = Callable[[Array], float]


@dataclass(frozen=True)
class CostModel:
    """Products (MACs) of one image and parameters, as functions of the widths of the groups: [g]. ``measured``: further
    quantities by name, such as "latency_ms"; ``dense``: what these are of the dense network, where that is not what the sum
    says of its widths: it ships without a prompt.
    """

    products: Sum
    entries: Sum
    dense_widths: Array
    measured: Mapping[str, Sum] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)

    def macs(self, widths: Array) -> float:
        return self.products.at(widths)

    def params(self, widths: Array) -> float:
        return self.entries.at(widths)

    def channels(self, widths: Array) -> float:
        return float(widths.sum())

    def of(self, kind: str) -> Cost:
        """What a budget of ``kind`` counts."""
        counted = {"channel_ratio": self.channels, "macs_ratio": self.macs, "params_ratio": self.params}
        return counted[kind] if kind in counted else self.measured[quantity_of(kind)].at

    def dense_of(self, kind: str) -> float:
        """The same of the dense network."""
        found = self.dense.get(quantity_of(kind))
        return self.of(kind)(self.dense_widths) if found is None else found


def quantity_of(kind: str) -> str:
    """What a budget of ``kind`` limits: a ratio of run times is a time."""
    return "latency_ms" if kind == "latency_ratio" else kind


def build_cost_model(backbone: nn.Module, groups: Sequence[ChannelGroup], *, example: Tensor) -> CostModel:
    """The cost of ``backbone`` as a function of the widths of ``groups``. example: [n, 3, C, C].

    MACs are the products of convolutions, linear layers and attention, as ``measure.macs`` counts them.
    """
    return cost_of(look(backbone, example), backbone, groups)


def cost_of(seen: Trace, backbone: nn.Module, groups: Sequence[ChannelGroup]) -> CostModel:
    """The same from what a forward of ``backbone`` showed."""
    column = columns_of(seen, groups)
    widths = np.array([group.width for group in groups], float)
    products = [(p.rest, [length_of(labels, column, widths) for labels in p.axes]) for p in seen.products]
    entries = [
        (1.0, [length_of(labels, column, widths) for labels in seen.labels[name]])
        for name, _ in backbone.named_parameters()
    ]
    return CostModel(sum_of(products, widths), sum_of(entries, widths), widths)


def columns_of(seen: Trace, groups: Sequence[ChannelGroup]) -> Ints:
    """Component -> number of the group whose channel it is, -1 for none."""
    column = np.full(len(seen.components.of), -1, np.int64)
    for number, group in enumerate(groups):
        member = group.members[0]
        column[seen.components.of[seen.labels[member.tensor][member.axis][list(member.indices)]]] = number
    return column[seen.components.of]


def length_of(labels: Ints, column: Ints, widths: Array) -> Length:
    """How long an axis with these labels is."""
    owners = column[labels]
    counts = np.bincount(owners[owners >= 0], minlength=len(widths)).astype(float)
    return counts / np.maximum(widths, 1), float((owners < 0).sum())


def sum_of(terms: Iterable[tuple[float, Sequence[Length]]], widths: Array) -> Sum:
    """At most two axes of a term follow a width, and the others are one factor; a third is taken as it is when dense, so
    that the cut network costs less than is said here, never more.
    """
    rows = []
    for rest, axes in terms:
        moving = [axis for axis in axes if axis[0].any()]
        fixed = [constant for share, constant in axes if not share.any()]
        fixed += [constant + float(share @ widths) for share, constant in moving[2:]]
        pair = [*moving[:2], *[(np.zeros(len(widths)), 1.0)] * 2][:2]
        rows.append((rest * math.prod(fixed), pair))
    share = np.array([[pair[i][0] for _, pair in rows] for i in (0, 1)]).reshape(2, len(rows), len(widths))
    constant = np.array([[pair[i][1] for _, pair in rows] for i in (0, 1)]).reshape(2, len(rows))
    return Sum(share, constant, np.array([rest for rest, _ in rows], float))
