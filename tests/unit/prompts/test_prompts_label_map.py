"""Label maps: greedy by frequency, one to one, the same for the same counts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vpdeploy.prompts.label_map import count_pairs, frequency_map

tables = st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2**16), st.sampled_from([1, 3, 50]))


def table(drawn: tuple[int, int, int, int]) -> torch.Tensor:
    """[source, target] counts with at least as many source classes; a low ``most`` gives many ties."""
    targets, more, seed, most = drawn
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, (targets + more, targets), generator=generator)


def test_by_hand() -> None:
    """Greedy is not optimal: 9 is taken first, so target 0 gets 1 from source 2, though 8 + 7 would be more than 9 + 1."""
    counts = torch.tensor(
        [
            [8, 9],
            [0, 7],
            [1, 2],
            [0, 0],
        ]
    )
    assert frequency_map(counts) == (2, 0)


def test_ties_go_to_the_lower_source_then_the_lower_target() -> None:
    assert frequency_map(torch.full((4, 3), 5)) == (0, 1, 2)
    assert frequency_map(torch.tensor([[0, 0, 0], [0, 4, 4], [0, 4, 4]])) == (0, 1, 2)
    assert frequency_map(torch.zeros(3, 2, dtype=torch.int64)) == (0, 1)


def test_a_class_without_images_gets_what_is_left() -> None:
    assert frequency_map(torch.tensor([[3, 0, 9], [5, 0, 0], [0, 0, 0]])) == (1, 2, 0)


@given(tables)
def test_one_to_one_and_greedy(drawn: tuple[int, int, int, int]) -> None:
    counts = table(drawn)
    chosen = frequency_map(counts)
    assert len(chosen) == counts.shape[1]
    assert len(set(chosen)) == len(chosen) and all(0 <= s < counts.shape[0] for s in chosen)
    # No source that is left over, and no swap with a less frequent pair, would serve a target better.
    for target, source in enumerate(chosen):
        for other in range(counts.shape[0]):
            if int(counts[other, target]) > int(counts[source, target]):
                taker = chosen.index(other)
                assert int(counts[other, taker]) >= int(counts[other, target])


@given(tables)
def test_the_counts_are_not_changed(drawn: tuple[int, int, int, int]) -> None:
    counts = table(drawn)
    before = counts.clone()
    assert frequency_map(counts) == frequency_map(counts)
    assert torch.equal(counts, before)


def test_pairs_are_counted_by_source_and_target() -> None:
    predicted, labels = torch.tensor([3, 0, 3, 1, 3]), torch.tensor([1, 0, 1, 1, 0])
    counts = count_pairs(predicted, labels, sources=5, targets=2)
    assert counts.tolist() == [[1, 0], [0, 1], [0, 0], [1, 2], [0, 0]]
