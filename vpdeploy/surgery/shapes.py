"""How long the axes of every layer are at given widths: what its time depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from vpdeploy.surgery.cost import Array, Length, Sum, columns_of, length_of, sum_of
from vpdeploy.surgery.plan import tensor_shapes
from vpdeploy.surgery.trace import Trace
from vpdeploy.values import ChannelGroup, Term


@dataclass(frozen=True)
class LayerShape:
    """A layer with a weight. ``axes``: the first two of its weight, outputs and what one of them reads; ``entries`` of the weight
    and ``macs`` of one image, both dense; ``positions``: pixels or tokens at which it stands.
    """

    module: str
    weight: str
    axes: tuple[Length, Length]
    entries: float
    macs: float

    @property
    def positions(self) -> float:
        return self.macs / self.entries

    def lengths(self, widths: Array) -> Array:
        """[2]"""
        return np.array([constant + float(share @ widths) for share, constant in self.axes])


@dataclass(frozen=True)
class Shapes:
    """Of a whole network: its layers, and the axes of every parameter and buffer. ``other_macs``: of products without weight."""

    layers: tuple[LayerShape, ...]
    tensors: Mapping[str, tuple[Length, ...]]
    dense_widths: Array
    other_macs: float

    def sum_of(self, terms: Iterable[Term]) -> Sum:
        """What the terms cost together, as a function of the widths."""
        rows = ((term.amount, [self.tensors[name][axis] for name, axis in term.axes]) for term in terms)
        return sum_of(rows, self.dense_widths)


def shapes_of(seen: Trace, backbone: nn.Module, groups: Sequence[ChannelGroup]) -> Shapes:
    """The shapes of ``backbone`` as functions of the widths of ``groups``, from what its forward showed."""
    column = columns_of(seen, groups)
    widths = np.array([group.width for group in groups], float)
    macs: dict[str, float] = {}
    for product in seen.products:
        dense = float(np.prod([len(labels) for labels in product.axes]) * product.rest)
        macs[product.module] = macs.get(product.module, 0.0) + dense
    tensors = {name: tuple(length_of(labels, column, widths) for labels in axes) for name, axes in seen.labels.items()}
    sizes, layers = tensor_shapes(backbone), []
    for module, count in macs.items():
        name = f"{module}.weight".lstrip(".")
        if len(sizes.get(name, ())) >= 2:
            first, second = tensors[name][:2]
            layers.append(LayerShape(module, name, (first, second), float(np.prod(sizes[name])), count))
    other = sum(macs.values()) - sum(layer.macs for layer in layers)
    return Shapes(tuple(layers), tensors, widths, other)
