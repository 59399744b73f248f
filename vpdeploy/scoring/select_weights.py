"""Scores of single weights to a mask: the highest of all layers, or two of every four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from vpdeploy.errors import BudgetError

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
KIND = "weight_ratio"


@dataclass(frozen=True)
class WeightSelector:
    """Which weights stay. ``shapes``: of each weight, by name, in the order of the row that holds them all; ``ratio``: how many
    of all may stay; ``pattern``: "2:4" for two of every four neighbours along a layer's inputs, whatever their layer.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ratio: float
    pattern: str = ""

    @property
    def count(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def select_row(self, scores: Array) -> Bools:
        """Which places of the row stay, higher scores first, of equal ones the earlier. scores: [weights] -> [weights]."""
        if not self.pattern:
            return highest(scores, int(self.ratio * len(scores) + 1e-9))
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = np.split(np.asarray(scores), list(accumulate(sizes))[:-1])
        kept = [
            two_of_four(part.reshape(shape)).ravel() for part, shape in zip(parts, self.shapes.values(), strict=True)
        ]
        return np.concatenate(kept) if kept else np.zeros(0, bool)


def weight_selector(shapes: Mapping[str, tuple[int, ...]], *, ratio: float, granularity: str) -> WeightSelector:
    """Raises: BudgetError when no weight would stay, or a pattern keeps another share than was asked for."""
    selector = WeightSelector(shapes, ratio, "" if granularity == "weight" else granularity)
    if selector.pattern and ratio != 0.5:
        raise BudgetError(
            f"budget.{KIND}: got {ratio:g} with search.granularity = '2:4'; expected 0.5: two of four stay"
        )
    if int(ratio * selector.count + 1e-9) < 1:
        raise BudgetError(f"budget.{KIND}: got {ratio:g}; of {selector.count} weights none would stay; ask for more")
    return selector


def highest(scores: Array, count: int) -> Bools:
    """The ``count`` highest, of equal ones the earlier: [n] -> [n]. In linear time: networks have many millions of weights."""
    kept = np.zeros(len(scores), bool)
    if count <= 0:
        return kept
    if count >= len(scores):
        return ~kept
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    kept = scores > threshold
    equal = np.flatnonzero(scores == threshold)
    kept[equal[: count - int(kept.sum())]] = True
    return kept


def two_of_four(scores: Array) -> Bools:
    """The two highest of every four neighbours along the inputs of one layer, as sparse tensor cores read them; a layer whose
    inputs are no multiple of four stays whole. scores: [outputs, inputs, ...] -> the same shape.
    """
    if scores.shape[1] % 4:
        return np.ones(scores.shape, bool)
    last = np.moveaxis(scores, 1, -1)  # of a convolution: each pixel of the kernel has its own fours
    fours = last.reshape(-1, 4)
    order = np.argsort(-fours, axis=1, kind="stable")
    kept = np.zeros(fours.shape, bool)
    np.put_along_axis(kept, order[:, :2], True, axis=1)
    return np.moveaxis(kept.reshape(last.shape), -1, 1)
