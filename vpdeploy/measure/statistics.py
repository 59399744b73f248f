"""Intervals at 95 %: of one accuracy, of a paired difference of accuracies, and of a ratio of medians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpdeploy.values import AccuracyDifference, Interval

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, n: int) -> Interval:
    """Score interval of a proportion, as fractions (Wilson, JASA 22, 1927), sound at 0 and at n of n too."""
    assert 0 <= correct <= n and n > 0, (correct, n)
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * float(np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)))
    # The bounds are exactly 0 and 1 at the ends; rounding would leave 1e-17.
    return (0.0 if correct == 0 else max(0.0, centre - half), 1.0 if correct == n else min(1.0, centre + half))


def paired_difference(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    *,
    predictions_a: NDArray[Any],
    predictions_b: NDArray[Any],
) -> AccuracyDifference:
    """Accuracy of b minus accuracy of a, on the same images in the same order. All arrays: [n].

    The interval is Tango's score interval for matched pairs (Statistics in Medicine 17, 1998, 891-908): it is sound for
    small n and for few or no images on which the two disagree, and always contains the difference. ``changed`` is the
    share of images whose predicted class differs, right or wrong.
    """
    n = len(correct_a)
    assert n > 0 and len(correct_b) == len(predictions_a) == len(predictions_b) == n
    gained = int(np.count_nonzero(correct_b & ~correct_a))
    lost = int(np.count_nonzero(correct_a & ~correct_b))
    return AccuracyDifference(
        difference=(gained - lost) / n,
        interval=_tango(gained, lost, n),
        changed=float(np.mean(np.asarray(predictions_a) != np.asarray(predictions_b))),
        n=n,
    )


def _tango(gained: int, lost: int, n: int) -> Interval:
    """The differences d at which the score statistic lies in [-z, z]; it falls strictly with d."""

    def statistic(d: float) -> float:
        # The smaller discordant probability that is most likely when the difference is d: root of a q^2 + b q + c.
        a, b, c = 2 * n, (2 * n - gained + lost) * d - gained - lost, -lost * d * (1 - d)
        q = (np.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = n * (2 * q + d * (1 - d))
        distance = gained - lost - n * d
        return float(distance / np.sqrt(variance)) if variance > 0 else float(np.sign(distance)) * np.inf

    centre = (gained - lost) / n
    lower = -1.0 if gained - lost == -n else _crossing(statistic, Z, low=-1.0, high=centre)
    upper = 1.0 if gained - lost == n else _crossing(statistic, -Z, low=centre, high=1.0)
    return lower, upper


def _crossing(falling: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return (low + high) / 2


def bootstrap_factor(
    dense_ms: NDArray[Any], arm_ms: NDArray[Any], *, seed: int, openings: int = 1, resamples: int = 2000
) -> tuple[float, Interval]:
    """Median of dense over median of the arm, with its percentile bootstrap interval. Arrays: [rounds], both > 0.

    Round i of both was measured back to back, so rounds are drawn, never single times: a slow moment of the machine
    falls on both and cancels. ``openings`` equal parts of the rounds are of networks that were opened anew: first openings are
    drawn, then rounds of each, as what an opening does to a network stays in all of its rounds.
    """
    dense_ms, arm_ms = np.asarray(dense_ms, np.float64), np.asarray(arm_ms, np.float64)
    rounds = len(dense_ms)
    assert rounds == len(arm_ms) > 0 and rounds % openings == 0
    factor = float(np.median(dense_ms) / np.median(arm_ms))
    generator = np.random.default_rng(seed)
    factors = np.empty(resamples)
    step = max(1, 500_000 // rounds)  # at most some 20 MB at once
    for start in range(0, resamples, step):
        count, each = min(step, resamples - start), rounds // openings
        parts = generator.integers(0, openings, (count, openings, 1))
        drawn = (parts * each + generator.integers(0, each, (count, openings, each))).reshape(count, rounds)
        factors[start : start + step] = np.median(dense_ms[drawn], axis=1) / np.median(arm_ms[drawn], axis=1)
    low, high = np.percentile(factors, [2.5, 97.5])
    # With few distinct times the percentiles can fall on one side of the estimate by a rounding step.
    return factor, (min(float(low), factor), max(float(high), factor))
