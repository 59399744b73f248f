"""Intervals hold what their authors published, their closed forms, and what they estimate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpdeploy.measure.statistics import Z, bootstrap_factor, paired_difference, wilson


def test_wilson_gives_newcombes_published_values():
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    for correct, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_accuracy_and_stays_in_range(counts):
    correct, n = counts
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert low < high


def _outcomes(gained: int, lost: int, n: int):
    """Right and wrong of two arms on n images: b alone right on the first, a alone on the next, both right after."""
    a = np.arange(n) >= gained
    b = np.ones(n, bool)
    b[gained : gained + lost] = False
    return a, b


def test_the_paired_interval_is_tangos():
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850-2875: 1 gained, 7 lost, 21 pairs.
    a, b = _outcomes(1, 7, 21)
    result = paired_difference(a, b, predictions_a=a, predictions_b=b)
    assert result.difference == pytest.approx(-6 / 21)
    assert result.interval == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert result.changed == pytest.approx(8 / 21)
    assert result.n == 21


def test_arms_that_agree_everywhere_still_have_an_interval():
    a, b = _outcomes(0, 0, 100)
    bound = Z**2 / (100 + Z**2)  # closed form of the score interval without discordant pairs
    assert paired_difference(a, b, predictions_a=a, predictions_b=b).interval == pytest.approx(
        (-bound, bound), abs=1e-9
    )


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_paired_interval_contains_the_difference_and_mirrors(n, data):
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    a, b = _outcomes(gained, lost, n)
    there = paired_difference(a, b, predictions_a=a, predictions_b=b)
    back = paired_difference(b, a, predictions_a=b, predictions_b=a)
    assert there.difference == (gained - lost) / n
    assert -1 <= there.interval[0] <= there.difference <= there.interval[1] <= 1
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-9)


def test_changed_counts_predictions_that_differ_although_both_are_wrong():
    wrong = np.zeros(4, bool)
    result = paired_difference(wrong, wrong, predictions_a=np.array([1, 2, 3, 4]), predictions_b=np.array([1, 2, 0, 0]))
    assert (result.difference, result.changed) == (0.0, 0.5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 300), st.integers(0, 2**31))
def test_the_bootstrap_interval_contains_the_factor(rounds, seed):
    generator = np.random.default_rng(seed)
    dense, arm = generator.gamma(20, 0.1, rounds), generator.gamma(20, 0.05, rounds)
    factor, (low, high) = bootstrap_factor(dense, arm, seed=seed, resamples=200)
    assert factor == pytest.approx(np.median(dense) / np.median(arm))
    assert low <= factor <= high


def test_the_bootstrap_interval_shrinks_with_the_rounds_and_repeats_with_the_seed():
    generator = np.random.default_rng(0)
    dense, arm = generator.gamma(20, 0.1, 2000), generator.gamma(20, 0.05, 2000)

    def width(rounds: int) -> float:
        _, (low, high) = bootstrap_factor(dense[:rounds], arm[:rounds], seed=1)
        return high - low

    # The width falls with the root of the number of rounds: 10 times over a hundredfold.
    assert 4 < width(20) / width(2000) < 25
    assert bootstrap_factor(dense, arm, seed=3) == bootstrap_factor(dense, arm, seed=3)


def test_rounds_are_drawn_together():
    # Both arms slow down together, by far more than they differ: drawn apart, the interval would span that disturbance.
    slow = np.repeat([1.0, 10.0], 50)
    factor, (low, high) = bootstrap_factor(2 * slow, slow, seed=0)
    assert (factor, low, high) == (2.0, 2.0, 2.0)
