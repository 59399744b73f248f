"""From the figures of a few networks to those of any widths: HALP's latency table (arXiv:2110.10811), measured in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vpdeploy.surgery.cost import Array
from vpdeploy.surgery.shapes import LayerShape, Shapes
from vpdeploy.values import Term

ROUNDS = 2000  # of coordinate descent, at most


def fit_layers(
    samples: Sequence[Mapping[str, float]], totals: Array, widths: Array, shapes: Shapes
) -> tuple[Term, ...]:
    """What each layer costs, from networks in which each was timed.

    samples: of each network, module -> milliseconds, and "" -> what belongs to no layer; totals: [networks], of the whole,
    timed without a profiler; widths: [networks, groups].

    A layer with a outputs and b inputs costs c0 + c1 a + c2 b + c3 a b; what belongs to no layer (sums, pools, layouts)
    follows what all layers write. No coefficient is below 0: what is narrower never costs more.
    """
    samples = [_to_total(sample, total) for sample, total in zip(samples, totals, strict=True)]
    terms: list[Term] = []
    rest = np.array([sum(sample.values()) for sample in samples])
    for layer in shapes.layers:
        figures = np.array([sample.get(layer.module, 0.0) for sample in samples])
        if figures.any():
            rest = rest - figures
            terms += _of_layer(layer, figures, widths)
    terms += _of_rest(np.maximum(rest, 0), widths, shapes)
    return _levelled(terms, totals, widths, shapes)


def fit_whole(totals: Array, widths: Array, shapes: Shapes) -> tuple[Term, ...]:
    """The same from the totals alone: so much for each multiply-accumulate and each value written, and a constant.

    totals: [networks], above 0; widths: [networks, groups].
    """
    macs = np.array([sum(_products(layer, row, shapes) for layer in shapes.layers) for row in widths])
    features = np.stack([np.ones(len(totals)), macs, _written(widths, shapes)], 1)
    constant, per_product, per_value = non_negative(features, totals)
    terms = [Term("", constant)]
    for layer in shapes.layers:
        terms.append(Term(layer.module, per_value * layer.positions, ((layer.weight, 0),)))
        terms.append(Term(layer.module, per_product * _kernel(layer, shapes), ((layer.weight, 0), (layer.weight, 1))))
    return _levelled(terms, totals, widths, shapes)


def _to_total(sample: Mapping[str, float], total: float) -> dict[str, float]:
    """A profiler slows what it watches, and does not see what happens between operations: that belongs to no layer."""
    seen = sum(sample.values())
    share = min(1.0, total / seen)
    return {**{name: ms * share for name, ms in sample.items()}, "": sample.get("", 0.0) * share + total - seen * share}


def _of_layer(layer: LayerShape, figures: Array, widths: Array) -> Iterator[Term]:
    a, b = np.array([layer.lengths(row) for row in widths]).T
    found = non_negative(np.stack([np.ones(len(a)), a, b, a * b], 1), figures)
    out, read = (layer.weight, 0), (layer.weight, 1)
    for amount, axes in zip(found, ((), (out,), (read,), (out, read)), strict=True):
        if amount > 0:
            yield Term(layer.module, float(amount), axes)


def _of_rest(figures: Array, widths: Array, shapes: Shapes) -> Iterator[Term]:
    constant, per_value = non_negative(np.stack([np.ones(len(figures)), _written(widths, shapes)], 1), figures)
    yield Term("", float(constant))
    for layer in shapes.layers if per_value > 0 else ():
        yield Term("", float(per_value * layer.positions), ((layer.weight, 0),))


def _levelled(terms: Sequence[Term], totals: Array, widths: Array, shapes: Shapes) -> tuple[Term, ...]:
    """Least squares of relative errors stay below where the error is large: the middle network is met again."""
    cost = shapes.sum_of(terms)
    level = float(np.median(totals / np.array([cost.at(row) for row in widths])))
    return tuple(Term(term.module, term.amount * level, term.axes) for term in terms)


def _written(widths: Array, shapes: Shapes) -> Array:
    """[networks]: the values that all layers write for one image."""
    return np.array([sum(layer.lengths(row)[0] * layer.positions for layer in shapes.layers) for row in widths])


def _kernel(layer: LayerShape, shapes: Shapes) -> float:
    """Multiply-accumulates for each entry of the weight's first two axes."""
    a, b = layer.lengths(shapes.dense_widths)
    return layer.macs / (a * b)


def _products(layer: LayerShape, row: Array, shapes: Shapes) -> float:
    a, b = layer.lengths(row)
    return float(a * b * _kernel(layer, shapes))


def non_negative(features: Array, figures: Array) -> Array:
    """The coefficients, at least 0, with the least squares of errors relative to ``figures``: [features].

    features: [samples, features], at least 0; figures: [samples], at least 0. By coordinate descent.
    """
    weight = 1 / np.maximum(figures, max(figures.max() / 100, 1e-12))
    scale = np.maximum(np.abs(features).max(0), 1e-300)
    x, y = features / scale * weight[:, None], figures * weight
    gram, target = x.T @ x, x.T @ y
    found: Any = np.zeros(len(scale))
    for _ in range(ROUNDS):
        before = found.copy()
        for i in range(len(found)):
            if gram[i, i] > 0:
                found[i] = max(0.0, found[i] + (target[i] - gram[i] @ found) / gram[i, i])
        if np.abs(found - before).max() <= 1e-9 * found.max():
            break
    return found / scale
